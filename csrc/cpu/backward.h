// The gradient of the student's maps from all three losses at once. Each map is read once and its gradient written
// once; one kernel per loss would read and write the gradient three times.
#pragma once
#include "distance.h"
#include "pool.h"

namespace sea {
namespace SEA_ISA {

// tile[c, n] += scale (softmax of the student - softmax of the teacher)
template <class T>
inline void add_localization(const Backward<T>& task, int64_t begin, int64_t end,
                             T* features,  // [channels, kTilePixels], overwritten
                             T* other,     // [channels, kTilePixels], overwritten
                             T* tile) {    // [channels, kTilePixels]
  constexpr int lanes = kLanes<T>;
  const int64_t channels = task.student.channels;
  read_channels(task.student, begin, end, features, kTilePixels);
  read_channels(task.teacher, begin, end, other, kTilePixels);
  inside(task.student, task.extents, begin, end, [&](int64_t b, int64_t from, int64_t to) {
    const int64_t rows = task.student.batch * channels;
    const T* softmax = task.softmax + b * channels;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = from; n < to; n += lanes) {
        const int64_t at = c * kTilePixels + n - begin;
        const Vec<T> student = exp((load(features + at) - softmax[c]) * task.inverse_temperature) * softmax[rows + c];
        const Vec<T> teacher =
            exp((load(other + at) - softmax[2 * rows + c]) * task.inverse_temperature) * softmax[3 * rows + c];
        const Vec<T> value = task.localization_scale * (student - teacher);
        if (n + lanes <= to)
          store(tile + at, load(tile + at) + value);
        else
          for (int i = 0; i < to - n; ++i) tile[at + i] += value[i];
      }
  });
}

// The pixels [begin, end), at most a tile.
template <class T>
void backward(const Backward<T>& task, int64_t begin, int64_t end, T* scratch) {
  const int64_t channels = task.student.channels;
  const bool valid = task.runs && !task.runs->skips(begin, end);
  const int64_t rows = task.with_distance ? task.distance.student_anchors.rows : 0;
  T* features = scratch;                            // [channels, kTilePixels]
  T* tile = features + channels * kTilePixels;      // [channels, kTilePixels]
  T* inverse_norm = tile + channels * kTilePixels;  // [kTilePixels]
  T* student = inverse_norm + kTilePixels;          // [rows + 1, kTilePixels]
  T* teacher = student + (rows + 1) * kTilePixels;  // [rows, kTilePixels]
  T* other = teacher + rows * kTilePixels;          // [channels, kTilePixels], the last: loads may run over its end

  if (task.with_distance && valid) {
    const T* coefficients = student;
    if (task.coefficients) {
      coefficients = task.coefficients + begin * (rows + 1);
      read_valid(task.student, task.runs, begin, end, features, inverse_norm);
    } else {
      compute_coefficients(task.distance, begin, end, features, inverse_norm, student, teacher);
    }
    add_directions(rows, channels, coefficients, task.direction, task.distance_scale, features, tile);
  } else {
    for (int64_t i = 0; i < channels * kTilePixels; ++i) tile[i] = 0;
  }
  if (task.spread && valid) spread_tile(*task.runs, begin, end, task.spread, channels, other, tile);
  if (task.softmax) add_localization(task, begin, end, features, other, tile);
  write_channels(task.gradient, begin, end, tile, kTilePixels);
}

}  // namespace SEA_ISA
}  // namespace sea
