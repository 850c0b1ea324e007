// Pooling: masked sums of all maps, and in the same pass over memory the online softmax of the box maps.
//
// pool(): a block takes one slice of the tiles, for kPoolChannels channels. It adds what a tile has of each mask in
// global memory. Only one warp adds to a sum, and a barrier stands between tiles, so the order of additions is always
// the same. No thread reads the sums, so none waits for them. For 16-bit maps, one warp lists which pixels of the tile
// each mask has. A matrix product of the pixels with twos (in the mask) and zeros then gives twice the tile's sums, and
// pool_finish() divides by 2. For other maps, each channel has a thread for each side, which sums runs of pixels with
// the same masks. For the softmax, each channel has two threads, with half of the pixels each.
//
// pool_finish() adds up the slices: the means one mask at a time, the softmax 256 channels at a time.
#pragma once
#include "anchors.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace sea {

constexpr int kPoolChannels = 128, kPoolThreads = 2 * kPoolChannels;
constexpr int kPoolBlocks = 3;     // of a multiprocessor
constexpr int kPoolListed = 1024;  // masks of the runs of a tile
template <class X>
constexpr int kPoolMasks = sizeof(X) == 2 ? 256 : 0;  // how many masks of a tile fit in the list
template <class X>
constexpr int kPoolPixels = 128 / sizeof(X);
static_assert((1 << kStripBits) % kPoolPixels<__half> == 0);

// The sum of those elements whose bits are set. The others may be NaN.
template <int kCount, class T>
__device__ inline T sum_set(uint32_t bits, const T (&x)[kCount]) {
  if (bits == (1u << kCount) - 1) {
    T part[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) part[k] = x[k];
#pragma unroll
    for (int width = kCount / 2; width > 0; width /= 2)
#pragma unroll
      for (int k = 0; k < width; ++k) part[k] += part[k + width];
    return part[0];
  }
  T sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (bits >> k & 1) sum += x[k];
  return sum;
}

// The masks that a tile of 16-bit pixels meets, and which of its pixels each of them has. One warp lists them for all.
struct MaskPixels {
  uint2* pixels;   // [room] a bit for each pixel: 0 .. 31 in x, 32 .. 63 in y; in each, even pixels before odd ones
  int32_t* masks;  // [room] index of each listed mask; -1: padding
  int32_t* found;  // [2] length of the list, padded to a multiple of 8; the next word of the bitmasks to list
  int room;        // a multiple of 32

  __host__ __device__ MaskPixels(Carver& carver, int room_)
      : pixels(carver.take<uint2>(room_)),
        masks(carver.take<int32_t>(room_)),
        found(carver.take<int32_t>(2)),
        room(room_) {}

  // Lists the masks in the bitmasks' words from `word` on, while there is room for a whole word. count: pixels of the
  // tile. All lanes of one warp call it; a barrier has to follow.
  __device__ void list(const TileMasks& tile, int count, int word) const {
    const int lane = thread_index() % 32;
    int listed = 0;
    for (; word < tile.count && listed <= room - 32; ++word) {
      const int pixel = pixel_of(lane);
      const uint32_t* words = tile.words + word * tile.stride + pixel;
      uint32_t bits[2] = {pixel < count ? words[0] : 0,
                          32 + pixel < count ? words[32] : 0};  // 32 masks of a pixel each
      if (!__any_sync(kAllLanes, bits[0] | bits[1])) continue;
      transpose(bits[0], lane);
      transpose(bits[1], lane);
      const bool mine = bits[0] | bits[1];  // they are now the pixels of mask 32 word + lane
      const uint32_t all = __ballot_sync(kAllLanes, mine);
      const int at = listed + __popc(all & ((1u << lane) - 1));
      if (mine) pixels[at] = make_uint2(bits[0], bits[1]), masks[at] = 32 * word + lane;
      listed += __popc(all);
    }
    const int end = static_cast<int>(round_up(listed, 8));
    if (listed + lane < end) pixels[listed + lane] = make_uint2(0, 0), masks[listed + lane] = -1;
    if (lane == 0) found[0] = end, found[1] = word;
  }

  // The pixel (0 .. 31) that a bit stands for.
  static __device__ int pixel_of(int bit) { return bit % 16 * 2 + bit / 16; }

 private:
  // Transposes a matrix of 32 x 32 bits. Each lane passes its row and gets its column.
  static __device__ void transpose(uint32_t& row, int lane) {
    uint32_t left = 0x0000FFFF;  // the columns of the left half of each block
#pragma unroll
    for (int width = 16; width > 0; width /= 2, left ^= left << width) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, row, width);
      row = lane & width ? (row & ~left) | (other >> width & left) : (row & left) | (other << width & ~left);
    }
  }
};

// Adds the tiles of a 16-bit map, the student's and the teacher's, to the sums of their masks. A warp has 16 channels.
template <class X>
class MaskSums {
 public:
  // sum(table, mask): [channels] kSumScale<X> times the sums of a mask; where two sides have one table, those of the
  // student less the teacher. All lanes call it.
  template <class Sum>
  __device__ MaskSums(const Tile<X> (&tiles)[2], int sides, int tables, const MaskPixels& list, int first, int channels,
                      Sum sum) {
    static_assert(kPoolPixels<X> == 64);
    const int listed = list.found[0];
#pragma unroll 1
    for (int i = 0; i < listed; i += 8) {
      const uint2 pixels = list.pixels[i + lane_ / 4];
      pixels_[0] = pixels.x, pixels_[1] = pixels.y;
      const int masks[2] = {list.masks[i + lane_ % 4 * 2], list.masks[i + lane_ % 4 * 2 + 1]};
      const auto put = [&](int table, int mask, int row, float value) {
        if (mask >= 0 && first + row < channels) atomicAdd(sum(table, mask) + first + row, value);
      };
      float parts[2][4] = {};
      multiply(parts, tiles, sides, first);
      float all = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        all += parts[0][k] + parts[1][k];
        if (tables == 1) parts[0][k] -= parts[1][k];
      }
      if (__all_sync(kAllLanes, fabsf(all) < INFINITY)) {
#pragma unroll
        for (int table = 0; table < 2; ++table) {
          if (table == tables) break;
#pragma unroll
          for (int k = 0; k < 4; ++k) put(table, masks[k % 2], lane_ / 4 + k / 2 * 8, parts[table][k]);
        }
      } else {  // without products, in which a value that is not finite shows in all masks
#pragma unroll 1
        for (int k = 0; k < 4 * sides; ++k) {
          const int side = k / 4, row = lane_ / 4 + k / 2 % 2 * 8, column = lane_ % 4 * 2 + k % 2;
          const float one = add_each(tiles, side, first + row, column);
          const bool minus = side == tables;
          put(minus ? 0 : side, k % 2 ? masks[1] : masks[0], row, minus ? -one : one);
        }
      }
    }
  }

 private:
  const int lane_ = thread_index() % 32;
  uint32_t pixels_[2];  // those of mask lane / 4 of the 8 at hand, as bits: this lane's column of the right operand

  __device__ void multiply(float (&sums)[2][4], const Tile<X> (&tiles)[2], int sides, int first) const {
#pragma unroll 2
    for (int k = 0; k < kPoolPixels<X>; k += 16) {  // all at once would spill registers
      // A pixel's bit becomes a 2, which has a single bit in both types.
      static_assert(kSumScale<X> == 2);
      const uint32_t bits = (k < 32 ? pixels_[0] : pixels_[1]) >> lane_ % 4;
      const uint32_t chosen[2] = {bits << (14 - k % 32 / 2) & 0x40004000, bits << (10 - k % 32 / 2) & 0x40004000};
      const int low = lane_ / 8 % 2 * 8, high = lane_ / 16 * 8;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (side == sides) break;
        uint32_t x[4];
        if (tiles[side].pixel_rows)
          Blocks<true, X>(tiles[side].matrix, first, low, high, lane_).load(x, 0, k);
        else
          Blocks<false, X>(tiles[side].matrix, first, low, high, lane_).load(x, 0, k);
        multiply_add(sums[side], x, chosen, X());
      }
    }
  }

  // The sum of a channel's pixels that are in the mask of that column, times kSumScale<X>. All lanes call it.
  __device__ float add_each(const Tile<X> (&tiles)[2], int side, int channel, int column) const {
    const Tile<X> tile = tile_of(tiles, side);
    float sum = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      uint32_t bits = __shfl_sync(kAllLanes, half ? pixels_[1] : pixels_[0], 4 * column);
      for (; bits != 0; bits &= bits - 1)
        sum += widen(*tile.at(channel, 32 * half + MaskPixels::pixel_of(__ffs(static_cast<int>(bits)) - 1)));
    }
    return kSumScale<X> * sum;
  }
};

// Of pool() and backward().
template <class X>
struct PoolMemory {
  static constexpr int kTile = kPoolChannels * kPoolPixels<X>;  // elements
  X* tiles;                                                     // [2 stages, 2 sides, kTile]
  Compute<X>* softmax;                                          // [OnlineSoftmax<X>::kSize, kPoolChannels]
  TileMasks masks;
  MaskPixels list;  // only pool() uses it

  __host__ __device__ explicit PoolMemory(Carver& carver)
      : tiles(carver.take<X>(4 * kTile)),
        softmax(carver.take<Compute<X>>(OnlineSoftmax<X>::kSize * kPoolChannels)),
        masks(carver, kPoolPixels<X>, kPoolListed),
        list(carver, kPoolMasks<X>) {}
  __device__ X* tile(int stage, int side) const { return tiles + (2 * stage + side) * kTile; }
};

// The estimated work of pool() and backward(). Unit: a tenth of pool()'s work for one channel of an aligned tile
// without a softmax.
template <class X>
TileWork pool_work(const Pair& pair) {
  const double softmax = pair.losses & kLocalization ? (sizeof(X) == 2 ? 10 : 16) : 0;
  const double tile = softmax + 10 * moving_cost(pair.student, 1.3, 1.7);
  return {static_cast<int32_t>(tile * static_cast<double>(pair.channels)), static_cast<int32_t>(10 * pair.channels)};
}

struct PoolEntry : SumsEntry {
  TileMap maps[2];  // student, teacher

  PoolEntry() = default;
  explicit PoolEntry(const Pair& pair) : SumsEntry(pair), maps{TileMap(pair.student), TileMap(pair.teacher)} {}
};

template <class T>
struct PoolParams {
  Pyramid<PoolEntry> pyramid;
  Masks masks;
  int sides;   // 1: the students alone
  T scale;     // of the localization's Exponential
  T* sums;     // [tables, masks, max_channels], times kSumScale
  T* softmax;  // [softmaxes, 5, max_channels] OnlineSoftmax
};

// Grid: slices, blocks of channels.
template <class X>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    pool(const __grid_constant__ PoolParams<Compute<X>> params) {
  using T = Compute<X>;
  constexpr int kPixels = kPoolPixels<X>, kStep = Packed<X>::kSize;
  const Pyramid<PoolEntry>& pyramid = params.pyramid;
  const int count = present_masks(params.masks), channel = threadIdx.x % kPoolChannels;
  const int half = threadIdx.x / kPoolChannels;  // of the pixels; also the side
  Carver carver(shared_memory());
  PoolMemory<X> memory(carver);
  TileMasks& masks = memory.masks;
  masks.count = (count + 31) / 32;
  const int64_t slice = blockIdx.x, c0 = static_cast<int64_t>(blockIdx.y) * kPoolChannels;
  const int64_t begin = first_tile(pyramid, slice), end = first_tile(pyramid, slice + 1);
  const int64_t max_channels = pyramid.max_channels;

  const auto channels_of = [&](const Entry& entry) { return part_of(entry.channels - c0, kPoolChannels); };
  WorkTile next, at;
  const auto load = [&](int64_t tile, int stage) {
    next.seek(pyramid, tile, kPixels);
    const PoolEntry& entry = pyramid.entries[next.entry];
    const int channels = channels_of(entry);
    if (channels > 0 && half < params.sides)
      load_tile(memory.tile(stage, half), entry.maps[half], next.image, next.first, next.count, kPixels, c0, channels,
                kPoolChannels, kPoolThreads / 2);
    copy_async_commit();
  };

  OnlineSoftmax<X> softmax;
  int entry_index = -1, strip = -1;
  T* sums = nullptr;  // [entry.sides, masks, max_channels] of this slice and the current entry, from channel c0 on
  const int64_t table = params.masks.masks * max_channels;
  const auto sum_of = [&](int side, int mask) { return sums + side * table + mask * max_channels; };
  const auto leave_strip = [&] {
    const PoolEntry& entry = pyramid.entries[entry_index];
    if (!(entry.losses & kLocalization)) return;
    if (half == 1) softmax.write(memory.softmax + channel, kPoolChannels);
    __syncthreads();
    if (half == 0 && channel < channels_of(entry)) {
      OnlineSoftmax<X> other;
      other.read(memory.softmax + channel, kPoolChannels);
      softmax.merge(other);
      softmax.write(params.softmax + (entry.first_softmax + slice + strip) * OnlineSoftmax<X>::kSize * max_channels +
                        c0 + channel,
                    max_channels);
    }
    softmax = {};
  };

  if (begin < end) load(begin, 0);
  int stage = 0;
  for (int64_t tile = begin; tile < end; ++tile, stage = 1 - stage) {
    at = next;
    if (tile + 1 < end) load(tile + 1, 1 - stage);
    const PoolEntry& entry = pyramid.entries[at.entry];
    const int of_strip = (at.first >> entry.strip_bits) * static_cast<int>(entry.batch) + at.image;
    if (strip >= 0 && (entry_index != at.entry || strip != of_strip)) leave_strip();
    const bool mine = channel < channels_of(entry);
    const bool pools = entry.losses & (kAnchor | kDistance), lists = pools && sizeof(X) == 2;
    const bool entered = entry_index != at.entry;
    entry_index = at.entry;
    strip = of_strip;
    if (entered && pools) {
      sums = params.sums + entry.table(slice) * params.masks.masks * max_channels + c0;
      if (mine && half < entry.sides)
        for (int mask = 0; mask < count; ++mask) sum_of(half, mask)[channel] = 0;
    }
    masks.load(params.masks, entry, at, sizeof(X) > 2);
    if (tile + 1 < end)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    X* const data[2] = {memory.tile(stage, 0), memory.tile(stage, 1)};
    int word = 0;  // where the list goes on; past 0 only for masks that did not fit in the list before
    do {
      if (lists && threadIdx.x / 32 == 1) memory.list.list(masks, at.count, word);
      __syncthreads();
      const auto work = [&](const Tile<X>(&tiles)[2]) {
        if (entry.losses & kLocalization && mine && word == 0) {
          constexpr int kHalf = kPixels / 2;
          const int from = half * kHalf, to = min(at.count, from + kHalf);
          softmax.rescale(tiles[0], tiles[1], masks, from, to, channel, params.scale);
          for (int u = from; u < to; u += kStep) {
            T x[2][kStep];
            read_pixels(tiles[0], channel, u, x[0]);
            read_pixels(tiles[1], channel, u, x[1]);
            each_set<kStep>(masks.inside<kStep>(u), [&](int k) { softmax.add(x[0][k], x[1][k], params.scale); });
          }
        }
        if constexpr (sizeof(X) == 2) {
          const int first = thread_index() / 32 * 16, channels = channels_of(entry);
          if (lists && first < channels)
            MaskSums<X>(tiles, params.sides, entry.sides, memory.list, first, channels, sum_of);
        } else if (pools && mine && half < entry.sides) {
          const Tile<X> own = tile_of(tiles, half);
          RunCursor runs(masks);
          T sum = 0;
          for (int u = 0; u < at.count; u += kStep) {
            T x[kStep];
            read_pixels(own, channel, u, x);
            runs.advance<kStep>(
                u, [&](uint32_t pixels) { sum += sum_set(pixels, x); },
                [&](int run) {
                  masks.each(run, [&](int mask) { atomicAdd(sum_of(half, mask) + channel, sum); });
                  sum = 0;
                });
          }
        }
      };
      with_tiles(data, entry.maps[0].pixel_rows, entry.maps[1].pixel_rows, kPixels, kPoolChannels, work);
      word = lists ? memory.list.found[1] : masks.count;
      __syncthreads();
    } while (word < masks.count);
  }
  if (strip >= 0) leave_strip();
}

struct PoolFinishEntry : SumsEntry {
  void* anchors[2];            // T [masks, anchor_pitch]; or the difference, and null
  void* softmax;               // T [4, batch, channels]
  double* localization_terms;  // [batch, blocks of channels]
  int64_t anchor_pitch;

  PoolFinishEntry() = default;
  explicit PoolFinishEntry(const Pair& pair)
      : SumsEntry(pair),
        anchors{pair.anchors[0], pair.anchors[1]},
        softmax(pair.softmax),
        localization_terms(pair.localization_terms),
        anchor_pitch(pair.anchor_pitch) {}
};

template <class T>
struct PoolFinishParams {
  Pyramid<PoolFinishEntry> pyramid;
  Masks masks;
  T scale;           // as in PoolParams
  const T* sums;     // as in PoolParams
  const T* softmax;  // as in PoolParams
};

// Two jobs that share a launch, since they need the same inputs to be ready. Grid: masks, then batch * blocks of
// channels; entries.
template <class X>
__global__ void __launch_bounds__(kAnchorThreads)
    pool_finish(const __grid_constant__ PoolFinishParams<Compute<X>> params) {
  const Entry& entry = params.pyramid.entries[blockIdx.y];
  const int64_t block = static_cast<int64_t>(blockIdx.x) - params.masks.masks;
  if (block < 0) {
    if (entry.losses & (kAnchor | kDistance))
      write_means<X>(params.pyramid, blockIdx.y, params.masks, params.sums, blockIdx.x);
  } else if (entry.losses & kLocalization) {
    const int64_t blocks = divide_up(params.pyramid.max_channels, kAnchorThreads), image = block / blocks;
    if (image < entry.batch)
      merge_softmax<X>(params.pyramid, blockIdx.y, params.softmax, params.scale, kPoolPixels<X>, image, block % blocks,
                       reinterpret_cast<double*>(shared_memory()));
  }
}

// ---------------------------------------------------------------------------------------------------------------- host

// How many slices there are for kPoolBlocks blocks on each multiprocessor, if they have room, so that all run at once.
template <class X>
int pool_slices(int multiprocessors, int64_t channels) {
  constexpr int64_t kReserved = 1024;  // of each block's shared memory, by the system
  const int64_t bytes = bytes_of<PoolMemory<X>>() + kReserved;
  const int64_t room = std::clamp<int64_t>((shared_memory_limit() + kReserved) / bytes, 1, kPoolBlocks);
  return static_cast<int>(std::max<int64_t>(1, room * multiprocessors / divide_up(channels, kPoolChannels)));
}

// Pools the maps of one launch, of both sides or of the students. The means go to the pairs' anchors. scale: of the
// localization's Exponential. A counting Carver launches nothing.
template <class X>
void run_pool(const std::vector<Pair>& pairs, const Masks& masks, int sides, Compute<X> scale, int slices,
              Carver& scratch, cudaStream_t stream) {
  using T = Compute<X>;
  const auto all = [](const Pair&) { return true; };
  int64_t channels = 1;
  for (const Pair& pair : pairs) channels = std::max(channels, pair.channels);
  slices = pool_slices<X>(slices, channels);
  PoolParams<T> params{make_pyramid<PoolEntry>(pairs, kPoolPixels<X>, slices, all, pool_work<X>), masks, sides, scale};
  auto& pyramid = params.pyramid;
  const SumsSize size = place_sums<X>(pyramid, sides == 2);
  params.sums = scratch.take<T>(size.tables * masks.masks * pyramid.max_channels);
  params.softmax = scratch.take<T>(size.softmaxes * OnlineSoftmax<X>::kSize * pyramid.max_channels);
  if (scratch.counts()) return;
  PoolFinishParams<T> finish{make_pyramid<PoolFinishEntry>(pairs, kPoolPixels<X>, slices, all, pool_work<X>), masks,
                             scale, params.sums, params.softmax};
  place_sums<X>(finish.pyramid, sides == 2);
  const dim3 grid(pyramid.slices, static_cast<unsigned>(divide_up(pyramid.max_channels, kPoolChannels)));
  launch(pool<X>, "pool", grid, kPoolThreads, bytes_of<PoolMemory<X>>(), stream, params);
  const bool softmax = std::any_of(pairs.begin(), pairs.end(), [](const Pair& p) { return p.losses & kLocalization; });
  const int64_t blocks = softmax ? pyramid.batch * divide_up(pyramid.max_channels, kAnchorThreads) : 0;
  launch(pool_finish<X>, "pool_finish", dim3(static_cast<unsigned>(masks.masks + blocks), pyramid.count),
         kAnchorThreads, kReduceBytes, stream, finish);
}

// Compiled in ops/pool.cu alone, not again where the losses call it.
extern template decltype(run_pool<double>) run_pool<double>;
extern template decltype(run_pool<float>) run_pool<float>;
extern template decltype(run_pool<__half>) run_pool<__half>;
extern template decltype(run_pool<__nv_bfloat16>) run_pool<__nv_bfloat16>;

}  // namespace sea
