// Anchors of one level, prepared as unit vectors for the products with pixels, and the projection of their gradient
// afterwards. The anchor loss itself is too little work to be vectorized, and is in ops/anchors.h.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace sea {
namespace SEA_ISA {

static_assert(kBlockRows <= kMaxBlockRows);

// Vectors no longer than this have no direction. Test with n <= kSmallest, so that NaN is not taken for zero.
constexpr double kSmallest = 1e-12;

// Fills inverse_norm and blocks from the anchors.
template <class T>
void prepare(const Anchors<T>& out) {
  for (int64_t r = 0; r < out.rows; ++r) {
    const T* anchor = out.anchors + out.masks[r] * out.channels;
    double square = 0;
    for (int64_t c = 0; c < out.channels; ++c) square += static_cast<double>(anchor[c]) * anchor[c];
    const T norm = static_cast<T>(std::sqrt(square));
    out.inverse_norm[r] = norm <= static_cast<T>(kSmallest) ? 0 : 1 / norm;
    T* block = out.blocks + r / kBlockRows * kBlockRows * out.channels + r % kBlockRows;
    for (int64_t c = 0; c < out.channels; ++c) block[c * kBlockRows] = anchor[c] * out.inverse_norm[r];
  }
}

// out[r, c] = scale * unit anchor
template <class T>
void directions(const Anchors<T>& anchors, T scale,
                T* out) {  // [channels / kBlockRows, rows, kBlockRows], as the matrix product reads them
  for (int64_t r = 0; r < anchors.rows; ++r) {
    const T* anchor = anchors.anchors + anchors.masks[r] * anchors.channels;
    const T factor = scale * anchors.inverse_norm[r];
    for (int64_t c = 0; c < anchors.channels; ++c)
      out[(c / kBlockRows * anchors.rows + r) * kBlockRows + c % kBlockRows] = anchor[c] * factor;
  }
}

// The anchors' gradient from the moments: summed over blocks, projected away from the anchor, and divided by its norm.
// Rows of masks that are empty are left as they are, and all where there are no blocks: a rank without images has
// anchors of other ranks.
template <class T>
void project(const Anchors<T>& anchors,
             T* moments,  // [blocks, block_stride], of which [channels, padded rows] is used; the first becomes the sum
             int64_t blocks, int64_t block_stride,
             T* gradient) {  // [masks, channels]
  if (blocks == 0) return;
  const int64_t channels = anchors.channels, width = padded_rows(anchors.rows), size = channels * width;
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < size; ++i) moments[i] += moments[b * block_stride + i];
  for (int64_t r = 0; r < anchors.rows; ++r) {
    T* out = gradient + anchors.masks[r] * channels;
    const T* anchor = anchors.anchors + anchors.masks[r] * channels;
    const T inverse = anchors.inverse_norm[r];
    double along = 0;
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = moments[c * width + r];
      along += static_cast<double>(out[c]) * (anchor[c] * inverse);
    }
    for (int64_t c = 0; c < channels; ++c) out[c] = (out[c] - static_cast<T>(along) * (anchor[c] * inverse)) * inverse;
  }
}

}  // namespace SEA_ISA
}  // namespace sea
