// Work in torch's thread pool: tasks, most of which are blocks of pixels. Work is cut by the size of the maps, never by
// the number of threads, so that the results do not depend on it.
#pragma once
#include <cpu/kernels.h>

#include <atomic>
#include <numeric>

#include "memory.h"

namespace sea {

// Calls f(task, scratch) for every task, with scratch of the given size. Any thread may take any task; what a task
// computes must not depend on it.
template <class T, class F>
void parallel(int64_t tasks, int64_t scratch_size, F f) {
  // No more threads than tasks: waking one takes longer than a task of a small map.
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const Buffer<T> scratch(workers * scratch_size);
  T* const first = scratch.get();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      f(task, scratch_size > 0 ? first + worker * scratch_size : nullptr);
  });
}

template <class F>
void parallel(int64_t tasks, F f) {
  parallel<float>(tasks, 0, [&](int64_t task, float*) { f(task); });
}

// Pixels of one level, counted over batch and rows; whole tiles, but for the last of a level.
struct Block {
  int64_t level, begin, end;
};

inline int64_t count_tiles(const Map& map) { return (map.pixels() + kTilePixels - 1) / kTilePixels; }

// Appends the blocks of a level, each of so many tiles.
inline void append_blocks(std::vector<Block>& blocks, int64_t level, const Map& map, int64_t tiles) {
  for (int64_t begin = 0; begin < map.pixels(); begin += tiles * kTilePixels)
    blocks.push_back({level, begin, std::min(begin + tiles * kTilePixels, map.pixels())});
}

inline std::vector<Block> make_blocks(const std::vector<Map>& levels, int64_t tiles) {
  std::vector<Block> blocks;
  for (size_t l = 0; l < levels.size(); ++l) append_blocks(blocks, l, levels[l], tiles);
  return blocks;
}

// [levels + 1] where the blocks of each level begin.
inline std::vector<int64_t> first_blocks(const std::vector<Block>& blocks, int64_t levels) {
  std::vector<int64_t> first(levels + 1, 0);
  for (const Block& block : blocks) ++first[block.level + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  return first;
}

}  // namespace sea
