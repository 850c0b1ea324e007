// The localization loss: online softmax over the positions of each channel, in one pass over student and teacher. It
// uses the tiles that pooling has already read (pool.h), so it does not read the maps again.
#pragma once
#include "tile.h"

namespace sea {
namespace SEA_ISA {

// State of the online softmax of student and teacher: maximum and sum of exponentials, and the teacher's weighted sum
// of differences. Maxima and differences are those of the maps, before the temperature is applied, so that subtracting
// them is exact.
template <class T>
struct Softmax {
  Vec<T> student_max = splat(T(-INFINITY)), student_sum{};
  Vec<T> teacher_max = splat(T(-INFINITY)), teacher_sum{};
  Vec<T> difference{};
};

// Adds `pixels` rows, at least one, of a tile to the online softmax of one vector of channels: the sums so far are
// rescaled to the new maximum once for the whole tile.
template <class T>
inline void softmax_tile(Softmax<T>& state, int64_t pixels, T inverse_temperature,
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
  state.student_sum += student_sum;
  state.teacher_sum += teacher_sum;
  state.difference += difference;
  state.student_max = student_max;
  state.teacher_max = teacher_max;
}

}  // namespace SEA_ISA
}  // namespace sea
