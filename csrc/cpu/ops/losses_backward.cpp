// The gradient of the student's maps from all losses at once, one set after the other: each map is read once and its
// gradient written once. Anchors and coefficients that forward did not save are computed again.
#include "losses.h"

namespace sea {
namespace {

template <class T>
struct Scales {
  T anchor, distance, localization;  // upstream gradients

  explicit Scales(const Upstream& upstream)
      : anchor(value(upstream.anchor)),
        distance(value(upstream.distance)),
        localization(value(upstream.localization)) {}

 private:
  static T value(const std::optional<Tensor>& scalar) { return scalar ? *data<T>(*scalar) : 0; }
};

// The anchors of one set: those of a group's ranks, those that were saved, or pooled again.
template <class T>
struct SetAnchors {
  const T *student = nullptr, *teacher = nullptr;  // [L, P, C]; no teacher: the student's are the differences

  SetAnchors(const Set& set, bool has_distance, const Masks& masks, const Saved& saved, const SavedLayout::Offsets& at,
             T localization_temperature)
      : buffer_(set.has_anchors() && saved.saved.numel() == 0 && !saved.anchors ? 2 * set.table(masks.count()) : 0) {
    if (!set.has_anchors()) return;
    const int64_t table = set.table(masks.count());
    if (saved.anchors) {
      student = data<T>(*saved.anchors) + at.pooled;
    } else if (saved.saved.numel() > 0) {
      student = data<T>(saved.saved) + at.anchors;
    } else {
      pool_levels<T>(set, masks, {0, set.levels()}, localization_temperature, buffer_.get(), buffer_.get() + table,
                     nullptr, nullptr);
      student = buffer_.get();
    }
    teacher = saved.anchors && !has_distance ? nullptr : student + table;
  }

 private:
  Buffer<T> buffer_;
};

template <class T>
void backward_levels(const Set& set, Levels levels,
                     const Map* gradients,  // [L]
                     const Masks& masks, const Saved& saved, const SetAnchors<T>& anchors, const Scales<T>& scales,
                     const Temperatures<T>& temperatures, const SavedLayout::Offsets& at,
                     const T* from_distance) {  // [L, P, C] gradient of the anchors from the distances; null: none
  const int64_t channels = set.channels(), table = masks.count() * channels;
  const int64_t direction = masks.count() * (channels + kMaxBlockRows);
  const Buffer<T> spread(set.has_anchors() ? levels.count() * table : 0);
  const Buffer<T> directions(set.has(kDistance) ? levels.count() * direction : 0);
  std::vector<Distance<T>> distances(levels.count());
  std::optional<PreparedAnchors<T>> student, teacher;
  if (set.has(kDistance)) {
    student.emplace(anchors.student + levels.first * table, channels, masks, levels);
    teacher.emplace(anchors.teacher + levels.first * table, channels, masks, levels);
    distances = make_distances(set, masks, levels, *student, *teacher, temperatures.distance);
  }
  parallel(levels.count(), [&](int64_t i) {
    const int64_t l = levels.first + i;
    const auto level = [&](const T* p) { return p ? p + l * table : nullptr; };
    if (set.has_anchors())
      anchor_gradients(masks.present(l), channels, masks.area(l), level(set.has(kAnchor) ? anchors.student : nullptr),
                       level(anchors.teacher), level(from_distance), scales.anchor, scales.distance,
                       spread.get() + i * table);
    if (set.has(kDistance))
      kernels<T>().directions(distances[i].student_anchors, scales.distance, directions.get() + i * direction);
  });

  std::vector<Backward<T>> tasks;
  int64_t scratch_size = 0;
  for (int64_t i = 0; i < levels.count(); ++i) {
    const int64_t l = levels.first + i;
    const Map& map = set.student[l];
    Backward<T> task{};
    task.student = map;
    task.teacher = set.teacher[l];
    task.gradient = gradients[l];
    task.runs = masks.runs(l);
    task.spread = set.has_anchors() ? spread.get() + i * table : nullptr;
    task.distance = distances[i];
    task.with_distance = set.has(kDistance) && masks.valid_pixels(l) > 0;
    if (task.with_distance) {
      task.direction = directions.get() + i * direction;
      task.coefficients = saved.saved.numel() > 0
                              ? data<T>(saved.saved) + at.coefficients + coefficients_before(set, l, masks.count())
                              : nullptr;
      task.distance_scale = scales.distance;
    }
    task.extents = masks.extents(l);
    task.softmax = set.has(kLocalization) ? data<T>(saved.softmax) + at.softmax + softmax_before(set, l) : nullptr;
    task.localization_scale = scales.localization * temperatures.localization / static_cast<T>(map.batch * channels);
    task.inverse_temperature = 1 / temperatures.localization;
    scratch_size = std::max(scratch_size, task.scratch());
    tasks.push_back(task);
  }
  std::vector<Map> maps(set.student.begin() + levels.first, set.student.begin() + levels.last);
  const std::vector<Block> blocks = make_blocks(maps, 4);
  parallel<T>(blocks.size(), scratch_size, [&](int64_t task, T* scratch) {
    const auto [i, begin, end] = blocks[task];
    for (int64_t n = begin; n < end; n += kTilePixels)
      kernels<T>().backward(tasks[i], n, std::min(n + kTilePixels, end), scratch);
  });
}

template <class T>
void backward_set(const Set& set, bool has_distance,
                  const Map* gradients,  // [L]
                  const Masks& masks, const Saved& saved, const SavedLayout::Offsets& at, const Scales<T>& scales,
                  const Temperatures<T>& temperatures) {
  const SetAnchors<T> anchors(set, has_distance, masks, saved, at, temperatures.localization);
  const bool passes = set.has(kDistance) && saved.gradients.numel() > 0;
  for (const Levels levels : level_groups(set, masks))
    backward_levels(set, levels, gradients, masks, saved, anchors, scales, temperatures, at,
                    passes ? data<const T>(saved.gradients) + at.gradients : nullptr);
}

}  // namespace

void losses_backward(std::vector<Set> sets, const std::vector<Map>& gradients, const Upstream& upstream,
                     const Masks& masks, const Saved& saved, double distance_temperature,
                     double localization_temperature, bool wide) {
  const SavedLayout layout(sets, masks.count());
  check_elements("saved[0]", saved.saved.numel(), layout.saved, true);
  check_elements("saved[1]", saved.gradients.numel(), layout.gradients, true);
  check_elements("saved[2]", saved.softmax.numel(), layout.softmax, false);
  if (saved.anchors) check_elements("saved[3]", saved.anchors->numel(), layout.pooled, false);
  const int64_t given = (upstream.anchor ? kAnchor : 0) | (upstream.distance ? kDistance : 0) |
                        (upstream.localization ? kLocalization : 0);
  with_compute_type(wide, [&](auto zero) {
    using T = decltype(zero);
    const Scales<T> scales(upstream);
    const Temperatures<T> temperatures{static_cast<T>(distance_temperature), static_cast<T>(localization_temperature)};
    for (size_t s = 0; s < sets.size(); ++s) {
      const bool has_distance = sets[s].has(kDistance);
      sets[s].losses &= given;
      backward_set(sets[s], has_distance, gradients.data() + s * sets[s].levels(), masks, saved, layout.sets[s], scales,
                   temperatures);
    }
  });
}

}  // namespace sea
