// Cosines between every pixel and every anchor, for anchor_cosine; the gradients are those of distance.cuh and
// backward.cuh. Computed from float32 or float64, whatever the maps are.
#pragma once
#include "backward.cuh"

namespace sea {

template <class T>
struct CosineParams {
  Pyramid pyramid;  // `gradient` is where the cosines go, [batch, masks, height, width]
  Masks masks;
  Panel panel;
  const T* anchors;  // [levels, masks, channels]
};

// Unit anchors from anchors. Grid: masks, pairs.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) prepare(const __grid_constant__ CosineParams<T> params) {
  const Pair& pair = params.pyramid.pairs[blockIdx.y];
  const int64_t masks = params.masks.masks, mask = blockIdx.x, channels = pair.student.channels, pitch = pair.pitch();
  const T* anchor = params.anchors + (pair.level * masks + mask) * channels;
  const bool empty = !(params.masks.area[pair.level * masks + mask] > 0);
  double square = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kFinishThreads) square += static_cast<double>(anchor[c]) * anchor[c];
  square = sum_over_block(square, reinterpret_cast<double*>(shared_memory()));
  const T inverse = empty ? T(0) : inverse_or_zero(static_cast<T>(sqrt(square)));
  for (int64_t c = threadIdx.x; c < pitch; c += kFinishThreads)
    write_unit(static_cast<T*>(pair.units), masks, pitch, mask, c, c < channels && !empty ? anchor[c] * inverse : T(0));
  if (threadIdx.x == 0) static_cast<T*>(pair.inverse_norm)[mask] = inverse;
}

// Grid: slices.
template <class T>
__global__ void __launch_bounds__(kDistanceThreads, 1) cosine(const __grid_constant__ CosineParams<T> params) {
  Distances<T> d(params.pyramid, params.masks, params.panel, 1, true);
  const auto work = [&](int64_t t) {
    d.each_chunk(
        t, 0, d.chunks, T(1), [] {},
        [&](int p0, int rows) {
          const Map& out = d.pair().gradient;
          for (int i = threadIdx.x; i < rows * d.kPixels; i += kDistanceThreads) {
            const int row = i / d.kPixels, u = i % d.kPixels;
            if (u < d.at.count && p0 + row < d.count)
              static_cast<T*>(out.data)[offset_of(out, d.at.image, p0 + row, d.at.first + u)] =
                  d.memory.valid[row] ? *d.cosine(0, u, row) : T(0);
          }
        });
  };
  d.each_tile(work, [] {});
}

}  // namespace sea
