// How a block walks over its tiles, two at a time, in the kernels for few anchors. While it works on one pair, the next
// pair loads. Both tiles of a pair belong to the same map; the second may be missing. With more than 63 anchors there
// is room for one tile at a time, and a pair is this one tile.
#pragma once
#include "mainloop.cuh"

namespace sea {

constexpr int kFewAnchors = 63;    // of kernels that take two tiles at a time
constexpr int kSomeAnchors = 127;  // of those that take one

// Kept in shared memory, because the matrix products need the registers.
struct TilePair {
  WorkTile tile[2];  // where the second is missing, its count is 0; unused where a pair is one tile
  int tiles;         // 1 or 2
};

// The block's shape if a kernel of few anchors can run, else {0, 0}. Memory::kRows: the most rows of anchors.
template <class X, class Memory>
BlockShape choose_few_block(int64_t masks, int64_t channels) {
  if (sizeof(X) > 2 || channels > kMaxBlockK) return {0, 0};
  BlockShape block{static_cast<int>(std::min<int64_t>(round_up(masks, Memory::kRows / 4), Memory::kRows)), kMaxBlockK};
  while (block.k > 64 && block.k / 2 >= channels) block.k /= 2;
  return bytes_of<Memory>(block) <= shared_memory_limit() ? block : BlockShape{0, 0};
}

// All threads of the block call each_tile_pair(). E derives from MainEntry. Memory has
//   kTiles            // at a time, 1 or 2
//   X* tiles;         // [2 stages, 2 sides, kTiles, k * kM]
//   TilePair* pairs;  // [2 stages]
template <class X, class E, class Memory>
class TilePairs {
 public:
  static constexpr int kM = kBlockM<X>, kTiles = Memory::kTiles, kPixels = kTiles * kM;

  const Pyramid<E>& pyramid;
  const Masks& masks;
  const BlockShape block;
  // Anchors, an odd number: 1 + 2 * categories. rows: `count` rounded up to a multiple of 16, so at least one is spare.
  const int count, rows;
  Carver carver;
  Memory memory;

  __device__ TilePairs(const Pyramid<E>& pyramid_, const Masks& masks_, BlockShape block_, int count_)
      : pyramid(pyramid_),
        masks(masks_),
        block(block_),
        count(count_),
        rows(static_cast<int>(round_up(count_, 16))),
        carver(shared_memory()),
        memory(carver, block_) {}

  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int side() const { return warp() / 4; }
  __device__ int stage() const { return stage_; }
  __device__ const WorkTile& at(int half) const { return memory.pairs[stage_].tile[half]; }
  __device__ int tiles() const { return memory.pairs[stage_].tiles; }
  __device__ const E& entry() const { return pyramid.entries[at(0).entry]; }
  __device__ Tile<X> tile(int side, int half) const {
    return make_tile(tile_data(stage_, side, half), entry().maps[side], kM, block.k);
  }

  // For each pair of tiles, calls begin(whether it is the block's first pair of its map), waits at a barrier, and calls
  // work(). Calls leave() after the block's last pair of each map. work() must contain a barrier: thread 0 stores where
  // the next pair lies before it, and all threads read that after it.
  template <class Begin, class Work, class Leave>
  __device__ void each_tile_pair(Begin begin, Work work, Leave leave) {
    int64_t t = first_tile(pyramid, blockIdx.x);
    const int64_t end = first_tile(pyramid, blockIdx.x + 1);
    if (t == end) return;
    load(0, {}, t, end);
    __syncthreads();
    for (bool entered = true; t < end; stage_ = 1 - stage_) {
      begin(entered);
      copy_async_wait<0>();
      __syncthreads();
      t += tiles();
      if (t < end) load(1 - stage_, at(tiles() - 1), t, end);
      work();
      entered = t == end || memory.pairs[1 - stage_].tile[0].entry != at(0).entry;
      if (entered) leave();
    }
  }

 protected:
  // Calls f(k) for every 16 channels of the block: channels 16 k .. + 15.
  template <class F>
  __device__ void each_step(F f) const {
    constexpr int kTogether = 4;  // for fewer branches; block.k is a multiple of 64
#pragma unroll
    for (int k = 0; k < kMaxBlockK / 16; k += kTogether)
      if (16 * k < block.k)
#pragma unroll
        for (int i = 0; i < kTogether; ++i) f(k + i);
  }

 private:
  int stage_ = 0;

  __device__ X* tile_data(int stage, int side, int half) const {
    return memory.tiles + ((2 * stage + side) * kTiles + half) * block.k * kM;
  }

  // Starts to load tile t, and tile t + 1 if it belongs to the same map and comes before `end`; otherwise fills the
  // second tile with zeros. last: the tile before t, or {}.
  __device__ void load(int stage, WorkTile last, int64_t t, int64_t end) {
    constexpr int kThreads = kMainThreads / 2;
    const int side = thread_index() / kThreads;
    int tiles = 1;
#pragma unroll 1
    for (int half = 0; half < kTiles; ++half) {
      if (half < tiles)
        last.seek(pyramid, t + half, kM);
      else
        last.count = 0;
      const E& e = pyramid.entries[last.entry];
      if (half + 1 < kTiles) {
        const bool more = last.entry + 1 < pyramid.count;
        tiles = t + 1 < min(more ? pyramid.entries[last.entry + 1].first_tile : pyramid.tiles, end) ? 2 : 1;
      }
      if (threadIdx.x == 0) memory.pairs[stage].tile[half] = last;
      load_tile(tile_data(stage, side, half), e.maps[side], last.image, last.first, last.count, kM, 0,
                static_cast<int>(e.channels), block.k, kThreads);
    }
    if (threadIdx.x == 0) memory.pairs[stage].tiles = tiles;
    copy_async_commit();
  }
};

}  // namespace sea
