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

// Reads the pixels [begin, end) of a map and their inverse norms; those that are not valid read as zero. Returns the
// map's own rows, where it has them: what lies ahead in them is not prefetched yet.
template <class T>
inline Rows<T> read_valid(const Map& map, const Runs* runs, int64_t begin, int64_t end,
                          T* tile,            // [channels, kTilePixels]
                          T* inverse_norm) {  // [kTilePixels]
  Pixels<T> valid{};
  if (runs)
    runs->each(begin, end, [&](int64_t run, int64_t from, int64_t to) {
      if (runs->is_valid(run)) valid.add(from - begin, to - begin);
    });
  else
    valid.add(0, end - begin);
  const Rows<T> rows = read_rows(map, begin, end, 0, map.channels, tile);
  Vec<T> square[kVectors<T>] = {};
  for (int64_t c = 0; c < map.channels; ++c)
    for (int v = 0; v < kVectors<T>; ++v) {
      const Vec<T> x = keep<T>(load(rows[c] + v * kLanes<T>), valid.vectors[v]);
      store(tile + c * kTilePixels + v * kLanes<T>, x);
      square[v] += x * x;
    }
  for (int64_t n = 0; n < kTilePixels; ++n) {
    const T norm = std::sqrt(square[n / kLanes<T>][n % kLanes<T>]);
    inverse_norm[n] = norm <= static_cast<T>(kSmallest) ? 0 : 1 / norm;
  }
  return rows;
}

// cosines[r, n] = scale * direction_r . F(n) / |F(n)|
template <class T>
inline void cosine_tile(const Anchors<T>& anchors,
                        const T* tile,          // [channels, kTilePixels]
                        const T* inverse_norm,  // [kTilePixels]
                        Rows<T> rows,           // of which the next tile is prefetched
                        T scale,
                        T* cosines) {  // [rows, kTilePixels]
  for (int64_t i = 0; i < anchors.rows * kTilePixels; ++i) cosines[i] = 0;
  multiply(anchors.rows, kTilePixels, anchors.channels, anchors.blocks, kBlockRows, 1, kBlockRows * anchors.channels,
           tile, kTilePixels, cosines, kTilePixels, rows.ahead ? rows.data + rows.ahead : nullptr, rows.stride);
  for (int64_t r = 0; r < anchors.rows; ++r)
    for (int64_t n = 0; n < kTilePixels; ++n) cosines[r * kTilePixels + n] *= inverse_norm[n] * scale;
}

static_assert(kChunk % kBlockRows == 0, "directions are read from the middle of a block");

// chunk[c, n] = sum_r coefficients[r, n] direction[r, c], for the channels [c0, c0 + channels)
template <class T>
inline void multiply_directions(int64_t rows, int64_t c0, int64_t channels,
                                const T* coefficients,  // [rows, kTilePixels]
                                const T* direction,     // [all channels / kBlockRows, rows, kBlockRows]
                                T* chunk) {             // [channels, kTilePixels]
  for (int64_t i = 0; i < channels * kTilePixels; ++i) chunk[i] = 0;
  multiply(channels, kTilePixels, rows, direction + c0 * rows, kBlockRows, 1, rows * kBlockRows, coefficients,
           kTilePixels, chunk, kTilePixels);
}

// moments[c, r] += sum_n F[c, n] coefficients[r, n]
template <class T>
inline void add_moments(int64_t rows, int64_t channels,
                        const T* coefficients,  // [rows, kTilePixels]
                        const T* tile,          // [channels, kTilePixels]
                        T* transposed,          // [kTilePixels, padded rows]
                        T* moments) {           // [channels, padded rows]
  const int64_t width = padded_rows(rows);
  for (int64_t n = 0; n < kTilePixels; ++n)
    for (int64_t r = rows; r < width; ++r) transposed[n * width + r] = 0;
  gather(kTilePixels, rows, coefficients, 1, kTilePixels, 0, transposed, width);
  multiply(channels, width, kTilePixels, tile, 1, kTilePixels, kBlockRows * kTilePixels, transposed, width, moments,
           width);
}

// Cosines of the pixels [begin, end), at most a tile, with all anchors; 0 with empty ones.
template <class T>
void cosine(const Cosine<T>& task, int64_t begin, int64_t end, T* scratch) {
  T* tile = scratch;                                              // [channels, kTilePixels]
  T* inverse_norm = tile + task.features.channels * kTilePixels;  // [kTilePixels]
  T* cosines = inverse_norm + kTilePixels;                        // [rows, kTilePixels]
  T* all = cosines + task.anchors.rows * kTilePixels;             // [masks, kTilePixels]
  const Rows<T> own = read_valid<T>(task.features, nullptr, begin, end, tile, inverse_norm);
  cosine_tile(task.anchors, tile, inverse_norm, own, T(1), cosines);
  for (int64_t i = 0; i < task.cosines.channels * kTilePixels; ++i) all[i] = 0;
  for (int64_t r = 0; r < task.anchors.rows; ++r)
    std::memcpy(all + task.anchors.masks[r] * kTilePixels, cosines + r * kTilePixels, kTilePixels * sizeof(T));
  write_channels(task.cosines, begin, end, 0, task.cosines.channels, all, kTilePixels);
}

// The gradient of the pixels [begin, end), and what they add to that of the anchors.
template <class T>
void cosine_backward(const Cosine<T>& task, int64_t begin, int64_t end,
                     T* moments,  // [channels, padded rows], added to
                     T* scratch) {
  const int64_t rows = task.anchors.rows, channels = task.features.channels;
  T* tile = scratch;                                             // [channels, kTilePixels]
  T* inverse_norm = tile + channels * kTilePixels;               // [kTilePixels]
  T* cosines = inverse_norm + kTilePixels;                       // [rows + 1, kTilePixels]
  T* upstream = cosines + (rows + 1) * kTilePixels;              // [masks, kTilePixels]
  T* gradient = upstream + task.cosines.channels * kTilePixels;  // [kChunk, kTilePixels]
  T* transposed = gradient + kChunk * kTilePixels;               // [kTilePixels, padded rows]
  for (int64_t n = begin; n < end; n += kTilePixels) {
    const int64_t stop = n + kTilePixels < end ? n + kTilePixels : end;
    const Rows<T> own = read_valid<T>(task.features, nullptr, n, stop, tile, inverse_norm);
    cosine_tile(task.anchors, tile, inverse_norm, own, T(1), cosines);
    read_channels(task.cosines, n, stop, 0, task.cosines.channels, upstream, kTilePixels);
    T* last = cosines + rows * kTilePixels;
    for (int64_t i = 0; i < kTilePixels; ++i) last[i] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < kTilePixels; ++i) {
        const T e = i < stop - n ? upstream[task.anchors.masks[r] * kTilePixels + i] * inverse_norm[i] : 0;
        last[i] -= e * cosines[r * kTilePixels + i] * inverse_norm[i];
        cosines[r * kTilePixels + i] = e;
      }
    for (int64_t c0 = 0; c0 < channels; c0 += kChunk) {
      const int64_t count = c0 + kChunk < channels ? kChunk : channels - c0;
      multiply_directions(rows, c0, count, cosines, task.direction, gradient);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t i = 0; i < kTilePixels; ++i)
          gradient[c * kTilePixels + i] += last[i] * tile[(c0 + c) * kTilePixels + i];
      write_channels(task.gradient, n, stop, c0, count, gradient, kTilePixels);
    }
    add_moments(rows, channels, cosines, tile, transposed, moments);
  }
}

}  // namespace SEA_ISA
}  // namespace sea
