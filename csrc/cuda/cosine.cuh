// anchor_cosine: the cosine of every pixel with every anchor, valid pixel or not, and its gradients. It uses the main
// loop of the distance loss, and stores the cosines. In backward, their gradient takes the place of the difference of
// two softmaxes. Everything is computed from float32 or float64 copies of the tiles, whatever the dtype of the maps.
#pragma once
#include "backward.cuh"

namespace sea {

// Unit anchors from given ones. Grid: masks, entries.
template <class T>
__global__ void __launch_bounds__(kAnchorThreads) unit_anchors(const __grid_constant__ CompareParams params) {
  const CompareEntry& entry = params.pyramid.entries[blockIdx.y];
  const int64_t masks = params.masks.masks, mask = blockIdx.x;
  const bool empty = !(params.masks.area[entry.level * masks + mask] > 0);
  const T* anchor = empty ? nullptr : static_cast<const T*>(entry.anchors[0]) + mask * entry.anchor_pitch;
  const T inverse = write_unit(anchor, entry.channels, masks, entry.pitch(), mask, static_cast<T*>(entry.units),
                               reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) static_cast<T*>(entry.inverse_norm)[mask] = inverse;
}

struct CosineEntry : MainEntry {
  TileMap cosines;   // [batch, masks, height, width]; in backward their gradient
  TileMap gradient;  // of the features

  CosineEntry() = default;
  explicit CosineEntry(const Pair& pair) : MainEntry(pair), cosines(pair.cosines), gradient(pair.gradient) {}
};

template <class T>
struct CosineParams {
  Pyramid<CosineEntry> pyramid;
  Masks masks;
  BlockShape block;
  T* moments;  // [slices + entries, masks, max_channels]
};

// Grid: slices.
template <class T>
__global__ void __launch_bounds__(kMainThreads, 1) cosine(const __grid_constant__ CosineParams<T> params) {
  MainLoop<T, CosineEntry> loop(params.pyramid, params.masks, params.block, 1, true, false);
  const auto work = [&](int64_t t) {
    loop.each_chunk(
        t, 0, loop.chunks, T(1), [] {},
        [&](int p0, int rows) {
          const TileMap& out = loop.entry().cosines;
          for (int i = threadIdx.x; i < rows * loop.kM; i += kMainThreads) {
            const int row = i / loop.kM, u = i % loop.kM;
            if (u < loop.at.count && p0 + row < loop.count)
              static_cast<T*>(out.data)[out.offset_of(loop.at.image, p0 + row, loop.at.first + u)] =
                  loop.memory.absent[row] == 0 ? *loop.cosine(0, u, row) : T(0);
          }
        });
  };
  loop.each_tile(work, [] {});
}

// The gradient of the cosine of this thread's pixel with a mask.
template <class T>
__device__ inline auto cosine_gradient(const MainLoop<T, CosineEntry>& loop) {
  return [&loop](bool) {
    return [&loop](int row, int mask) {
      if (loop.memory.absent[row] != 0) return T(0);
      const TileMap& gradient = loop.entry().cosines;
      const int64_t offset = gradient.offset_of(loop.at.image, mask, loop.at.first + loop.pixel());
      return static_cast<const T*>(gradient.data)[offset];
    };
  };
}

// The gradient of the features. Grid: slices, groups.
template <class T>
__global__ void __launch_bounds__(kMainThreads, 1) cosine_backward(const __grid_constant__ CosineParams<T> params) {
  MainLoop<T, CosineEntry> loop(params.pyramid, params.masks, params.block, 1, true, false);
  backward_of_cosines(
      loop, T(1), cosine_gradient(loop), [] { return T(1); },
      [&] {
        Sources<T> none;
        none.of = &loop.entry();
        return none;
      });
}

// The moments, from which project() makes the gradient of the anchors. Grid: slices, groups, chunks.
template <class T>
__global__ void __launch_bounds__(kMainThreads, 1) cosine_moments(const __grid_constant__ CosineParams<T> params) {
  MainLoop<T, CosineEntry> loop(params.pyramid, params.masks, params.block, 1, true, false);
  const int chunk = blockIdx.z;
  if (chunk < loop.chunks) sum_moments(loop, chunk, T(1), params.moments, cosine_gradient(loop));
}

template <class T>
struct CosineProjectParams {
  Pyramid<ProjectEntry> pyramid;
  Masks masks;
  const T* moments;  // as in CosineParams
};

// Grid: masks, entries.
template <class T>
__global__ void __launch_bounds__(kAnchorThreads)
    cosine_project(const __grid_constant__ CosineProjectParams<T> params) {
  project<T>(params.pyramid, blockIdx.y, params.masks, blockIdx.x, params.moments, T(1), T(1),
             reinterpret_cast<T*>(shared_memory()));
}

// ---------------------------------------------------------------------------------------------------------------- host

// pairs: the features as students, with cosines and with anchors [masks, channels]; for backward also with
// anchor_gradient [masks, channels]. Forward writes the cosines. Backward (if the pairs have gradients) reads the
// gradient of the cosines from the same place. A counting Carver launches nothing.
template <class T>
void run_cosine(std::vector<Pair> all_pairs, const Masks& masks, int slices, bool backward, Carver& scratch,
                cudaStream_t stream) {
  each_launch(all_pairs, [&](std::vector<Pair> pairs) {
    scratch.rewind(0);
    for (Pair& pair : pairs) {
      pair.units = scratch.take<T>(masks.masks * pair.pitch());
      pair.inverse_norm = scratch.take<T>(masks.masks);
    }
    CosineParams<T> params{make_pyramid<CosineEntry>(pairs, kBlockM<T>, slices), masks};
    const auto& pyramid = params.pyramid;
    if (backward)
      params.moments = scratch.take<T>((pyramid.slices + pyramid.count) * masks.masks * pyramid.max_channels);
    if (scratch.counts()) return;
    const BlockShape block = params.block = choose_block<T>(masks.masks, pyramid.max_channels);
    const int64_t bytes = bytes_of<MainMemory<T>>(block);
    const dim3 per_mask(static_cast<unsigned>(masks.masks), pyramid.count);
    launch(unit_anchors<T>, "unit_anchors", per_mask, kAnchorThreads, kReduceBytes, stream,
           CompareParams{make_pyramid<CompareEntry>(pairs, kBlockM<T>, slices), masks});
    if (!backward) {
      launch(cosine<T>, "cosine", dim3(pyramid.slices), kMainThreads, bytes, stream, params);
      return;
    }
    const dim3 grid(pyramid.slices, static_cast<unsigned>(divide_up(pyramid.max_channels, block.k)),
                    static_cast<unsigned>(divide_up(masks.masks, block.n)));
    launch(cosine_backward<T>, "cosine_backward", dim3(grid.x, grid.y), kMainThreads, bytes, stream, params);
    launch(cosine_moments<T>, "cosine_moments", grid, kMainThreads, bytes, stream, params);
    launch(cosine_project<T>, "cosine_project", per_mask, kAnchorThreads, kReduceBytes, stream,
           CosineProjectParams<T>{make_pyramid<ProjectEntry>(pairs, kBlockM<T>, slices), masks, params.moments});
  });
}

}  // namespace sea
