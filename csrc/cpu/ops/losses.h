// Shared by forward and backward of the losses: sets of maps, and the layout of the tensors saved for backward.
#pragma once
#include "anchors.h"

namespace sea {

// One set: student and teacher maps of all levels, and which losses it takes part in.
struct Set {
  std::vector<Map> student, teacher;
  int64_t losses;  // flags

  int64_t levels() const { return static_cast<int64_t>(student.size()); }
  int64_t channels() const { return student[0].channels; }
  bool has(LossFlag loss) const { return losses & loss; }
  bool has_anchors() const { return losses & (kAnchor | kDistance); }
  // Elements of the anchors [L, P, C] of one side.
  int64_t table(int64_t masks) const { return levels() * masks * channels(); }
};

// Elements of the coefficients that distance() saves on one level.
inline int64_t coefficients(const Map& map, int64_t masks) { return (masks + 1) * count_tiles(map) * kTilePixels; }

// Elements of the levels before one: of these coefficients, and of the softmax of pool().
inline int64_t coefficients_before(const Set& set, int64_t level, int64_t masks) {
  int64_t sum = 0;
  for (int64_t l = 0; l < level; ++l) sum += coefficients(set.student[l], masks);
  return sum;
}
inline int64_t softmax_before(const Set& set, int64_t level) {
  return 4 * set.student[0].batch * set.channels() * level;
}

inline std::vector<Set> make_sets(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                                  const std::vector<int64_t>& losses) {
  std::vector<Set> sets;
  const size_t levels = student.size() / losses.size();
  for (size_t s = 0; s < losses.size(); ++s) {
    sets.push_back({{}, {}, losses[s]});
    for (size_t l = s * levels; l < (s + 1) * levels; ++l) {
      sets[s].student.push_back(make_map(student[l]));
      sets[s].teacher.push_back(make_map(teacher[l]));
    }
  }
  return sets;
}

// The place of each set in the tensors that all sets share, one set after the other, and the sizes of these tensors.
// They depend on shapes alone. Python computes the same sizes (sea_kernels/native/saved.py).
struct SavedLayout {
  struct Offsets {
    // saved: the coefficients of the distances, then the anchors of both sides. Both have a row more than there are
    // masks, so that one comparison in Python tells whether saved is small enough.
    int64_t coefficients;  // [L][tiles, P + 1, kTilePixels], as far as they are used [tiles, rows + 1, kTilePixels]
    int64_t anchors;       // [2 sides, L, P, C]
    int64_t gradients;     // gradients: [L, P, C]
    int64_t softmax;       // softmax: [L][4, B, C]
    // anchors, which the ranks of a group sum up: [sides, L, P, C], both sides where there are distances, else their
    // difference alone, which is less to send
    int64_t pooled;
  };
  std::vector<Offsets> sets;
  int64_t saved = 0, gradients = 0, softmax = 0, pooled = 0;

  SavedLayout(const std::vector<Set>& all, int64_t masks) {
    for (const Set& set : all) {
      const int64_t levels = set.levels(), channels = set.channels();
      Offsets own{saved, 0, gradients, softmax, pooled};
      saved += set.has(kDistance) ? coefficients_before(set, levels, masks) : 0;
      own.anchors = saved;
      saved += set.has_anchors() ? 2 * levels * (masks + 1) * channels : 0;
      gradients += set.has(kDistance) ? set.table(masks) : 0;
      softmax += set.has(kLocalization) ? softmax_before(set, levels) : 0;
      pooled += (set.has(kDistance) ? 2 : set.has(kAnchor) ? 1 : 0) * set.table(masks);
      sets.push_back(own);
    }
  }
};

template <class T>
struct Temperatures {
  T distance, localization;
};

// All levels at once, unless the tables of anchors exceed a sixteenth of the maps (and 2^18 elements); then one by one.
inline std::vector<Levels> level_groups(const Set& set, const Masks& masks) {
  int64_t elements = 0;
  for (const Map& map : set.student) elements += map.pixels() * map.channels;
  const int64_t table = set.table(masks.count());
  if (!set.has_anchors() || table < 1 << 18 || 16 * table < elements) return {{0, set.levels()}};
  std::vector<Levels> out;
  for (int64_t l = 0; l < set.levels(); ++l) out.push_back({l, l + 1});
  return out;
}

// Pools some levels of one set and, where softmax is given, computes its localization loss in the same pass.
template <class T>
void pool_levels(const Set& set, const Masks& masks, Levels levels, T localization_temperature,
                 T* student_anchors,  // [levels, P, C]; null: not pooled
                 T* teacher_anchors,  // [levels, P, C]
                 T* softmax,          // [levels][4, B, C]; null: no localization
                 double* divergence)  // [levels, C]
{
  const int64_t channels = set.channels(), table = masks.count() * channels;
  std::vector<Pool<T>> tasks;
  for (int64_t l = levels.first; l < levels.last; ++l) {
    Pool<T> task{};
    task.student = set.student[l];
    task.teacher = set.teacher[l];
    if (student_anchors) {
      task.runs = masks.runs(l);
      task.area = masks.area(l);
      task.masks = masks.count();
      task.student_anchors = student_anchors + (l - levels.first) * table;
      task.teacher_anchors = teacher_anchors + (l - levels.first) * table;
    }
    if (softmax) {
      task.extents = masks.extents(l);
      task.softmax = softmax;
      task.divergence = divergence + (l - levels.first) * channels;
      task.inverse_temperature = 1 / localization_temperature;
      softmax += 4 * set.student[l].batch * channels;
    }
    tasks.push_back(task);
  }
  run_pool(tasks);
}

// One task per given level.
template <class T>
std::vector<Distance<T>> make_distances(const Set& set, const Masks& masks, Levels levels,
                                        const PreparedAnchors<T>& student, const PreparedAnchors<T>& teacher,
                                        T temperature) {
  std::vector<Distance<T>> out;
  for (int64_t l = levels.first; l < levels.last; ++l) {
    const float valid = masks.valid_pixels(l);
    out.push_back({set.student[l], set.teacher[l], masks.runs(l), student[l], teacher[l],
                   valid > 0 ? 1 / static_cast<T>(valid) : 0, 1 / temperature});
  }
  return out;
}

// Gradients of the losses. A loss that nothing was computed from has none.
struct Upstream {
  std::optional<Tensor> anchor, distance, localization;
};

// losses_backward.cpp: fills the gradients of the student's maps.
void losses_backward(std::vector<Set> sets, const std::vector<Map>& gradients, const Upstream& upstream,
                     const Masks& masks, const Saved& saved, double distance_temperature,
                     double localization_temperature, bool wide);

}  // namespace sea
