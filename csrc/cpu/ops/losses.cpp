// The losses, fused: any number of sets of maps, each with the losses it takes part in.
//
// pool: anchors of student and teacher, and the localization loss, from one pass over the maps.
// compare: the anchor loss from the anchors, and the distance loss from a second pass over its maps, which also sums up
// the gradient of the anchors. Between the two, the ranks of a group add up their anchors.
// sea_loss is both. It takes one set after the other through all steps, so that intermediate results are held for one
// set only and are still in the cache.
#include "losses.h"

namespace sea {
namespace {

// The losses of all sets, each added up in double.
struct Totals {
  double anchor = 0, distance = 0, localization = 0;
};

// A tensor that is saved for backward: of `needed` elements, or empty where it is not saved.
template <class T>
Tensor make_saved(const char* name, int64_t elements, int64_t needed) {
  check_elements(name, elements, needed, true);
  return make({elements}, kScalarType<T>);
}

template <class T>
T* offset_if(const Tensor& tensor, int64_t offset) {
  return tensor.numel() > 0 ? data<T>(tensor) + offset : nullptr;
}

// The anchors of one set, and its localization loss.
template <class T>
void pool_and_localize(const Set& set, const Masks& masks, T temperature,
                       T* anchors,  // [2 sides, L, P, C]
                       T* softmax,  // [L][4, B, C]
                       Totals& totals) {
  const bool localizes = set.has(kLocalization);
  const int64_t channels = set.channels();
  std::vector<double> divergence(set.levels() * channels);
  pool_set(set, masks, temperature, set.has_anchors() ? anchors : nullptr, anchors + set.table(masks.count()),
           localizes ? softmax : nullptr, divergence.data());
  for (int64_t l = 0; localizes && l < set.levels(); ++l) {
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += divergence[l * channels + c];
    const double rows = static_cast<double>(set.student[l].batch * channels);
    if (rows > 0) totals.localization += sum * temperature * temperature / rows;
  }
}

// Blocks of 8 tiles, larger ones where the partial sums of the anchors' gradient would take more than a sixteenth of
// the map.
template <class T>
std::vector<Block> make_distance_blocks(const std::vector<Distance<T>>& levels, const Masks& masks) {
  std::vector<Block> blocks;
  for (size_t l = 0; l < levels.size(); ++l) {
    const Map& map = levels[l].student;
    const int64_t moment = padded_rows(levels[l].student_anchors.rows) * map.channels;
    const int64_t tiles = count_tiles(map), elements = map.pixels() * map.channels;
    const int64_t most = std::max(tiles / 96 + 1, std::min(tiles / 8 + 1, elements / (16 * (moment + 1))));
    if (masks.valid_pixels(l) > 0) append_blocks(blocks, l, map, (tiles + most - 1) / most);
  }
  return blocks;
}

// The distance loss of one set; the gradient of its anchors is summed up in the same pass.
template <class T>
double distance_loss(const Set& set, const Masks& masks, const PreparedAnchors<T>& student,
                     const PreparedAnchors<T>& teacher, T temperature,
                     T* saved,       // [L][tiles, rows + 1, kTilePixels] coefficients; null: they are not saved
                     T* gradient) {  // [L, P, C]; null: none
  const std::vector<Distance<T>> levels = make_distances(set, masks, student, teacher, temperature);
  const std::vector<Block> blocks = make_distance_blocks(levels, masks);
  const std::vector<int64_t> first = first_blocks(blocks, set.levels());
  const auto moment_size = [&](int64_t l) { return padded_rows(levels[l].student_anchors.rows) * set.channels(); };
  std::vector<int64_t> moment_offset(1, 0), saved_offset(1, 0);
  for (const Block& block : blocks)
    moment_offset.push_back(moment_offset.back() + (gradient ? moment_size(block.level) : 0));
  int64_t scratch_size = 0;
  for (const Distance<T>& level : levels) {
    saved_offset.push_back(saved_offset.back() + coefficients(level.student, masks.count()));
    scratch_size = std::max(scratch_size, level.scratch());
  }

  Buffer<T> moments(moment_offset.back());
  std::vector<double> sums(blocks.size());
  parallel<T>(blocks.size(), scratch_size, [&](int64_t task, T* scratch) {
    const auto [l, begin, end] = blocks[task];
    T* own = gradient ? moments.get() + moment_offset[task] : nullptr;
    if (own) std::fill_n(own, moment_size(l), T(0));
    sums[task] = kernels<T>().distance(levels[l], begin, end, saved ? saved + saved_offset[l] : nullptr, own, scratch);
  });
  double total = 0;
  for (size_t i = 0; i < blocks.size(); ++i) total += sums[i] / masks.valid_pixels(blocks[i].level);
  if (gradient)
    parallel(set.levels(), [&](int64_t l) {
      const int64_t table = masks.count() * set.channels(), count = first[l + 1] - first[l];
      T* out = gradient + l * table;
      std::fill_n(out, table, T(0));
      if (count > 0)
        kernels<T>().project(levels[l].student_anchors, moments.get() + moment_offset[first[l]], count, moment_size(l),
                             out);
    });
  return total;
}

// Anchor and distance loss of one set.
template <class T>
void compare_set(
    const Set& set, const Masks& masks, T temperature,
    const T* anchors,          // [L, P, C] of the student
    const T* teacher_anchors,  // [L, P, C]; null: `anchors` are the differences, and there are no distances
    T* saved,                  // as of distance_loss()
    T* gradient,               // likewise
    Totals& totals) {
  const int64_t table = masks.count() * set.channels();
  if (set.has(kAnchor))
    for (int64_t l = 0; l < set.levels(); ++l)
      totals.anchor += anchor_loss(masks.present(l), set.channels(), anchors + l * table,
                                   teacher_anchors ? teacher_anchors + l * table : nullptr);
  if (set.has(kDistance)) {
    const PreparedAnchors<T> student(anchors, set.student, masks), teacher(teacher_anchors, set.teacher, masks);
    totals.distance += distance_loss(set, masks, student, teacher, temperature, saved, gradient);
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

Outputs sea_loss(std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<int64_t> losses,
                 std::vector<Tensor> regions, double distance_temperature, double localization_temperature,
                 int64_t saved_elements, int64_t gradient_elements, int64_t softmax_elements) {
  const std::vector<Set> sets = make_sets(student, teacher, losses);
  const Masks masks(regions, sets[0].student);
  const SavedLayout layout(sets, masks.count());
  return with_compute_type(any_double(student, teacher), [&](auto zero) -> Outputs {
    using T = decltype(zero);
    const Tensor saved = make_saved<T>("saved_elements", saved_elements, layout.saved);
    const Tensor gradients = make_saved<T>("gradient_elements", gradient_elements, layout.gradients);
    const Tensor softmax = make_saved<T>("softmax_elements", softmax_elements, layout.softmax);
    const Buffer<T> own_softmax(softmax_elements > 0 ? 0 : layout.softmax);
    Totals totals;
    for (size_t s = 0; s < sets.size(); ++s) {
      const SavedLayout::Offsets& at = layout.sets[s];
      const int64_t table = sets[s].table(masks.count());
      const Buffer<T> own_anchors(saved_elements > 0 || !sets[s].has_anchors() ? 0 : 2 * table);
      T* const anchors = saved_elements > 0 ? data<T>(saved) + at.anchors : own_anchors.get();
      T* const sums = (softmax_elements > 0 ? data<T>(softmax) : own_softmax.get()) + at.softmax;
      pool_and_localize(sets[s], masks, static_cast<T>(localization_temperature), anchors, sums, totals);
      compare_set<T>(sets[s], masks, static_cast<T>(distance_temperature), anchors, anchors + table,
                     offset_if<T>(saved, at.coefficients), offset_if<T>(gradients, at.gradients), totals);
    }
    return {make_scalar<T>(totals.anchor),
            make_scalar<T>(totals.distance),
            make_scalar<T>(totals.localization),
            {saved, gradients, softmax}};
  });
}

std::tuple<Tensor, Tensor, Tensor> sea_loss_pool(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                 std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                 double localization_temperature, int64_t anchor_elements,
                                                 int64_t softmax_elements) {
  const std::vector<Set> sets = make_sets(student, teacher, losses);
  const Masks masks(regions, sets[0].student);
  const SavedLayout layout(sets, masks.count());
  check_elements("anchor_elements", anchor_elements, layout.pooled, false);
  return with_compute_type(any_double(student, teacher), [&](auto zero) {
    using T = decltype(zero);
    const Tensor anchors = make({anchor_elements}, kScalarType<T>);
    const Tensor softmax = make_saved<T>("softmax_elements", softmax_elements, layout.softmax);
    const Buffer<T> own_softmax(softmax_elements > 0 ? 0 : layout.softmax);
    Totals totals;
    for (size_t s = 0; s < sets.size(); ++s) {
      const SavedLayout::Offsets& at = layout.sets[s];
      const int64_t table = sets[s].table(masks.count());
      const bool difference = sets[s].has_anchors() && !sets[s].has(kDistance);
      const Buffer<T> both(difference ? 2 * table : 0);
      T* const out = data<T>(anchors) + at.pooled;
      T* const sums = (softmax_elements > 0 ? data<T>(softmax) : own_softmax.get()) + at.softmax;
      pool_and_localize(sets[s], masks, static_cast<T>(localization_temperature), difference ? both.get() : out, sums,
                        totals);
      for (int64_t i = 0; difference && i < table; ++i) out[i] = both.get()[i] - both.get()[table + i];
    }
    return std::make_tuple(anchors, make_scalar<T>(totals.localization), softmax);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sea_loss_compare(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                            std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                            Tensor anchors, double distance_temperature,
                                                            int64_t saved_elements, int64_t gradient_elements) {
  const std::vector<Set> sets = make_sets(student, teacher, losses);
  const Masks masks(regions, sets[0].student);
  const SavedLayout layout(sets, masks.count());
  check_elements("anchors.numel()", anchors.numel(), layout.pooled, false);
  return with_compute_type(any_double(student, teacher), [&](auto zero) {
    using T = decltype(zero);
    const Tensor saved = make_saved<T>("saved_elements", saved_elements, layout.saved);
    const Tensor gradients = make_saved<T>("gradient_elements", gradient_elements, layout.gradients);
    Totals totals;
    for (size_t s = 0; s < sets.size(); ++s) {
      const SavedLayout::Offsets& at = layout.sets[s];
      const T* const own = data<T>(anchors) + at.pooled;
      compare_set<T>(sets[s], masks, static_cast<T>(distance_temperature), own,
                     sets[s].has(kDistance) ? own + sets[s].table(masks.count()) : nullptr,
                     offset_if<T>(saved, at.coefficients), offset_if<T>(gradients, at.gradients), totals);
    }
    return std::make_tuple(make_scalar<T>(totals.anchor), make_scalar<T>(totals.distance), saved, gradients);
  });
}

std::vector<Tensor> sea_loss_backward(std::optional<Tensor> anchor, std::optional<Tensor> distance,
                                      std::optional<Tensor> localization, std::vector<Tensor> student,
                                      std::vector<Tensor> teacher, std::vector<int64_t> losses,
                                      std::vector<Tensor> regions, std::vector<Tensor> saved,
                                      double distance_temperature, double localization_temperature) {
  const std::vector<Set> sets = make_sets(student, teacher, losses);
  const Masks masks(regions, sets[0].student);
  std::vector<Tensor> gradients;
  for (const Tensor& map : student) gradients.push_back(make_gradient(map));
  losses_backward(sets, make_maps(gradients), {anchor, distance, localization}, masks, Saved(saved),
                  distance_temperature, localization_temperature, any_double(student, teacher));
  return gradients;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) {
  library.impl("sea_loss", TORCH_BOX(&sea::sea_loss));
  library.impl("sea_loss_pool", TORCH_BOX(&sea::sea_loss_pool));
  library.impl("sea_loss_compare", TORCH_BOX(&sea::sea_loss_compare));
  library.impl("sea_loss_backward", TORCH_BOX(&sea::sea_loss_backward));
}
