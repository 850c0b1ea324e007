// Stands before csrc/cuda/launch.h, and describes what a kernel's blocks have to do before the launch that is there.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../runtime.h"

#define launch launch_kernel
#include_next <cuda/launch.h>
#undef launch

namespace sea {

// Of kernels that deal out tiles: how many each column of the grid has of the maps of each level and each set of
// losses. As the pyramid itself has them, so that nothing here follows csrc: where it has become another one, this does
// not compile. count_work.py fails where a kernel that deals out tiles has none.
template <class Params>
auto describe(const Params& params, int) -> decltype(params.pyramid, void()) {
  const auto& pyramid = params.pyramid;
  std::map<std::pair<int, int>, int> kinds;
  std::vector<ptx::TileKind>& all = ptx::work.kinds;
  for (int i = 0; i < pyramid.count; ++i) {
    const auto& entry = pyramid.entries[i];
    const auto added = kinds.try_emplace({entry.losses, entry.level}, static_cast<int>(all.size()));
    if (added.second) all.push_back({entry.losses, entry.height, entry.width, std::vector<int64_t>(pyramid.slices), 0});
    ptx::TileKind& kind = all[added.first->second];
    const int64_t end = i + 1 < pyramid.count ? pyramid.entries[i + 1].first_tile : pyramid.tiles;
    kind.total += end - entry.first_tile;
    for (int64_t s = 0; s < pyramid.slices; ++s)
      kind.tiles[s] += std::max<int64_t>(
          0, std::min(first_tile(pyramid, s + 1), end) - std::max(first_tile(pyramid, s), entry.first_tile));
  }
}
template <class Params>
void describe(const Params&, ...) {}

template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  ptx::work = {};
  describe(params, 0);
  launch_kernel(kernel, name, grid, threads, shared_bytes, stream, params);
}

}  // namespace sea
