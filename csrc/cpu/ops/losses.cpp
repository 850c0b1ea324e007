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

// The anchors of some levels of one set, and their localization loss.
template <class T>
void pool_and_localize(const Set& set, const Masks& masks, Levels levels, T temperature,
                       T* student_anchors,  // [levels, P, C]
                       T* teacher_anchors,  // [levels, P, C]
                       T* softmax,          // [levels][4, B, C]
                       Totals& totals) {
  const bool localizes = set.has(kLocalization);
  const int64_t channels = set.channels();
  std::vector<double> divergence(levels.count() * channels);
  pool_levels(set, masks, levels, temperature, set.has_anchors() ? student_anchors : nullptr, teacher_anchors,
              localizes ? softmax : nullptr, divergence.data());
  for (int64_t l = 0; localizes && l < levels.count(); ++l) {
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += divergence[l * channels + c];
    const double rows = static_cast<double>(set.student[levels.first + l].batch * channels);
    if (rows > 0) totals.localization += sum * temperature * temperature / rows;
  }
}

// Blocks of about 8 tiles, or of up to 96 where the partial sums of the anchors' gradient would take more than a
// sixteenth of the map. Block::level is an index into `levels`.
template <class T>
std::vector<Block> make_distance_blocks(const std::vector<Distance<T>>& levels) {
  std::vector<Block> blocks;
  for (size_t l = 0; l < levels.size(); ++l) {
    const Map& map = levels[l].student;
    const int64_t moment = padded_rows(levels[l].student_anchors.rows) * map.channels;
    const int64_t tiles = count_tiles(map), elements = map.pixels() * map.channels;
    const int64_t most = std::max(tiles / 96 + 1, std::min(tiles / 8 + 1, elements / (16 * (moment + 1))));
    if (levels[l].weight > 0) append_blocks(blocks, l, map, (tiles + most - 1) / most);
  }
  return blocks;
}

// The distance loss of some levels of one set; the gradient of their anchors is summed up in the same pass.
template <class T>
double distance_loss(const std::vector<Distance<T>>& levels, const Masks& masks, int64_t first_level,
                     T* saved,       // [levels][tiles, rows + 1, kTilePixels] coefficients; null: they are not saved
                     T* gradient) {  // [levels, P, C]; null: none
  const int64_t count = static_cast<int64_t>(levels.size()), channels = levels[0].student.channels;
  const std::vector<Block> blocks = make_distance_blocks(levels);
  const std::vector<int64_t> first = first_blocks(blocks, count);
  const auto moment_size = [&](int64_t l) { return padded_rows(levels[l].student_anchors.rows) * channels; };
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
  for (size_t i = 0; i < blocks.size(); ++i) total += sums[i] / masks.valid_pixels(first_level + blocks[i].level);
  if (gradient)
    parallel(count, [&](int64_t l) {
      const int64_t table = masks.count() * channels;
      T* out = gradient + l * table;
      std::fill_n(out, table, T(0));
      kernels<T>().project(levels[l].student_anchors, moments.get() + moment_offset[first[l]], first[l + 1] - first[l],
                           moment_size(l), out);
    });
  return total;
}

// Anchor and distance loss of some levels of one set.
template <class T>
void compare_levels(
    const Set& set, const Masks& masks, Levels levels, T temperature,
    const T* anchors,          // [levels, P, C] of the student
    const T* teacher_anchors,  // [levels, P, C]; null: `anchors` are the differences, and there are no distances
    T* saved,                  // as of distance_loss()
    T* gradient,               // likewise
    Totals& totals) {
  const int64_t table = masks.count() * set.channels();
  for (int64_t l = 0; set.has(kAnchor) && l < levels.count(); ++l)
    totals.anchor += anchor_loss(masks.present(levels.first + l), set.channels(), anchors + l * table,
                                 teacher_anchors ? teacher_anchors + l * table : nullptr);
  if (!set.has(kDistance)) return;
  const PreparedAnchors<T> student(anchors, set.channels(), masks, levels);
  const PreparedAnchors<T> teacher(teacher_anchors, set.channels(), masks, levels);
  totals.distance += distance_loss(make_distances(set, masks, levels, student, teacher, temperature), masks,
                                   levels.first, saved, gradient);
}

// Calls f(levels, T* anchors of a level, T* coefficients, T* gradient, T* softmax) for each group of levels of a set:
// where the first of these levels has its part of the tensors that are saved. Null where they are not saved.
template <class T, class F>
void each_group(const Set& set, const Masks& masks, const SavedLayout::Offsets& at, const Tensor& saved,
                const Tensor& gradients, T* softmax, F f) {
  const int64_t table = masks.count() * set.channels();
  for (const Levels levels : level_groups(set, masks))
    f(levels, offset_if<T>(saved, at.anchors + levels.first * table),
      offset_if<T>(saved, at.coefficients + coefficients_before(set, levels.first, masks.count())),
      offset_if<T>(gradients, at.gradients + levels.first * table),
      softmax ? softmax + at.softmax + softmax_before(set, levels.first) : nullptr);
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
      const Set& set = sets[s];
      each_group(set, masks, layout.sets[s], saved, gradients,
                 softmax_elements > 0 ? data<T>(softmax) : own_softmax.get(),
                 [&](Levels levels, T* anchors, T* coefficients, T* gradient, T* sums) {
                   const int64_t table = levels.count() * masks.count() * set.channels();
                   // From the student's anchors to the teacher's.
                   const int64_t side = !set.has_anchors() ? 0 : anchors ? set.table(masks.count()) : table;
                   const Buffer<T> own(anchors ? 0 : 2 * side);
                   if (!anchors) anchors = own.get();
                   pool_and_localize(set, masks, levels, static_cast<T>(localization_temperature), anchors,
                                     anchors + side, sums, totals);
                   compare_levels<T>(set, masks, levels, static_cast<T>(distance_temperature), anchors, anchors + side,
                                     coefficients, gradient, totals);
                 });
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
      T* const own = difference ? both.get() : out;
      pool_and_localize(sets[s], masks, {0, sets[s].levels()}, static_cast<T>(localization_temperature), own,
                        own + (sets[s].has_anchors() ? table : 0), sums, totals);
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
      const Set& set = sets[s];
      const int64_t table = masks.count() * set.channels();
      const T* const own = data<T>(anchors) + layout.sets[s].pooled;
      each_group<T>(set, masks, layout.sets[s], saved, gradients, nullptr,
                    [&](Levels levels, T*, T* coefficients, T* gradient, T*) {
                      const T* student_anchors = own + levels.first * table;
                      compare_levels<T>(set, masks, levels, static_cast<T>(distance_temperature), student_anchors,
                                        set.has(kDistance) ? student_anchors + set.table(masks.count()) : nullptr,
                                        coefficients, gradient, totals);
                    });
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
