// The localization loss: online softmax over the positions of each channel, in one pass over student and teacher. It
// uses the tiles that pooling has already read (pool.h), so it does not read the maps again.
#pragma once
#include "tile.h"

namespace sea {
namespace SEA_ISA {

// State of the online softmax of student and teacher: maximum and sum of exponentials, and the teacher's weighted sum
// of differences. Maxima and differences are those of the maps, before the temperature is applied, so that subtracting
// them is exact. Max = T: one channel, lanes hold partial sums. Max = Vec<T>: one channel per lane.
template <class T, class Max>
struct Softmax {
  Max student_max = Max() - INFINITY, teacher_max = Max() - INFINITY;
  Vec<T> student_sum{}, teacher_sum{}, difference{};
};

// One channel's state, summed over lanes.
template <class T>
struct SoftmaxSums {
  T student_max, teacher_max, student_sum, teacher_sum, difference;
};

// Raises `largest` to the maximum of some pixels of a row, and rescales sums to it. Rescaling is rare.
template <class T, class... Sums>
inline void raise_maximum(const T* row, const Pixels<T>& pixels, int64_t first, int64_t last, T inverse_temperature,
                          T& largest, Sums&... sums) {
  Vec<T> most = splat(T(-INFINITY));
  for (int64_t v = first; v <= last; ++v) {
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

// Adds some pixels of a row of a tile, which lie in its vectors [first, last], to the softmax of one channel.
template <class T>
inline void add_softmax(Softmax<T, T>& state, const Pixels<T>& pixels, int64_t first, int64_t last,
                        T inverse_temperature,
                        const T* student,    // [kTilePixels]
                        const T* teacher) {  // [kTilePixels]
  raise_maximum(student, pixels, first, last, inverse_temperature, state.student_max, state.student_sum);
  raise_maximum(teacher, pixels, first, last, inverse_temperature, state.teacher_max, state.teacher_sum,
                state.difference);
  Vec<T> student_sum{}, teacher_sum{}, difference{};
  for (int64_t v = first; v <= last; ++v) {
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

// Adds `pixels` rows, at least one, of a tile to the softmax of a channel in each lane.
template <class T>
inline void add_softmax(Softmax<T, Vec<T>>& state, int64_t pixels, T inverse_temperature,
                        const T* student,  // [pixels, channels]
                        const T* teacher,  // [pixels, channels]
                        int64_t channels) {
  Vec<T> student_max = state.student_max, teacher_max = state.teacher_max;
  for (int64_t n = 0; n < pixels; ++n) {
    student_max = maximum(load(student + n * channels), student_max);
    teacher_max = maximum(load(teacher + n * channels), teacher_max);
  }
  const Vec<T> teacher_scale = exp((state.teacher_max - teacher_max) * inverse_temperature);
  state.student_sum *= exp((state.student_max - student_max) * inverse_temperature);
  state.teacher_sum *= teacher_scale;
  state.difference *= teacher_scale;
  Vec<T> student_sum{}, teacher_sum{}, difference{};
  for (int64_t n = 0; n < pixels; ++n) {
    const Vec<T> s = load(student + n * channels), t = load(teacher + n * channels);
    const Vec<T> weight = exp((t - teacher_max) * inverse_temperature);
    student_sum += exp((s - student_max) * inverse_temperature);
    teacher_sum += weight;
    difference += weight * (t - s);
  }
  state = {student_max, teacher_max, state.student_sum + student_sum, state.teacher_sum + teacher_sum,
           state.difference + difference};
}

}  // namespace SEA_ISA
}  // namespace sea
