// Pooling: masked sums of all maps, and in the same pass over memory the online softmax of the box maps.
//
// pool(): a block takes one slice of the tiles, for kPoolChannels channels; a thread has one channel and walks over the
// pixels. It sums runs of pixels with the same masks, and adds the sum of each run to every mask of the run. The sums
// of some masks at a time are rows in shared memory, so that global memory is written once for many tiles.
// pool_finish() adds up the slices: the means one mask at a time, the softmax 256 channels at a time.
#pragma once
#include "anchors.cuh"
#include "softmax.cuh"

namespace sea {

constexpr int kPoolChannels = 128, kPoolThreads = kPoolChannels;
constexpr int kPoolListed = 1024;  // masks of the runs of a tile
template <class X>
constexpr int kPoolPixels = 128 / sizeof(X);

// Which masks have a row of sums in shared memory.
struct Rows {
  static constexpr int kNone = 255, kMost = 40;
  int32_t* used;     // [1]
  int32_t* flush;    // [1] the rows must be written out first, to make room for new masks
  int32_t* mask_of;  // [room]
  uint8_t* row_of;   // [kPoolListed] of each mask that TileMasks lists
  int room;

  __host__ __device__ Rows(Carver& carver, int room_) : room(room_) {
    used = carver.take<int32_t>(1);
    flush = carver.take<int32_t>(1);
    mask_of = carver.take<int32_t>(room);
    row_of = carver.take<uint8_t>(kPoolListed);
  }

  // One warp: gives a row to each listed mask that has none. If there are not enough rows, it sets `flush`, or with
  // `anyway` leaves the last masks without one.
  __device__ void assign(const TileMasks& masks, bool anyway) {
    const int lane = threadIdx.x, count = min(*masks.listed, masks.room);
    int next = *used;
    bool full = false;
    for (int i = lane; i - lane < count; i += 32) {
      const int mask = i < count ? masks.masks[i] : -1;
      int row = kNone;
      for (int r = 0; r < next; ++r) row = mask_of[r] == mask ? r : row;
      uint32_t missing;
      while ((missing = __ballot_sync(kAllLanes, mask >= 0 && row == kNone)) != 0 && next < room) {
        const int added = __shfl_sync(kAllLanes, mask, __ffs(missing) - 1);
        if (mask == added) row = next;
        if (lane == 0) mask_of[next] = added;
        ++next;
      }
      __syncwarp();
      full |= missing != 0;
      if (i < count) row_of[i] = static_cast<uint8_t>(row);
    }
    if (lane == 0) {
      *used = next;
      *flush = full && !anyway;
    }
  }
};

// The sums of student and teacher.
template <class T>
struct alignas(2 * sizeof(T)) Both {
  T of[2];
};

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

template <class X>
struct PoolMemory {
  using T = Compute<X>;
  static constexpr int kTile = kPoolChannels * kPoolPixels<X>;  // elements
  X* tiles;                                                     // [2 stages, 2 sides, kTile]
  Both<T>* sums;                                                // [rows, kPoolChannels]
  TileMasks masks;
  Rows rows;

  __host__ __device__ PoolMemory(Carver& carver, int room)
      : tiles(carver.take<X>(4 * kTile)),
        sums(carver.take<Both<T>>(room * kPoolChannels)),
        masks(carver, kPoolPixels<X>, kPoolListed),
        rows(carver, room) {}
  __device__ X* tile(int stage, int side) const { return tiles + (2 * stage + side) * kTile; }
};

// What pool() and backward() do for the tiles of a pair.
inline TileWork pool_work(const Pair& pair) {
  const double tile = (pair.losses & kLocalization ? 7 : 4) * moving_cost(pair.student, 1.5, 2);
  return {static_cast<int32_t>(tile * static_cast<double>(pair.channels)), static_cast<int32_t>(24 * pair.channels)};
}

struct PoolEntry : Entry {
  TileMap maps[2];  // student, teacher

  PoolEntry() = default;
  explicit PoolEntry(const Pair& pair) : Entry(pair), maps{TileMap(pair.student), TileMap(pair.teacher)} {}
};

template <class T>
struct PoolParams {
  Pyramid<PoolEntry> pyramid;
  Masks masks;
  int rows;    // of sums in shared memory
  int sides;   // 1: the students alone
  T scale;     // of the localization's Exponential
  T* sums;     // [slices + entries, sides, masks, max_channels]
  T* softmax;  // [slices + entries * batch, 5, max_channels] OnlineSoftmax
};

// Grid: slices, blocks of channels.
template <class X>
__global__ void __launch_bounds__(kPoolThreads, 2) pool(const __grid_constant__ PoolParams<Compute<X>> params) {
  using T = Compute<X>;
  constexpr int kPixels = kPoolPixels<X>, kStep = Packed<X>::kSize;
  const Pyramid<PoolEntry>& pyramid = params.pyramid;
  const int count = present_masks(params.masks), thread = threadIdx.x;
  Carver carver(shared_memory());
  PoolMemory<X> memory(carver, params.rows);
  TileMasks& masks = memory.masks;
  Rows& rows = memory.rows;
  masks.count = (count + 31) / 32;
  const int64_t slice = blockIdx.x, c0 = static_cast<int64_t>(blockIdx.y) * kPoolChannels;
  const int64_t begin = first_tile(pyramid, slice), end = first_tile(pyramid, slice + 1);
  const int64_t max_channels = pyramid.max_channels;

  const auto channels_of = [&](const Entry& entry) { return part_of(entry.channels - c0, kPoolChannels); };
  WorkTile next{}, at{};
  const auto load = [&](int64_t tile, int stage) {
    next.seek(pyramid, tile, kPixels);
    const PoolEntry& entry = pyramid.entries[next.entry];
    const int channels = channels_of(entry);
#pragma unroll 1
    for (int side = 0; channels > 0 && side < params.sides; ++side)
      load_tile(memory.tile(stage, side), entry.maps[side], next.image, next.first, next.count, kPixels, c0, channels,
                kPoolChannels, kPoolThreads);
    copy_async_commit();
  };

  OnlineSoftmax<X> softmax;
  int entry_index = -1;
  int image = -1;
  const auto sums_of = [&](int side, int mask) {  // [max_channels]
    return params.sums + (((slice + entry_index) * params.sides + side) * params.masks.masks + mask) * max_channels +
           c0;
  };
  const auto write_rows = [&] {  // each thread its own channel
    if (thread >= channels_of(pyramid.entries[entry_index])) return;
    constexpr int kBatch = 4;  // loads under way at once
    for (int first = 0; first < *rows.used; first += kBatch)
      for (int side = 0; side < params.sides; ++side) {
        T sum[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (first + k < *rows.used) sum[k] = sums_of(side, rows.mask_of[first + k])[thread];
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (first + k < *rows.used)
            sums_of(side, rows.mask_of[first + k])[thread] =
                sum[k] + memory.sums[(first + k) * kPoolChannels + thread].of[side];
      }
  };
  const auto clear_rows = [&] {  // between barriers
    for (int row = 0; row < rows.room; ++row) memory.sums[row * kPoolChannels + thread] = {};
    if (thread == 0) *rows.used = 0;
  };
  const auto leave_image = [&] {
    const Entry& entry = pyramid.entries[entry_index];
    if (entry.losses & kLocalization && thread < channels_of(entry))
      softmax.write(params.softmax +
                        (slice + entry_index * pyramid.batch + image) * OnlineSoftmax<X>::kSize * max_channels + c0 +
                        thread,
                    max_channels);
    softmax = {};
  };
  const auto leave_entry = [&] {
    if (pyramid.entries[entry_index].losses & (kAnchor | kDistance)) write_rows();
  };

  if (begin < end) load(begin, 0);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int stage = static_cast<int>(tile - begin) % 2;
    if (tile + 1 < end) load(tile + 1, 1 - stage);
    at.seek(pyramid, tile, kPixels);
    if (entry_index != at.entry || image != at.image) {
      if (image >= 0) leave_image();
      image = at.image;
    }
    const PoolEntry& entry = pyramid.entries[at.entry];
    const int channels = channels_of(entry);
    const bool pools = entry.losses & (kAnchor | kDistance), mine = thread < channels;
    const Tile<X> student = make_tile(memory.tile(stage, 0), entry.maps[0], kPixels, kPoolChannels),
                  teacher = make_tile(memory.tile(stage, 1), entry.maps[1], kPixels, kPoolChannels);
    if (entry_index != at.entry) {
      if (entry_index >= 0) leave_entry();
      entry_index = at.entry;
      __syncthreads();
      clear_rows();
      if (pools && mine)
        for (int side = 0; side < params.sides; ++side)
          for (int p = 0; p < count; ++p) sums_of(side, p)[thread] = 0;
    }
    masks.load(params.masks, entry, at);
    __syncthreads();
    if (pools && thread < 32) rows.assign(masks, false);
    if (tile + 1 < end)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncthreads();
    if (pools && *rows.flush) {
      write_rows();
      __syncthreads();
      clear_rows();
      __syncthreads();
      if (thread < 32) rows.assign(masks, true);
      __syncthreads();
    }
    if (mine) {
      const bool localizes = entry.losses & kLocalization, both = params.sides == 2;
      if (localizes) softmax.rescale(student, teacher, masks, at.count, thread, params.scale);
      RunCursor runs(masks);
      T sum[2] = {0, 0};
      for (int u = 0; u < at.count; u += kStep) {
        T x[2][kStep];
        read_pixels(student, thread, u, x[0]);
        if (both) read_pixels(teacher, thread, u, x[1]);
        if (localizes)
          each_set<kStep>(masks.inside<kStep>(u), [&](int k) { softmax.add(x[0][k], x[1][k], params.scale); });
        if (!pools) continue;
        runs.advance<kStep>(
            u,
            [&](uint32_t pixels) {
              sum[0] += sum_set(pixels, x[0]);
              if (both) sum[1] += sum_set(pixels, x[1]);
            },
            [&](int run) {
              masks.each(run, [&](int mask, int i) {
                const int row = i < 0 ? Rows::kNone : rows.row_of[i];
                if (row != Rows::kNone) {
                  Both<T> all = memory.sums[row * kPoolChannels + thread];
                  all.of[0] += sum[0];
                  all.of[1] += sum[1];
                  memory.sums[row * kPoolChannels + thread] = all;
                } else {
                  T *student = sums_of(0, mask) + thread, *teacher = sums_of(params.sides - 1, mask) + thread;
                  const T before[2] = {*student, *teacher};
                  *teacher = before[1] + sum[1];
                  *student = before[0] + sum[0];
                }
              });
              sum[0] = sum[1] = 0;
            });
      }
    }
    __syncthreads();
  }
  if (entry_index >= 0) {
    leave_image();
    leave_entry();
  }
}

struct PoolFinishEntry : Entry {
  void* anchors[2];            // T [masks, anchor_pitch]; or the difference, and null
  void* softmax;               // T [4, batch, channels]
  double* localization_terms;  // [batch, blocks of channels]
  int64_t anchor_pitch;

  PoolFinishEntry() = default;
  explicit PoolFinishEntry(const Pair& pair)
      : Entry(pair),
        anchors{pair.anchors[0], pair.anchors[1]},
        softmax(pair.softmax),
        localization_terms(pair.localization_terms),
        anchor_pitch(pair.anchor_pitch) {}
};

template <class T>
struct PoolFinishParams {
  Pyramid<PoolFinishEntry> pyramid;
  Masks masks;
  int sides;         // as in PoolParams
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
      write_means(params.pyramid, blockIdx.y, params.masks, params.sums, params.sides, blockIdx.x);
  } else if (entry.losses & kLocalization) {
    const int64_t blocks = divide_up(params.pyramid.max_channels, kAnchorThreads);
    merge_softmax<X>(params.pyramid, blockIdx.y, params.softmax, params.scale, kPoolPixels<X>, block / blocks,
                     block % blocks, reinterpret_cast<double*>(shared_memory()));
  }
}

// ---------------------------------------------------------------------------------------------------------------- host

// How many rows of sums a block has: as many as leave room for two blocks on a multiprocessor, or one if they are few.
template <class X>
int choose_rows() {
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  const int64_t limit = shared_memory_limit();
  for (const int64_t room : {(limit + kReserved) / 2 - kReserved, limit})
    for (int rows = Rows::kMost; rows >= 8; --rows)
      if (bytes_of<PoolMemory<X>>(rows) <= room) return rows;
  throw std::runtime_error("sea_kernels: this GPU has too little shared memory to pool");
}

// Pools the maps of one launch, of both sides or of the students. The means go to the pairs' anchors; pairs without any
// get them where the sums were. scale: of the localization's Exponential. A counting Carver launches nothing.
template <class X>
void run_pool(std::vector<Pair>& pairs, const Masks& masks, int sides, Compute<X> scale, int slices, Carver& scratch,
              cudaStream_t stream) {
  using T = Compute<X>;
  const auto all = [](const Pair&) { return true; };
  PoolParams<T> params{make_pyramid<PoolEntry>(pairs, kPoolPixels<X>, slices, all, pool_work), masks, choose_rows<X>(),
                       sides, scale};
  const auto& pyramid = params.pyramid;
  const int64_t table = masks.masks * pyramid.max_channels;
  const bool softmax = std::any_of(pairs.begin(), pairs.end(), [](const Pair& p) { return p.losses & kLocalization; });
  params.sums = scratch.take<T>((pyramid.slices + pyramid.count) * sides * table);
  params.softmax = scratch.take<T>(
      softmax ? (pyramid.slices + pyramid.count * pyramid.batch) * OnlineSoftmax<X>::kSize * pyramid.max_channels : 0);
  if (scratch.counts()) return;
  for (size_t i = 0; i < pairs.size(); ++i)
    if (pairs[i].losses & (kAnchor | kDistance) && !pairs[i].anchors[0]) {
      const int64_t slice = slice_of(pyramid, static_cast<int64_t>(i), pyramid.entries[i].first_tile);
      for (int side = 0; side < (pairs[i].losses & kDistance ? 2 : 1); ++side)
        pairs[i].anchors[side] = params.sums + ((slice + static_cast<int64_t>(i)) * sides + side) * table;
      pairs[i].anchor_pitch = pyramid.max_channels;
    }
  const PoolFinishParams<T> finish{make_pyramid<PoolFinishEntry>(pairs, kPoolPixels<X>, slices, all, pool_work),
                                   masks,
                                   sides,
                                   scale,
                                   params.sums,
                                   params.softmax};

  const dim3 grid(pyramid.slices, static_cast<unsigned>(divide_up(pyramid.max_channels, kPoolChannels)));
  launch(pool<X>, "pool", grid, kPoolThreads, bytes_of<PoolMemory<X>>(params.rows), stream, params);
  const int64_t blocks = softmax ? pyramid.batch * divide_up(pyramid.max_channels, kAnchorThreads) : 0;
  launch(pool_finish<X>, "pool_finish", dim3(static_cast<unsigned>(masks.masks + blocks), pyramid.count),
         kAnchorThreads, kReduceBytes, stream, finish);
}

}  // namespace sea
