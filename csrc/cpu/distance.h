// The topological distance loss: cosines of student and teacher, the divergence of their softmax over the anchors, and
// the coefficients of its gradient, tile by tile. One pass over the maps gives the loss, the coefficients for backward,
// and the sums (moments) from which the anchors' gradient is projected. The cosines exist for one tile at a time only.
#pragma once
#include "cosine.h"

namespace sea {
namespace SEA_ISA {

// Turns the scaled cosines of student and teacher into the coefficients of the gradient: student[r] = e_r / |F|,
// student[rows] = -sum_r e_r s_r / |F|^2. Returns the divergence.
template <class T>
inline double divergence_tile(const Distance<T>& task,
                              const T* inverse_norm,  // [kTilePixels] of the student
                              T* student,             // [rows + 1, kTilePixels]
                              T* teacher) {           // [rows, kTilePixels]
  double total = 0;
  const int64_t rows = task.student_anchors.rows;
  for (int64_t n = 0; n < kTilePixels; n += kLanes<T>) {
    T *zs = student + n, *zt = teacher + n;
    Vec<T> student_max = load(zs), teacher_max = load(zt);
    for (int64_t r = 1; r < rows; ++r) {
      student_max = maximum(load(zs + r * kTilePixels), student_max);
      teacher_max = maximum(load(zt + r * kTilePixels), teacher_max);
    }
    Vec<T> student_sum{}, teacher_sum{}, student_mean{}, teacher_mean{}, difference{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> s = load(zs + r * kTilePixels), t = load(zt + r * kTilePixels);
      const Vec<T> ws = exp(s - student_max), wt = exp(t - teacher_max);
      student_sum += ws;
      teacher_sum += wt;
      student_mean += ws * (s - student_max);
      teacher_mean += wt * (s - student_max);
      difference += wt * (t - s);
      store(zs + r * kTilePixels, ws);
      store(zt + r * kTilePixels, wt);
    }
    const Vec<T> student_scale = splat(T(1)) / student_sum, teacher_scale = splat(T(1)) / teacher_sum;
    const Vec<T> inverse = load(inverse_norm + n);
    const Vec<T> scale = inverse * (task.weight * task.inverse_temperature);
    Vec<T> rest{};  // the e_r sum to 0 only up to rounding
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> e = load(zs + r * kTilePixels) * student_scale - load(zt + r * kTilePixels) * teacher_scale;
      rest += e;
      store(zs + r * kTilePixels, e * scale);
    }
    // s = z * temperature cancels the 1 / temperature of e. The means are those of z - max: where all cosines are near
    // 1 the sum of e_r z_r is far smaller than its terms.
    const Vec<T> mean = teacher_mean * teacher_scale - student_mean * student_scale - rest * student_max;
    store(zs + rows * kTilePixels, mean * inverse * inverse * task.weight);
    const Vec<T> divergence = difference * teacher_scale + (student_max - teacher_max);
    for (int i = 0; i < kLanes<T>; ++i) total += divergence[i] + std::log(student_sum[i] / teacher_sum[i]);
  }
  return total;
}

// Scaled cosines, then coefficients, of one tile. Leaves the student's pixels in `tile`.
template <class T>
inline double compute_coefficients(const Distance<T>& task, int64_t begin, int64_t end,
                                   T* tile,          // [channels, kTilePixels]
                                   T* inverse_norm,  // [kTilePixels]
                                   T* coefficients,  // [rows + 1, kTilePixels]
                                   T* teacher) {     // [rows, kTilePixels]
  Rows<T> rows = read_valid(task.teacher, task.runs, begin, end, tile, inverse_norm);
  cosine_tile(task.teacher_anchors, tile, inverse_norm, rows, task.inverse_temperature, teacher);
  rows = read_valid(task.student, task.runs, begin, end, tile, inverse_norm);
  cosine_tile(task.student_anchors, tile, inverse_norm, rows, task.inverse_temperature, coefficients);
  return divergence_tile(task, inverse_norm, coefficients, teacher);
}

// Divergence of the pixels [begin, end), which begin on a tile.
template <class T>
double distance(const Distance<T>& task, int64_t begin, int64_t end,
                T* saved,    // [tiles of the level, rows + 1, kTilePixels] coefficients; null: they are not saved
                T* moments,  // [channels, padded rows], added to; null: the anchors get no gradient
                T* scratch) {
  const int64_t rows = task.student_anchors.rows;
  T* tile = scratch;                                             // [channels, kTilePixels]
  T* inverse_norm = tile + task.student.channels * kTilePixels;  // [kTilePixels]
  T* student = inverse_norm + kTilePixels;                       // [rows + 1, kTilePixels]
  T* teacher = student + (rows + 1) * kTilePixels;               // [rows, kTilePixels]
  T* transposed = teacher + rows * kTilePixels;                  // [kTilePixels, padded rows]
  double total = 0;
  for (int64_t n = begin; n < end; n += kTilePixels) {
    const int64_t stop = n + kTilePixels < end ? n + kTilePixels : end;
    if (task.runs->skips(n, stop)) continue;
    T* coefficients = saved ? saved + n * (rows + 1) : student;
    total += compute_coefficients(task, n, stop, tile, inverse_norm, coefficients, teacher);
    if (moments) add_moments(rows, task.student.channels, coefficients, tile, transposed, moments);
  }
  return total;
}

}  // namespace SEA_ISA
}  // namespace sea
