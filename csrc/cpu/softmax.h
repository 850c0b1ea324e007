// The localization loss: online softmax over the positions of each channel, in one pass over student and teacher. It
// uses the tiles that pooling has already read (pool.h), so it does not read the maps again.
#pragma once
#include "tile.h"

namespace sea {
namespace SEA_ISA {

// State of the online softmax of one channel of student and teacher: maximum and sum of exponentials, and the teacher's
// weighted sum of differences. Maxima and differences are those of the maps, before the temperature is applied, so that
// subtracting them is exact. Sums are partial: one for each lane.
template <class T>
struct Softmax {
  T student_max = -INFINITY, teacher_max = -INFINITY;
  Vec<T> student_sum{}, teacher_sum{}, difference{};
};

// The maximum of a row's pixels is `largest` at least: where it is more, the sums are rescaled. That is rare.
template <class T, class... Sums>
inline void raise_maximum(const T* row, const Pixels<T>& pixels, T inverse_temperature, T& largest, Sums&... sums) {
  Vec<T> most = splat(T(-INFINITY));
  for (int v = 0; v < kVectors<T>; ++v) {
    const Vec<T> x = load(row + v * kLanes<T>);
    most = maximum(pixels.vectors[v] ? x : most, most);
  }
  if (!any<T>(most > largest)) return;
  T now = largest;
  for (int i = 0; i < kLanes<T>; ++i) now = most[i] > now ? most[i] : now;
  const Vec<T> scale = exp(splat((largest - now) * inverse_temperature));
  ((sums *= scale), ...);
  largest = now;
}

// Adds some pixels of a row of a tile.
template <class T>
inline void add_softmax(Softmax<T>& state, const Pixels<T>& pixels, T inverse_temperature,
                        const T* student,    // [kTilePixels]
                        const T* teacher) {  // [kTilePixels]
  raise_maximum(student, pixels, inverse_temperature, state.student_max, state.student_sum);
  raise_maximum(teacher, pixels, inverse_temperature, state.teacher_max, state.teacher_sum, state.difference);
  Vec<T> student_sum{}, teacher_sum{}, difference{};
  for (int v = 0; v < kVectors<T>; ++v) {
    const Vec<T> s = load(student + v * kLanes<T>), t = load(teacher + v * kLanes<T>);
    const Vec<T> weight = exp((t - state.teacher_max) * inverse_temperature);
    student_sum += keep<T>(exp((s - state.student_max) * inverse_temperature), pixels.vectors[v]);
    teacher_sum += keep<T>(weight, pixels.vectors[v]);
    difference += keep<T>(weight * (t - s), pixels.vectors[v]);
  }
  state.student_sum += student_sum;
  state.teacher_sum += teacher_sum;
  state.difference += difference;
}

}  // namespace SEA_ISA
}  // namespace sea
