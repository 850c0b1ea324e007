// Cosines between pixels and anchors as matrix products over tiles, the divergence of their softmax, and the gradients.
//
// With f = F / |F|, h_p the unit anchors and e_p the gradient of the cosine f . h_p, a pixel receives
//   dF = sum_p (e_p / |F|) h_p - (sum_p e_p f . h_p / |F|^2) F.
// The coefficients in brackets, one a pixel and anchor and one a pixel, are all that backward needs beside F; they are
// also what the anchors' gradient sums up: D_p = sum_u (e_p / |F|) F, da_p = (D_p - (D_p . h_p) h_p) / |a_p|.
#pragma once
#include "loops.h"
#include "tile.h"

namespace sea {
namespace SEA_ISA {

static_assert(kBlockRows <= kMostBlockRows);

// Norms at most this have no direction. Written n <= kSmallest, so that NaN is not taken for zero.
constexpr double kSmallest = 1e-12;

// Fills inverse_norm and panels.
template <class T>
void prepare(const Anchors<T>& out) {
  for (int64_t r = 0; r < out.rows; ++r) {
    const T* anchor = out.anchors + out.masks[r] * out.channels;
    double square = 0;
    for (int64_t c = 0; c < out.channels; ++c) square += static_cast<double>(anchor[c]) * anchor[c];
    const T norm = static_cast<T>(std::sqrt(square));
    out.inverse_norm[r] = norm <= static_cast<T>(kSmallest) ? 0 : 1 / norm;
    T* panel = out.panels + r / kBlockRows * kBlockRows * out.channels + r % kBlockRows;
    for (int64_t c = 0; c < out.channels; ++c) panel[c * kBlockRows] = anchor[c] * out.inverse_norm[r];
  }
}

// out[r, c] = scale * unit anchor
template <class T>
void directions(const Anchors<T>& anchors, T scale, T* out) {
  for (int64_t r = 0; r < anchors.rows; ++r) {
    const T* anchor = anchors.anchors + anchors.masks[r] * anchors.channels;
    const T factor = scale * anchors.inverse_norm[r];
    for (int64_t c = 0; c < anchors.channels; ++c) out[r * anchors.channels + c] = anchor[c] * factor;
  }
}

// Reads the pixels [begin, end) of a map and their inverse norms; pixels that do not count read as zero.
template <class T>
inline void read_counted(const Map& map, const Runs* runs, int64_t begin, int64_t end,
                         T* tile,            // [channels, kTilePixels]
                         T* inverse_norm) {  // [kTilePixels]
  read_channels(map, begin, end, tile, kTilePixels);
  const auto clear = [&](int64_t from, int64_t to) {
    for (int64_t c = 0; c < map.channels; ++c)
      for (int64_t n = from; n < to; ++n) tile[c * kTilePixels + n] = 0;
  };
  if (end - begin < kTilePixels) clear(end - begin, kTilePixels);
  if (runs)
    runs->each(begin, end, [&](int64_t run, int64_t from, int64_t to) {
      if (!runs->counts(run)) clear(from - begin, to - begin);
    });
  Vec<T> square[kTilePixels / kLanes<T>] = {};
  for (int64_t c = 0; c < map.channels; ++c)
    for (int64_t v = 0; v < kTilePixels / kLanes<T>; ++v) {
      const Vec<T> x = load(tile + c * kTilePixels + v * kLanes<T>);
      square[v] += x * x;
    }
  for (int64_t n = 0; n < kTilePixels; ++n) {
    const T norm = std::sqrt(square[n / kLanes<T>][n % kLanes<T>]);
    inverse_norm[n] = norm <= static_cast<T>(kSmallest) ? 0 : 1 / norm;
  }
}

// cosines[r, n] = scale * direction_r . F(n) / |F(n)|
template <class T>
inline void cosine_tile(const Anchors<T>& anchors,
                        const T* tile,          // [channels, kTilePixels]
                        const T* inverse_norm,  // [kTilePixels]
                        T scale,
                        T* cosines) {  // [rows, kTilePixels]
  for (int64_t i = 0; i < anchors.rows * kTilePixels; ++i) cosines[i] = 0;
  multiply(anchors.rows, kTilePixels, anchors.channels, anchors.panels, kBlockRows, 1, kBlockRows * anchors.channels,
           tile, kTilePixels, cosines, kTilePixels);
  for (int64_t r = 0; r < anchors.rows; ++r)
    for (int64_t n = 0; n < kTilePixels; ++n) cosines[r * kTilePixels + n] *= inverse_norm[n] * scale;
}

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
  read_counted(task.teacher, task.runs, begin, end, tile, inverse_norm);
  cosine_tile(task.teacher_anchors, tile, inverse_norm, task.inverse_temperature, teacher);
  read_counted(task.student, task.runs, begin, end, tile, inverse_norm);
  cosine_tile(task.student_anchors, tile, inverse_norm, task.inverse_temperature, coefficients);
  return divergence_tile(task, inverse_norm, coefficients, teacher);
}

// moments[r, c] += sum_n coefficients[r, n] F[c, n]
template <class T>
inline void add_moments(int64_t rows, int64_t channels, const T* coefficients, const T* tile,
                        T* turned,     // [kTilePixels, padded channels]
                        T* moments) {  // [rows, padded channels]
  const int64_t width = padded(channels);
  for (int64_t i = channels < width ? 0 : kTilePixels; i < kTilePixels; ++i)
    for (int64_t c = channels; c < width; ++c) turned[i * width + c] = 0;
  gather(kTilePixels, channels, tile, 1, kTilePixels, 0, turned, width);
  multiply(rows, width, kTilePixels, coefficients, 1, kTilePixels, kBlockRows * kTilePixels, turned, width, moments,
           width);
}

// Divergence of the pixels [begin, end), which begin on a tile.
template <class T>
double distance(const Distance<T>& task, int64_t begin, int64_t end,
                T* kept,     // [tiles of the level, rows + 1, kTilePixels]; null: nothing is kept
                T* moments,  // [rows, padded channels], added to; null: the anchors get no gradient
                T* scratch) {
  const int64_t rows = task.student_anchors.rows;
  T* tile = scratch;
  T* inverse_norm = tile + task.student.channels * kTilePixels;
  T* student = inverse_norm + kTilePixels;
  T* teacher = student + (rows + 1) * kTilePixels;
  T* turned = teacher + rows * kTilePixels;
  double total = 0;
  for (int64_t n = begin; n < end; n += kTilePixels) {
    const int64_t stop = n + kTilePixels < end ? n + kTilePixels : end;
    if (task.runs->skips(n, stop)) continue;
    T* out = kept ? kept + n * (rows + 1) : student;
    total += compute_coefficients(task, n, stop, tile, inverse_norm, out, teacher);
    if (moments) add_moments(rows, task.student.channels, out, tile, turned, moments);
  }
  return total;
}

// The anchors' gradient from the moments: summed over blocks, projected away from the anchor, over its norm.
template <class T>
void project(const Anchors<T>& anchors,
             const T* moments,  // [blocks, block_stride], of which [rows, padded channels] is read
             int64_t blocks, int64_t block_stride,
             T* gradient) {  // [masks, channels]
  const int64_t channels = anchors.channels, width = padded(channels);
  for (int64_t r = 0; r < anchors.rows; ++r) {
    T* out = gradient + anchors.masks[r] * channels;
    const T* anchor = anchors.anchors + anchors.masks[r] * channels;
    const T inverse = anchors.inverse_norm[r];
    double along = 0;
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = 0;
      for (int64_t b = 0; b < blocks; ++b) out[c] += moments[b * block_stride + r * width + c];
      along += static_cast<double>(out[c]) * (anchor[c] * inverse);
    }
    for (int64_t c = 0; c < channels; ++c) out[c] = (out[c] - static_cast<T>(along) * (anchor[c] * inverse)) * inverse;
  }
}

// tile[c, n] = coefficients[rows, n] F[c, n] + sum_r coefficients[r, n] direction[r, c], all times scale
template <class T>
inline void add_directions(int64_t rows, int64_t channels, const T* coefficients, const T* direction, T scale,
                           const T* features,  // [channels, kTilePixels]
                           T* tile) {          // [channels, kTilePixels]
  const T* last = coefficients + rows * kTilePixels;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t n = 0; n < kTilePixels; ++n)
      tile[c * kTilePixels + n] = scale * last[n] * features[c * kTilePixels + n];
  multiply(channels, kTilePixels, rows, direction, channels, 1, kBlockRows, coefficients, kTilePixels, tile,
           kTilePixels);
}

template <class T>
void cosine(const Cosine<T>& task, int64_t begin, int64_t end, T* scratch) {
  T* tile = scratch;
  T* inverse_norm = tile + task.features.channels * kTilePixels;
  T* cosines = inverse_norm + kTilePixels;             // [rows, kTilePixels]
  T* all = cosines + task.anchors.rows * kTilePixels;  // [masks, kTilePixels]
  read_counted<T>(task.features, nullptr, begin, end, tile, inverse_norm);
  cosine_tile(task.anchors, tile, inverse_norm, T(1), cosines);
  for (int64_t i = 0; i < task.cosines.channels * kTilePixels; ++i) all[i] = 0;
  for (int64_t r = 0; r < task.anchors.rows; ++r)
    std::memcpy(all + task.anchors.masks[r] * kTilePixels, cosines + r * kTilePixels, kTilePixels * sizeof(T));
  write_channels(task.cosines, begin, end, all, kTilePixels);
}

template <class T>
void cosine_backward(const Cosine<T>& task, int64_t begin, int64_t end,
                     T* moments,  // [rows, padded channels], added to
                     T* scratch) {
  const int64_t rows = task.anchors.rows, channels = task.features.channels;
  T* tile = scratch;
  T* inverse_norm = tile + channels * kTilePixels;
  T* cosines = inverse_norm + kTilePixels;           // [rows + 1, kTilePixels]
  T* upstream = cosines + (rows + 1) * kTilePixels;  // [masks, kTilePixels]
  T* gradient = upstream + task.cosines.channels * kTilePixels;
  T* turned = gradient + channels * kTilePixels;
  for (int64_t n = begin; n < end; n += kTilePixels) {
    const int64_t stop = n + kTilePixels < end ? n + kTilePixels : end;
    read_counted<T>(task.features, nullptr, n, stop, tile, inverse_norm);
    cosine_tile(task.anchors, tile, inverse_norm, T(1), cosines);
    read_channels(task.cosines, n, stop, upstream, kTilePixels);
    T* last = cosines + rows * kTilePixels;
    for (int64_t i = 0; i < kTilePixels; ++i) last[i] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < kTilePixels; ++i) {
        const T e = i < stop - n ? upstream[task.anchors.masks[r] * kTilePixels + i] * inverse_norm[i] : 0;
        last[i] -= e * cosines[r * kTilePixels + i] * inverse_norm[i];
        cosines[r * kTilePixels + i] = e;
      }
    add_directions(rows, channels, cosines, task.direction, T(1), tile, gradient);
    write_channels(task.gradient, n, stop, gradient, kTilePixels);
    add_moments(rows, channels, cosines, tile, turned, moments);
  }
}

}  // namespace SEA_ISA
}  // namespace sea
