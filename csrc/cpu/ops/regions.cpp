// rasterize: categories present, one bit for every mask and pixel, areas.
#include <cpu/regions.h>

#include <numeric>

#include "memory.h"
#include "parallel.h"

namespace sea {
namespace {

struct Level {
  int32_t height, width;
  int64_t first, first_run;  // pixels, and words of runs, of the levels before
  double stride[2];          // y, x
  int64_t run_words() const { return (int64_t{height} * width + 31) / 32; }  // of an image
};

std::vector<Level> make_levels(const std::vector<int64_t>& shapes, const std::vector<double>& strides, int64_t batch) {
  std::vector<Level> levels;
  int64_t first = 0, first_run = 0;
  for (size_t l = 0; l < shapes.size() / 2; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    levels.push_back({static_cast<int32_t>(height),
                      static_cast<int32_t>(width),
                      first,
                      first_run,
                      {strides[2 * l], strides[2 * l + 1]}});
    first += batch * height * width;
    first_run += batch * levels.back().run_words();
  }
  return levels;
}

// The image of each box, from an index per box or from the number of boxes of each image; -1: skip the box.
std::vector<int64_t> find_images(const std::optional<Tensor>& index, const std::vector<int64_t>& counts,
                                 int64_t batch) {
  std::vector<int64_t> out;
  if (index)
    for (int64_t g = 0; g < index->numel(); ++g) {
      const int64_t b = data<int64_t>(*index)[g];
      out.push_back(b >= 0 && b < batch ? b : -1);
    }
  else
    for (size_t b = 0; b < counts.size(); ++b) out.insert(out.end(), counts[b], b);
  return out;
}

// The categories that get masks, ascending. Marks the boxes that are skipped.
template <class T>
std::vector<int64_t> find_classes(const T* boxes,         // [G, 4]
                                  const int64_t* labels,  // [G]
                                  const bool* present,    // [num_classes]; null: those that boxes show, no others
                                  int64_t num_classes,
                                  std::vector<int64_t>& images) {  // [G]
  std::vector<int64_t> found;
  for (size_t g = 0; g < images.size(); ++g) {
    if (labels[g] < 0 || labels[g] >= num_classes || !is_valid(boxes + 4 * g)) images[g] = -1;
    if (images[g] >= 0) found.push_back(labels[g]);
  }
  for (int64_t k = 0; present && k < num_classes; ++k)
    if (present[k]) found.push_back(k);
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

// The boxes image by image.
template <class T>
std::vector<ImageBoxes<T>> group_boxes(const T* boxes, const std::vector<int64_t>& images, const int64_t* labels,
                                       const std::vector<int64_t>& classes, const T* ignored,
                                       const std::vector<int64_t>& ignored_images,
                                       const std::vector<double>& sizes,  // [batch, 2] height, width; or none
                                       int64_t batch) {
  std::vector<ImageBoxes<T>> out(batch);
  for (int64_t b = 0; b < batch; ++b) {
    out[b].has_size = !sizes.empty();
    out[b].height = sizes.empty() ? 0 : static_cast<T>(sizes[2 * b]);
    out[b].width = sizes.empty() ? 0 : static_cast<T>(sizes[2 * b + 1]);
  }
  for (size_t g = 0; g < images.size(); ++g) {
    if (images[g] < 0) continue;
    const int64_t rank = std::lower_bound(classes.begin(), classes.end(), labels[g]) - classes.begin();
    out[images[g]].boxes.push_back({boxes + 4 * g, rank});
  }
  for (size_t g = 0; g < ignored_images.size(); ++g)
    if (ignored_images[g] >= 0 && is_valid(ignored + 4 * g)) out[ignored_images[g]].ignored.push_back(ignored + 4 * g);
  return out;
}

// What the operator returns.
struct Outputs {
  Tensor classes;  // int64 [K] categories present, then -1
  Tensor area;     // float32 [L, P] pixels of each mask
  Tensor counted;  // float32 [L] valid pixels
  Tensor extent;   // int32 [L, B, 2]
  Tensor bits;     // int32 [words, pixels of all levels]
  Tensor runs;     // int32 [words of runs of all levels, 3]
};

// Fills area, counted, extent, bits and runs: one task per level and image.
template <class T>
void rasterize_all(const std::vector<ImageBoxes<T>>& images, const std::vector<Level>& levels, double center_ratio,
                   int64_t present, const Outputs& out) {
  const int64_t batch = static_cast<int64_t>(images.size()), masks = out.area.size(1), used = 1 + 2 * present;
  const int64_t words = (masks + 31) / 32, pixels = out.bits.numel() / words;
  std::vector<int64_t> totals(levels.size() * (used + 1), 0);  // [L, masks of categories present, then valid pixels]
  parallel(static_cast<int64_t>(levels.size()) * batch, [&](int64_t task) {
    const int64_t l = task / batch, b = task % batch;
    const Level& level = levels[l];
    const T stride[2] = {static_cast<T>(level.stride[0]), static_cast<T>(level.stride[1])};
    const int64_t first = level.first + b * level.height * level.width;
    RunWord* runs = data<RunWord>(out.runs) + level.first_run + b * level.run_words();
    const Plane plane{level.height, level.width, data<int32_t>(out.bits) + first, words, (used + 31) / 32,
                      pixels,       runs};
    const Extent extent = rasterize_image(images[b], stride, static_cast<T>(center_ratio), plane);
    data<Extent>(out.extent)[task] = extent;
    write_runs(plane, extent);
    const std::vector<int64_t> count = count_pixels(plane, used);
    for (int64_t p = 0; p <= used; ++p)
      if (count[p]) __atomic_fetch_add(&totals[l * (used + 1) + p], count[p], __ATOMIC_RELAXED);
  });
  for (size_t l = 0; l < levels.size(); ++l) {
    const int64_t* total = totals.data() + l * (used + 1);
    for (int64_t p = 0; p < masks; ++p)
      data<float>(out.area)[l * masks + p] = p < used ? static_cast<float>(total[p]) : 0.f;
    data<float>(out.counted)[l] = static_cast<float>(total[used]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rasterize(
    Tensor boxes, Tensor labels, std::optional<Tensor> batch_index, std::vector<int64_t> counts,
    std::optional<Tensor> ignore_boxes, std::optional<Tensor> ignore_batch_index, std::vector<int64_t> ignore_counts,
    std::optional<Tensor> image_sizes, std::vector<int64_t> image_size_list, int64_t batch_size,
    std::vector<int64_t> level_shapes, std::vector<double> strides, int64_t num_classes, double center_ratio,
    std::optional<Tensor> present) {
  std::vector<int64_t> images = find_images(batch_index, counts, batch_size), ignored_images;
  if (ignore_boxes) ignored_images = find_images(ignore_batch_index, ignore_counts, batch_size);
  std::vector<double> sizes(image_size_list.begin(), image_size_list.end());
  if (image_sizes) sizes.assign(data<int64_t>(image_sizes), data<int64_t>(image_sizes) + 2 * batch_size);
  const std::vector<Level> levels = make_levels(level_shapes, strides, batch_size);
  const int64_t capacity = present ? num_classes : std::min(labels.numel(), num_classes), masks = 1 + 2 * capacity;
  const int64_t count = static_cast<int64_t>(levels.size());
  int64_t pixels = 0, run_words = 0;
  for (const Level& level : levels) {
    pixels += batch_size * level.height * level.width;
    run_words += batch_size * level.run_words();
  }
  const Outputs out{make({capacity}, ScalarType::Long),
                    make({count, masks}, ScalarType::Float),
                    make({count}, ScalarType::Float),
                    make({count, batch_size, 2}, ScalarType::Int),
                    make({(masks + 31) / 32 * pixels}, ScalarType::Int),
                    make({3 * run_words}, ScalarType::Int)};

  with_compute_type(any_double(boxes), [&](auto zero) {
    using T = decltype(zero);
    const int64_t* label = data<int64_t>(labels);
    const std::vector<int64_t> classes = find_classes(data<T>(boxes), label, data<bool>(present), num_classes, images);
    int64_t* const first = data<int64_t>(out.classes);
    std::fill(std::copy(classes.begin(), classes.end(), first), first + capacity, int64_t{-1});
    const auto grouped =
        group_boxes(data<T>(boxes), images, label, classes, data<T>(ignore_boxes), ignored_images, sizes, batch_size);
    rasterize_all(grouped, levels, center_ratio, static_cast<int64_t>(classes.size()), out);
  });
  return {out.classes, out.area, out.counted, out.extent, out.bits, out.runs};
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) { library.impl("rasterize", TORCH_BOX(&sea::rasterize)); }
