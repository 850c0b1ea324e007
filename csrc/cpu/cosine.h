// Cosines between pixels and anchors as matrix products over tiles, and their gradients: anchor_cosine, and what the
// distances share with it.
//
// With f = F / |F|, h_p the unit anchors and e_p the gradient of the cosine f . h_p, a pixel receives
//   dF = sum_p (e_p / |F|) h_p - (sum_p e_p f . h_p / |F|^2) F.
// The coefficients in brackets, one per pixel and anchor and one per pixel, are all that backward needs besides F. The
// anchors' gradient is computed from sums over the same coefficients:
//   D_p = sum_u (e_p / |F|) F, da_p = (D_p - (D_p . h_p) h_p) / |a_p|.
#pragma once
#include "anchors.h"

namespace sea {
namespace SEA_ISA {

// Reads the pixels [begin, end) of a map and their inverse norms; those that are not valid read as zero.
template <class T>
inline void read_valid(const Map& map, const Runs* runs, int64_t begin, int64_t end,
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
      if (!runs->is_valid(run)) clear(from - begin, to - begin);
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
  multiply(anchors.rows, kTilePixels, anchors.channels, anchors.blocks, kBlockRows, 1, kBlockRows * anchors.channels,
           tile, kTilePixels, cosines, kTilePixels);
  for (int64_t r = 0; r < anchors.rows; ++r)
    for (int64_t n = 0; n < kTilePixels; ++n) cosines[r * kTilePixels + n] *= inverse_norm[n] * scale;
}

// tile[c, n] = coefficients[rows, n] F[c, n] + sum_r coefficients[r, n] direction[r, c], all times scale
template <class T>
inline void add_directions(int64_t rows, int64_t channels,
                           const T* coefficients,  // [rows + 1, kTilePixels]
                           const T* direction,     // [rows, channels]
                           T scale,
                           const T* features,  // [channels, kTilePixels]
                           T* tile) {          // [channels, kTilePixels]
  const T* last = coefficients + rows * kTilePixels;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t n = 0; n < kTilePixels; ++n)
      tile[c * kTilePixels + n] = scale * last[n] * features[c * kTilePixels + n];
  multiply(channels, kTilePixels, rows, direction, channels, 1, kBlockRows, coefficients, kTilePixels, tile,
           kTilePixels);
}

// moments[r, c] += sum_n coefficients[r, n] F[c, n]
template <class T>
inline void add_moments(int64_t rows, int64_t channels,
                        const T* coefficients,  // [rows, kTilePixels]
                        const T* tile,          // [channels, kTilePixels]
                        T* transposed,          // [kTilePixels, padded channels]
                        T* moments) {           // [rows, padded channels]
  const int64_t width = padded(channels);
  for (int64_t i = channels < width ? 0 : kTilePixels; i < kTilePixels; ++i)
    for (int64_t c = channels; c < width; ++c) transposed[i * width + c] = 0;
  gather(kTilePixels, channels, tile, 1, kTilePixels, 0, transposed, width);
  multiply(rows, width, kTilePixels, coefficients, 1, kTilePixels, kBlockRows * kTilePixels, transposed, width, moments,
           width);
}

// Cosines of the pixels [begin, end), at most a tile, with all anchors; 0 with empty ones.
template <class T>
void cosine(const Cosine<T>& task, int64_t begin, int64_t end, T* scratch) {
  T* tile = scratch;                                              // [channels, kTilePixels]
  T* inverse_norm = tile + task.features.channels * kTilePixels;  // [kTilePixels]
  T* cosines = inverse_norm + kTilePixels;                        // [rows, kTilePixels]
  T* all = cosines + task.anchors.rows * kTilePixels;             // [masks, kTilePixels]
  read_valid<T>(task.features, nullptr, begin, end, tile, inverse_norm);
  cosine_tile(task.anchors, tile, inverse_norm, T(1), cosines);
  for (int64_t i = 0; i < task.cosines.channels * kTilePixels; ++i) all[i] = 0;
  for (int64_t r = 0; r < task.anchors.rows; ++r)
    std::memcpy(all + task.anchors.masks[r] * kTilePixels, cosines + r * kTilePixels, kTilePixels * sizeof(T));
  write_channels(task.cosines, begin, end, all, kTilePixels);
}

// The gradient of the pixels [begin, end), and what they add to that of the anchors.
template <class T>
void cosine_backward(const Cosine<T>& task, int64_t begin, int64_t end,
                     T* moments,  // [rows, padded channels], added to
                     T* scratch) {
  const int64_t rows = task.anchors.rows, channels = task.features.channels;
  T* tile = scratch;                                             // [channels, kTilePixels]
  T* inverse_norm = tile + channels * kTilePixels;               // [kTilePixels]
  T* cosines = inverse_norm + kTilePixels;                       // [rows + 1, kTilePixels]
  T* upstream = cosines + (rows + 1) * kTilePixels;              // [masks, kTilePixels]
  T* gradient = upstream + task.cosines.channels * kTilePixels;  // [channels, kTilePixels]
  T* transposed = gradient + channels * kTilePixels;             // [kTilePixels, padded channels]
  for (int64_t n = begin; n < end; n += kTilePixels) {
    const int64_t stop = n + kTilePixels < end ? n + kTilePixels : end;
    read_valid<T>(task.features, nullptr, n, stop, tile, inverse_norm);
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
    add_moments(rows, channels, cosines, tile, transposed, moments);
  }
}

}  // namespace SEA_ISA
}  // namespace sea
