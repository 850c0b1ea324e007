// distance_backward() of 16-bit maps with few anchors, on the main loop of few_anchors.cuh.
#pragma once
#include "backward.cuh"
#include "few_anchors.cuh"

namespace sea {

// kTiles: how many tiles at a time. count: of the anchors.
template <class X, int kTiles>
__device__ inline void backward_of_few(const DistanceBackwardParams<float>& params, int count) {
  using Loop = FewAnchors<X, DistanceBackwardEntry, kTiles>;
  Loop loop(params.pyramid, params.masks, params.block, count);
  const float scale = params.upstream.distance_exponent;
  const auto work = [&] {
    typename Loop::Cosines z;
    float inverse[2], shift[2];
    bool valid[2];
    const WorkTile& own = loop.at(loop.first() / loop.kM);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int u = loop.pixel(i);
      valid[i] = loop.valid(u);
      shift[i] = valid[i] ? saved_softmax<X>(loop.entry(), own, u % loop.kM)[loop.side()] : 0;
    }
    loop.find_cosines(z, inverse, scale);
    // The saved shifts come from forward's cosines, which were rounded differently. Divided by its own sum, the softmax
    // of each side adds up to 1, and so the coefficients add up to 0.
    float sum[2] = {};
    loop.each_column_pair([&](int j, int) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        z[j][i] -= shift[i / 2];
        sum[i / 2] += exp2_approximate(z[j][i]);
      }
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = sum_over_lanes<4>(sum[i]);
    loop.write_partial(kExponentials, sum);
    if constexpr (loop.kSplit == 2) __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = 1 / loop.sum_partial(kExponentials, i, sum[i]);
    if (loop.side() == 1)
      loop.each_column_pair([&](int j, int) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          loop.exchange(j, i) =
              make_float2(exp2_approximate(z[j][2 * i]) * sum[i], exp2_approximate(z[j][2 * i + 1]) * sum[i]);
      });
    __syncthreads();
    float along[2] = {};
    if (loop.side() == 0) {
      loop.each_column_pair([&](int j, int) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 teacher = loop.exchange(j, i);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float& x = z[j][2 * i + k];
            const float e = valid[i] ? (exp2_approximate(x) * sum[i] - (k ? teacher.y : teacher.x)) * kHalfUnit : 0.f;
            along[i] += valid[i] ? e * x : 0.f;
            x = e;
          }
        }
      });
      loop.write_coefficients(z);
#pragma unroll
      for (int i = 0; i < 2; ++i) along[i] = sum_over_lanes<4>(along[i]);
      loop.write_partial(kAlong, along);
    }
    __syncthreads();
    if (loop.side() == 0 && loop.part() == 0 && loop.lane() % 4 == 0)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float factor = distance_weight(params, loop.entry(), kHalfUnit) * inverse[i];
        loop.memory.direct[loop.pixel(i)] = factor;
        loop.memory.direct[loop.kPixels + loop.pixel(i)] =
            factor * loop.sum_partial(kAlong, i, along[i]) / scale * inverse[i];
      }
    typename Loop::Directions directions{};
    loop.add_directions(directions);
    __syncthreads();  // the directions take the place of the coefficients
    const Sources<float> sources(params.upstream, params.masks, loop.entry(), loop.entry().saved);
    constexpr int kShare = loop.kM * kMaxBlockK / kMainThreads;  // pixels of a thread
    const int channels = static_cast<int>(loop.entry().channels), column = threadIdx.x % kMaxBlockK;
    const int from = threadIdx.x / kMaxBlockK * kShare;
#pragma unroll 1
    for (int half = 0; half < loop.tiles(); ++half) {
      if (half == 0)
        loop.template write_directions<0>(directions);
      else
        loop.template write_directions<kTiles - 1>(directions);
      __syncthreads();
      const WorkTile at = loop.at(half);
      const float* const factors = loop.memory.direct + half * loop.kM;
      const auto direct = [&](int u, const float (&x)[Packed<X>::kSize], float (&gradient)[Packed<X>::kSize]) {
        constexpr int kStep = Packed<X>::kSize;
        constexpr int kFour = Packed<float>::kSize;
        Packed<float> direction[kStep / kFour], along[2][kStep / kFour];
#pragma unroll
        for (int k = 0; k < kStep; k += kFour) {
          direction[k / kFour] = load_packed(loop.direction(column, u + k));
          along[0][k / kFour] = load_packed(factors + u + k);
          along[1][k / kFour] = load_packed(factors + loop.kPixels + u + k);
        }
        each_set<kStep>(loop.template valid_bits<kStep>(half, u), [&](int k) {
          const auto at = [k](const auto& packed) { return packed[k / kFour].x[k % kFour]; };
          gradient[k] += at(along[0]) * at(direction) - at(along[1]) * x[k];
        });
      };
      const auto write = [&](const Tile<X>(&tiles)[2]) {
        if (column < channels)
          sources.write(tiles, loop.masks_of(half), at, from, min(at.count, from + kShare), column, column, direct);
        __syncthreads();
        store_tile(tiles[0], loop.entry().gradient, at.image, at.first, at.count, 0, channels, kMainThreads);
      };
      const Tile<X> student = loop.tile(0, half), teacher = loop.tile(1, half);
      with_tiles({student.matrix.data, teacher.matrix.data}, student.pixel_rows, teacher.pixel_rows, loop.kM,
                 loop.block.k, write);
    }
  };
  loop.each_tile_pair([&](bool entered) { loop.begin(entered); }, work, [] {});
}

// At most kFewAnchors anchors; otherwise returns at once. Grid: slices.
template <class X>
__global__ void __launch_bounds__(kMainThreads, 1)
    distance_backward_few(const __grid_constant__ DistanceBackwardParams<float> params) {
  const int count = present_masks(params.masks);
  if (count <= kFewAnchors) backward_of_few<X, 2>(params, count);
}

// More than that, and at most kSomeAnchors; otherwise returns at once. Grid: slices.
template <class X>
__global__ void __launch_bounds__(kMainThreads, 1)
    distance_backward_some(const __grid_constant__ DistanceBackwardParams<float> params) {
  const int count = present_masks(params.masks);
  if (kFewAnchors < count && count <= kSomeAnchors) backward_of_few<X, 1>(params, count);
}

}  // namespace sea
