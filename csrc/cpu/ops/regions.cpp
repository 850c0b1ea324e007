// Regions from boxes: categories present, one bit for every mask and pixel, areas. Built without contraction of
// floating point: the raster rule is exact.
#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace sea {
namespace {

struct Interval {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// floor(low / stride) .. max(ceil(high / stride), floor(low / stride) + 1) - 1, clipped to the map. NaN gives nothing.
template <class T>
Interval cover(T low, T high, T stride, int64_t size) {
  const T first = std::floor(low / stride), last = std::max(std::ceil(high / stride), first + 1),
          limit = static_cast<T>(size);
  if (!(first < limit) || !(last > 0)) return {0, 0};
  return {first > 0 ? static_cast<int64_t>(first) : 0, last < limit ? static_cast<int64_t>(last) : size};
}

struct Rectangle {
  Interval x, y;
};

template <class T>
Rectangle cover(const T* box, const T* stride, int64_t height, int64_t width) {  // box: x1 y1 x2 y2; stride: y x
  return {cover(box[0], box[2], stride[1], width), cover(box[1], box[3], stride[0], height)};
}

template <class T>
bool finite(const T* box) {
  return std::isfinite(box[0]) && std::isfinite(box[1]) && std::isfinite(box[2]) && std::isfinite(box[3]);
}

template <class T>
bool valid(const T* box) {
  return finite(box) && box[2] >= box[0] && box[3] >= box[1];
}

struct Level {
  int64_t height, width, first;  // first: pixels of the levels before
};

template <class T>
void rasterize(const Tensor& boxes, const std::vector<int64_t>& image,  // [G], -1: skip
               const int64_t* label,                                    // [G]
               const Tensor* ignore_boxes, const std::vector<int64_t>& ignore_image,
               const std::vector<double>& sizes,  // [2B] or none
               int64_t batch, const std::vector<Level>& levels, const std::vector<double>& strides, double center_ratio,
               const int64_t* classes, int64_t present, int64_t masks, float* area, float* counted, Extent* extents,
               int32_t* bits, int64_t pixels) {
  const T* box = data<T>(boxes);
  const T ratio = static_cast<T>(center_ratio);
  const int64_t words = (1 + 2 * present + 31) / 32, tasks = static_cast<int64_t>(levels.size()) * batch;
  std::vector<std::vector<int64_t>> of_image(batch), ignored(batch);
  for (size_t g = 0; g < image.size(); ++g)
    if (image[g] >= 0 && valid(box + 4 * g)) of_image[image[g]].push_back(g);
  for (size_t g = 0; g < ignore_image.size(); ++g)
    if (ignore_image[g] >= 0 && valid(data<T>(*ignore_boxes) + 4 * g)) ignored[ignore_image[g]].push_back(g);
  std::vector<int64_t> areas(levels.size() * (2 + 2 * present), 0);  // [L, 2 + 2 present]; the last: counted

  parallel(tasks, [&](int64_t task) {
    const int64_t l = task / batch, b = task % batch;
    const Level& level = levels[l];
    const T stride[2] = {static_cast<T>(strides[2 * l]), static_cast<T>(strides[2 * l + 1])};
    Extent extent{static_cast<int32_t>(level.height), static_cast<int32_t>(level.width)};
    if (!sizes.empty()) {
      extent.rows = cover(T(0), static_cast<T>(sizes[2 * b]), stride[0], level.height).end;
      extent.columns = cover(T(0), static_cast<T>(sizes[2 * b + 1]), stride[1], level.width).end;
      if (!(sizes[2 * b] > 0)) extent.rows = 0;
      if (!(sizes[2 * b + 1] > 0)) extent.columns = 0;
    }
    extents[l * batch + b] = extent;
    int32_t* plane = bits + level.first + b * level.height * level.width;  // [words, pixels of the image]
    for (int64_t w = 0; w < (masks + 31) / 32; ++w) std::fill_n(plane + w * pixels, level.height * level.width, 0);
    const auto clip = [&](Rectangle r) {
      r.x.end = std::min<int64_t>(r.x.end, extent.columns);
      r.y.end = std::min<int64_t>(r.y.end, extent.rows);
      return r;
    };
    // Background first: what no box and no ignore box covers.
    std::vector<char> covered(level.height * level.width, 0);
    const auto cover_with = [&](const T* corners) {
      const Rectangle r = clip(cover(corners, stride, level.height, level.width));
      for (int64_t y = r.y.begin; y < r.y.end && !r.x.empty(); ++y)
        std::fill(covered.begin() + y * level.width + r.x.begin, covered.begin() + y * level.width + r.x.end, 1);
    };
    for (const int64_t g : of_image[b]) cover_with(box + 4 * g);
    for (const int64_t g : ignored[b]) cover_with(data<T>(*ignore_boxes) + 4 * g);
    for (int64_t y = 0; y < extent.rows; ++y)
      for (int64_t x = 0; x < extent.columns; ++x) plane[y * level.width + x] = !covered[y * level.width + x];

    for (const int64_t g : of_image[b]) {
      const T* c = box + 4 * g;
      const Rectangle outer = clip(cover(c, stride, level.height, level.width));
      const T x = (c[0] + c[2]) / 2, y = (c[1] + c[3]) / 2, w = ratio * (c[2] - c[0]) / 2,
              h = ratio * (c[3] - c[1]) / 2;
      const T middle[4] = {x - w, y - h, x + w, y + h};
      Rectangle inner = clip(cover(middle, stride, level.height, level.width));
      inner.x = {std::max(inner.x.begin, outer.x.begin), std::min(inner.x.end, outer.x.end)};
      inner.y = {std::max(inner.y.begin, outer.y.begin), std::min(inner.y.end, outer.y.end)};
      const int64_t k = std::lower_bound(classes, classes + present, label[g]) - classes;
      const auto mark = [&](int64_t mask, int64_t row, int64_t from, int64_t to) {
        int32_t* out = plane + mask / 32 * pixels + row * level.width;
        for (int64_t i = from; i < to; ++i) out[i] |= static_cast<int32_t>(1u << mask % 32);
      };
      for (int64_t row = outer.y.begin; row < outer.y.end; ++row) {
        const bool through = finite(middle) && row >= inner.y.begin && row < inner.y.end && !inner.x.empty();
        const Interval middle_columns = through ? inner.x : Interval{outer.x.begin, outer.x.begin};
        mark(2 + 2 * k, row, outer.x.begin, middle_columns.begin);
        mark(1 + 2 * k, row, middle_columns.begin, middle_columns.end);
        mark(2 + 2 * k, row, middle_columns.end, outer.x.end);
      }
    }
    std::vector<int64_t> count(2 + 2 * present, 0);
    for (int64_t n = 0; n < level.height * level.width; ++n) {
      int32_t any = 0;
      for (int64_t v = 0; v < words; ++v) {
        any |= plane[v * pixels + n];
        for (uint32_t word = static_cast<uint32_t>(plane[v * pixels + n]); word != 0; word &= word - 1)
          ++count[32 * v + __builtin_ctz(word)];
      }
      count[1 + 2 * present] += any != 0;
    }
    for (size_t p = 0; p < count.size(); ++p)
      if (count[p]) __atomic_fetch_add(&areas[l * count.size() + p], count[p], __ATOMIC_RELAXED);
  });

  for (size_t l = 0; l < levels.size(); ++l) {
    const int64_t* total = areas.data() + l * (2 + 2 * present);
    for (int64_t p = 0; p < masks; ++p) area[l * masks + p] = p < 1 + 2 * present ? static_cast<float>(total[p]) : 0.f;
    counted[l] = static_cast<float>(total[1 + 2 * present]);
  }
}

// Whose box is it: from an index a box, or from the number of boxes of each image.
std::vector<int64_t> images(const std::optional<Tensor>& index, const std::vector<int64_t>& counts, int64_t batch) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> regions(
    Tensor boxes, Tensor labels, std::optional<Tensor> batch_index, std::vector<int64_t> counts,
    std::optional<Tensor> ignore_boxes, std::optional<Tensor> ignore_batch_index, std::vector<int64_t> ignore_counts,
    std::optional<Tensor> image_sizes, std::vector<int64_t> image_size_list, int64_t batch_size,
    std::vector<int64_t> level_shapes, std::vector<double> strides, int64_t num_classes, double center_ratio,
    std::optional<Tensor> present) {
  const int64_t total = labels.numel(), capacity = present ? num_classes : std::min(total, num_classes);
  const int64_t masks = 1 + 2 * capacity;
  const int64_t* label = data<int64_t>(labels);
  std::vector<int64_t> image = images(batch_index, counts, batch_size);
  std::vector<int64_t> ignore_image;
  if (ignore_boxes) ignore_image = images(ignore_batch_index, ignore_counts, batch_size);
  std::vector<double> sizes(image_size_list.begin(), image_size_list.end());
  if (image_sizes) sizes.assign(data<int64_t>(*image_sizes), data<int64_t>(*image_sizes) + 2 * batch_size);
  std::vector<Level> levels;
  int64_t pixels = 0;
  for (size_t l = 0; l < level_shapes.size() / 2; ++l) {
    levels.push_back({level_shapes[2 * l], level_shapes[2 * l + 1], pixels});
    pixels += batch_size * level_shapes[2 * l] * level_shapes[2 * l + 1];
  }
  const int64_t count = static_cast<int64_t>(levels.size());
  Tensor classes = make({capacity}, ScalarType::Long), area = make({count, masks}, ScalarType::Float);
  Tensor counted = make({count}, ScalarType::Float), extent = make({count, batch_size, 2}, ScalarType::Int);
  Tensor bits = make({(masks + 31) / 32 * pixels}, ScalarType::Int);

  const bool wide = boxes.scalar_type() == ScalarType::Double;
  std::vector<int64_t> found;
  for (int64_t g = 0; g < total; ++g) {
    if (label[g] < 0 || label[g] >= num_classes ||
        !(wide ? valid(data<double>(boxes) + 4 * g) : valid(data<float>(boxes) + 4 * g)))
      image[g] = -1;
    if (image[g] >= 0) found.push_back(label[g]);
  }
  for (int64_t k = 0; present && k < num_classes; ++k)
    if (data<bool>(*present)[k]) found.push_back(k);
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  std::fill(std::copy(found.begin(), found.end(), data<int64_t>(classes)), data<int64_t>(classes) + capacity,
            int64_t{-1});

  const auto run = [&](auto zero) {
    rasterize<decltype(zero)>(boxes, image, label, ignore_boxes ? &*ignore_boxes : nullptr, ignore_image, sizes,
                              batch_size, levels, strides, center_ratio, data<int64_t>(classes),
                              static_cast<int64_t>(found.size()), masks, data<float>(area), data<float>(counted),
                              data<Extent>(extent), data<int32_t>(bits), pixels);
  };
  wide ? run(0.) : run(0.f);
  return {classes, area, counted, extent, bits};
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) { library.impl("rasterize", TORCH_BOX(&sea::regions)); }
