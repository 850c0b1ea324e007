// Masked sums of features, and in the same pass the softmax over positions.
//
// A block takes an equal share of all tiles, for kPoolChannels channels; a thread has one channel and walks the pixels.
// It adds up runs of pixels that lie in the same masks, and adds a run's sum to each of its masks: to rows in shared
// memory while there are any left, which are written out when others need them.
#pragma once
#include <cuda/launch.h>

#include "softmax.cuh"

namespace sea {

constexpr int kPoolChannels = 128, kPoolThreads = kPoolChannels, kPoolRows = 16;
template <class X>
constexpr int kPoolPixels = 128 / sizeof(X);

template <class T>
struct PoolParams {
  Pyramid pyramid;
  Masks masks;
  T scale;      // of the localization's Exponential
  T* sums;      // [slices + pairs, sides, masks, most_channels]
  T* softmax;   // [slices + pairs * batch, 5, most_channels]
  int sides;    // 1: the students alone
  bool copied;  // whether the masks' words are copied to shared memory
};

// The masks of the pixels of a tile: their words, in shared memory or where they lie, and one bit a pixel.
struct TileMasks {
  const uint32_t* words;  // [words, stride]
  uint32_t* starts;       // [pixels / 32, rounded up] its masks differ from those of the pixel before
  uint32_t* inner;        // as starts: it lies inside the image
  uint32_t* counts;       // as starts: it lies in a mask
  uint32_t* copy;         // [words, pixels]; null: words are read where they lie
  int count, pixels;
  int64_t stride;

  static __host__ __device__ int64_t bytes(int64_t masks, int pixels) {
    return (divide_up(masks, 32) * pixels + 3 * divide_up(pixels, 32)) * 4;
  }

  // memory: bytes() long, where the words are not copied bytes(0) long
  __device__ TileMasks(unsigned char* memory, int words_, int pixels_, bool copied)
      : starts(reinterpret_cast<uint32_t*>(memory)), count(words_), pixels(pixels_) {
    inner = starts + (pixels + 31) / 32;
    counts = inner + (pixels + 31) / 32;
    copy = copied ? counts + (pixels + 31) / 32 : nullptr;
  }

  // All threads, at least `pixels` of them in whole warps; a barrier has to follow.
  __device__ void load(const Masks& masks, const Pair& pair, const Cursor& at) {
    const int u = threadIdx.x, lane = u % 32;
    const uint32_t* bits = count == 0 ? nullptr : masks.bits + pair.first_pixel + at.image * pair.image() + at.first;
    words = copy ? copy : bits;
    stride = copy ? pixels : masks.pixels;
    if (u >= (pixels + 31) / 32 * 32) return;
    bool differs = u == 0;
    uint32_t any = 0;
    for (int w = 0; w < count; ++w) {
      const uint32_t word = u < at.count ? bits[w * masks.pixels + u] : 0;
      uint32_t before = __shfl_up_sync(kAllLanes, word, 1);
      if (lane == 0 && u > 0 && u <= at.count) before = bits[w * masks.pixels + u - 1];
      if (copy && u < pixels) copy[w * pixels + u] = word;
      differs |= word != before;
      any |= word;
    }
    const uint32_t start = __ballot_sync(kAllLanes, differs), counted = __ballot_sync(kAllLanes, any != 0);
    const uint32_t in = __ballot_sync(kAllLanes, u < at.count && inside(masks, pair, at.image, at.first + u));
    if (lane == 0) {
      starts[u / 32] = start;
      inner[u / 32] = in;
      counts[u / 32] = counted;
    }
  }

  __device__ bool starts_at(int u) const { return starts[u / 32] >> u % 32 & 1; }
  __device__ bool inside_at(int u) const { return inner[u / 32] >> u % 32 & 1; }
  __device__ bool counts_at(int u) const { return counts[u / 32] >> u % 32 & 1; }

  // Calls f(mask) for the masks of a pixel.
  template <class F>
  __device__ void each(int u, F f) const {
    for (int w = 0; w < count; ++w)
      for (uint32_t word = words[w * stride + u]; word != 0; word &= word - 1) f(32 * w + __ffs(word) - 1);
  }
};

// How many masks may be not empty: those of the categories that are present. All threads must call it.
__device__ inline int present_masks(const Masks& masks) {
  if (masks.masks == 0) return 0;
  int present = 0;
  for (int k = 0; k < masks.capacity; k += blockDim.x) {
    const int mine = k + threadIdx.x;
    present += __syncthreads_count(mine < masks.capacity && masks.classes[mine] >= 0);
  }
  return 1 + 2 * present;
}

// Which rows of shared memory hold which masks' sums.
struct Rows {
  int16_t* row_of;   // [masks] -1: none; after the others
  int32_t* mask_of;  // [kPoolRows]
  int32_t* used;     // [1]
  int32_t* reset;    // [1] whether the rows must be written out first

  static __host__ __device__ int64_t bytes(int64_t masks) { return 2 * masks + 4 * kPoolRows + 8; }
  __device__ Rows(unsigned char* memory, int64_t masks) {
    used = reinterpret_cast<int32_t*>(memory);
    reset = used + 1;
    mask_of = reset + 1;
    row_of = reinterpret_cast<int16_t*>(mask_of + kPoolRows);
  }

  // One warp: gives a row to each of the tile's masks that has none. Where there are not enough, it says so and leaves
  // everything as it is; with `anyway` the last ones get none.
  __device__ void assign(const TileMasks& masks, bool anyway) {
    const int lane = threadIdx.x % 32;
    int next = *used, wanted = next;
    __syncwarp();
    for (int round = 0; round < 2; ++round) {
      for (int w = 0; w < masks.count; ++w) {
        uint32_t all = 0;
        for (int u = lane; u < masks.pixels; u += 32) all |= masks.words[w * masks.stride + u];
        all = __reduce_or_sync(kAllLanes, all);
        if (lane == 0)
          for (; all != 0; all &= all - 1) {
            const int mask = 32 * w + __ffs(all) - 1;
            if (row_of[mask] >= 0) continue;
            if (round == 0) ++wanted;
            if (round == 1 && next < kPoolRows) {
              row_of[mask] = static_cast<int16_t>(next);
              mask_of[next++] = mask;
            }
          }
      }
      if (__shfl_sync(kAllLanes, wanted, 0) > kPoolRows && !anyway) break;
    }
    if (lane == 0) {
      *used = next;
      *reset = wanted > kPoolRows && !anyway;
    }
  }
};

// 16 bytes' worth of pixels of one channel.
template <class X, class T>
__device__ inline void read_pixels(const Tile<X>& tile, int channel, int pixel, T (&x)[Packed<X>::kSize]) {
  if (tile.pixel_rows) {
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) x[k] = widen(*tile.matrix.at(pixel + k, channel));
  } else {
    const Packed<X> packed = *reinterpret_cast<const Packed<X>*>(tile.matrix.at(channel, pixel));
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) x[k] = widen(packed.x[k]);
  }
}

// Adds the runs of one channel to their masks. add(first pixel of the run, sum)
template <class X, class T, class F>
__device__ inline void walk(const Tile<X>& tile, const TileMasks& masks, int channel, F add) {
  constexpr int kStep = Packed<X>::kSize;
  T sum = 0;
  int run = 0;
  for (int u = 0; u < masks.pixels; u += kStep) {
    T x[kStep];
    read_pixels(tile, channel, u, x);
    const uint32_t starts = masks.starts[u / 32] >> u % 32 & ((1u << kStep) - 1);
    if (starts == 0 || (starts == 1 && u == 0)) {
      T part[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) part[k] = x[k];
#pragma unroll
      for (int width = kStep / 2; width > 0; width /= 2)
#pragma unroll
        for (int k = 0; k < width; ++k) part[k] += part[k + width];
      sum += part[0];
    } else {
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        if (starts >> k & 1 && u + k > 0) {
          add(run, sum);
          sum = 0;
          run = u + k;
        }
        sum += x[k];
      }
    }
  }
  add(run, sum);
}

template <class X>
struct PoolMemory {
  using T = Compute<X>;
  static constexpr int64_t kTile = kPoolChannels * 128;
  X* tiles;  // [2 stages, 2 sides, kTile bytes]
  T* sums;   // [2 sides, kPoolRows, kPoolChannels]
  unsigned char *tile_masks, *rows;

  static __host__ __device__ int64_t bytes(int64_t masks, bool copied) {
    return 4 * kTile + 2 * kPoolRows * kPoolChannels * sizeof(T) +
           round_up(TileMasks::bytes(copied ? masks : 0, kPoolPixels<X>), 16) + Rows::bytes(masks);
  }
  __device__ PoolMemory(int64_t masks, bool copied) {
    unsigned char* memory = shared_memory();
    tiles = reinterpret_cast<X*>(memory);
    sums = reinterpret_cast<T*>(memory + 4 * kTile);
    tile_masks = reinterpret_cast<unsigned char*>(sums + 2 * kPoolRows * kPoolChannels);
    rows = tile_masks + round_up(TileMasks::bytes(copied ? masks : 0, kPoolPixels<X>), 16);
  }
  __device__ X* tile(int stage, int side) const { return tiles + (2 * stage + side) * kTile / sizeof(X); }
};

// Grid: slices, blocks of channels.
template <class X>
__global__ void __launch_bounds__(kPoolThreads, 2) pool(const __grid_constant__ PoolParams<Compute<X>> params) {
  using T = Compute<X>;
  constexpr int kPixels = kPoolPixels<X>;
  const Pyramid& pyramid = params.pyramid;
  const int count = present_masks(params.masks), thread = threadIdx.x;
  const PoolMemory<X> memory(params.masks.masks, params.copied);
  TileMasks masks(memory.tile_masks, (count + 31) / 32, kPixels, params.copied);
  Rows rows(memory.rows, params.masks.masks);
  const int64_t slice = blockIdx.x, c0 = static_cast<int64_t>(blockIdx.y) * kPoolChannels;
  const int64_t begin = first_tile(pyramid, slice), end = first_tile(pyramid, slice + 1);
  const int64_t most = pyramid.most_channels;

  const auto channels_of = [&](const Pair& pair) { return part_of(pair.student.channels - c0, kPoolChannels); };
  Cursor next{}, at{};
  const auto load = [&](int64_t tile, int stage) {
    next.seek(pyramid, tile, kPixels);
    const Pair& pair = pyramid.pairs[next.pair];
    const int channels = channels_of(pair);
    for (int side = 0; channels > 0 && side < params.sides; ++side)
      load_tile(memory.tile(stage, side), side ? pair.teacher : pair.student, next.image, next.first, next.count,
                kPixels, c0, channels, kPoolChannels);
    copy_async_commit();
  };

  Softmax<X> softmax;
  int pair_index = -1;
  int image = -1;
  const auto sums_of = [&](int side, int mask) {  // [most_channels]
    return params.sums + (((slice + pair_index) * params.sides + side) * params.masks.masks + mask) * most + c0;
  };
  const auto write_rows = [&] {  // every thread its own channel
    const bool mine = thread < channels_of(pyramid.pairs[pair_index]);
    for (int row = 0; row < *rows.used; ++row)
      for (int side = 0; side < params.sides; ++side)
        if (mine)
          sums_of(side, rows.mask_of[row])[thread] += memory.sums[(side * kPoolRows + row) * kPoolChannels + thread];
  };
  const auto clear_rows = [&] {  // between barriers
    for (int row = 0; row < 2 * kPoolRows; ++row) memory.sums[row * kPoolChannels + thread] = 0;
    for (int p = thread; p < count; p += kPoolThreads) rows.row_of[p] = -1;
    if (thread == 0) *rows.used = 0;
  };
  const auto leave_image = [&] {
    const Pair& pair = pyramid.pairs[pair_index];
    if (pair.parts & kLocalization && thread < channels_of(pair))
      softmax.write(params.softmax + (slice + pair_index * pyramid.batch + image) * 5 * most + c0 + thread, most);
    softmax = {};
  };
  const auto leave_pair = [&] {
    if (pyramid.pairs[pair_index].parts & (kAnchor | kDistance)) write_rows();
  };

  if (begin < end) load(begin, 0);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int stage = static_cast<int>(tile - begin) % 2;
    if (tile + 1 < end) load(tile + 1, 1 - stage);
    at.seek(pyramid, tile, kPixels);
    if (pair_index != at.pair || image != at.image) {
      if (image >= 0) leave_image();
      image = at.image;
    }
    const Pair& pair = pyramid.pairs[at.pair];
    const int channels = channels_of(pair);
    const bool pools = pair.parts & (kAnchor | kDistance), mine = thread < channels;
    const Tile<X> student = make_tile(memory.tile(stage, 0), pair.student, kPixels, kPoolChannels),
                  teacher = make_tile(memory.tile(stage, 1), pair.teacher, kPixels, kPoolChannels);
    if (pair_index != at.pair) {
      if (pair_index >= 0) leave_pair();
      pair_index = at.pair;
      __syncthreads();
      clear_rows();
      if (pools && mine)
        for (int side = 0; side < params.sides; ++side)
          for (int p = 0; p < count; ++p) sums_of(side, p)[thread] = 0;
    }
    masks.load(params.masks, pair, at);
    __syncthreads();
    if (pools && thread < 32) rows.assign(masks, false);
    if (tile + 1 < end)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncthreads();
    if (pools && *rows.reset) {
      write_rows();
      __syncthreads();
      clear_rows();
      __syncthreads();
      if (thread < 32) rows.assign(masks, true);
      __syncthreads();
    }
    if (pools && mine)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (side < params.sides)
          walk<X, T>(side == 0 ? student : teacher, masks, thread, [&](int run, T sum) {
            masks.each(run, [&](int mask) {
              const int row = rows.row_of[mask];
              if (row >= 0)
                memory.sums[(side * kPoolRows + row) * kPoolChannels + thread] += sum;
              else
                sums_of(side, mask)[thread] += sum;
            });
          });
    if (pair.parts & kLocalization && mine) {
      constexpr int kStep = Packed<X>::kSize;
      T student_max = -INFINITY, teacher_max = -INFINITY, x[kStep], y[kStep];
      bool any = false;
      for (int u = 0; u < kPixels; u += kStep) {
        read_pixels(student, thread, u, x);
        read_pixels(teacher, thread, u, y);
        for (int k = 0; k < kStep; ++k)
          if (masks.inside_at(u + k)) {
            student_max = max(student_max, x[k]);
            teacher_max = max(teacher_max, y[k]);
            any = true;
          }
      }
      if (any) softmax.raise(student_max, teacher_max, params.scale);
      for (int u = 0; any && u < kPixels; u += kStep) {
        read_pixels(student, thread, u, x);
        read_pixels(teacher, thread, u, y);
        for (int k = 0; k < kStep; ++k)
          if (masks.inside_at(u + k)) softmax.add(x[k], y[k], params.scale);
      }
    }
    __syncthreads();
  }
  if (pair_index >= 0) {
    leave_image();
    leave_pair();
  }
}

// Whether the anchors are made of the sums and used at once, or written to each pair's `anchors` and no more, or read
// from there.
enum class Anchors { used, written, given };

// What the sums come to, a mask and pair at a time; and the pieces of the softmax.
template <class X>
struct PoolFinishParams {
  using T = Compute<X>;
  Pyramid pyramid;
  Masks masks;
  const T* sums;     // as in PoolParams
  const T* softmax;  // as in PoolParams
  T scale;           // as in PoolParams
  int sides;
  Anchors anchors;
  double* anchor;        // [pairs, masks] terms of the anchor loss
  double* localization;  // [pairs, batch, blocks of channels] terms of the localization loss
};

constexpr int kFinishThreads = 256;

// Norms at most this have no direction. Written n <= kSmallest, so that NaN is not taken for zero.
constexpr double kSmallest = 1e-12;

template <class T>
__device__ inline T inverse_or_zero(T norm) {
  return norm <= static_cast<T>(kSmallest) ? T(0) : 1 / norm;
}

// How many masks of a level are not empty. All threads must call it.
__device__ inline int count_masks(const Masks& masks, int level) {
  int found = 0;
  for (int p = 0; p < masks.masks; p += blockDim.x) {
    const int mine = p + threadIdx.x;
    found += __syncthreads_count(mine < masks.masks && masks.area[level * masks.masks + mine] > 0);
  }
  return found;
}

// Writes one unit anchor, in parts where the type asks for them.
template <class X, class T>
__device__ inline void write_unit(X* units,  // [parts, masks, pitch] of one side
                                  int64_t masks, int64_t pitch, int64_t mask, int64_t channel, T value) {
  X* out = units + mask * pitch + channel;
  *out = narrow<X>(value);
  if constexpr (sizeof(X) == 2) out[masks * pitch] = narrow<X>(value - widen(*out));
}

// Grid: masks, then batch * blocks of channels; pairs.
template <class X>
__global__ void __launch_bounds__(kFinishThreads, 2) pool_finish(const __grid_constant__ PoolFinishParams<X> params) {
  using T = Compute<X>;
  const Pyramid& pyramid = params.pyramid;
  const Pair& pair = pyramid.pairs[blockIdx.y];
  const int64_t masks = params.masks.masks, channels = pair.student.channels, most = pyramid.most_channels;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t per_image = divide_up(pair.image(), kPoolPixels<X>);

  if (blockIdx.x >= masks) {
    const int64_t block = blockIdx.x - masks, blocks = divide_up(most, kFinishThreads), image = block / blocks;
    if (!(pair.parts & kLocalization)) return;
    const int64_t channel = block % blocks * kFinishThreads + threadIdx.x, rows = pair.student.batch * channels;
    double term = 0;
    if (channel < channels) {
      Softmax<X> all;
      const int64_t tile = pair.first_tile + image * per_image;
      for (int64_t s = slice_of(pyramid, tile); s <= slice_of(pyramid, tile + per_image - 1); ++s) {
        Softmax<X> piece;
        piece.read(params.softmax + (s + blockIdx.y * pyramid.batch + image) * 5 * most + channel, most);
        all.merge(piece, params.scale);
      }
      T* out = static_cast<T*>(pair.softmax) + image * channels + channel;
      out[0] = all.student_max;
      out[rows] = 1 / all.student_sum;
      out[2 * rows] = all.teacher_max;
      out[3 * rows] = 1 / all.teacher_sum;
      const double temperature = 1 / (Exponential<X>::kNatural * params.scale);
      if (!all.empty()) term = all.divergence(params.scale) * temperature * temperature / static_cast<double>(rows);
    }
    term = sum_over_block(term, scratch);
    if (threadIdx.x == 0) params.localization[(blockIdx.y * pyramid.batch + image) * blocks + block % blocks] = term;
    return;
  }

  if (!(pair.parts & (kAnchor | kDistance))) return;
  const int64_t mask = blockIdx.x;
  const float area = params.masks.area[pair.level * masks + mask];
  const int64_t tiles = pair.student.batch * per_image;
  // Of either side some rows to add up, none where there is no tile, and what to divide by. What is given is one row,
  // or none: the difference lies in the student's place.
  const T* rows[2];  // [count, channels], each `step` behind the one before
  int64_t count[2], step = 0;
  T divisor = 1;
  if (params.anchors == Anchors::given) {
    for (int side = 0; side < 2; ++side) {
      count[side] = area > 0 && pair.anchors[side];
      rows[side] = count[side] ? static_cast<const T*>(pair.anchors[side]) + mask * channels : nullptr;
    }
  } else {
    const int64_t first = slice_of(pyramid, pair.first_tile), last = slice_of(pyramid, pair.first_tile + tiles - 1);
    step = params.sides * masks * most;
    divisor = max(static_cast<T>(area), T(1));
    for (int side = 0; side < 2; ++side) {
      count[side] = area > 0 && tiles > 0 && side < params.sides ? last - first + 1 : 0;
      rows[side] = params.sums + (first + blockIdx.y) * step + (side * masks + mask) * most;
    }
  }
  const auto mean = [&](int side, int64_t channel) {
    T sum = 0;
    for (int64_t i = 0; i < count[side]; ++i) sum += rows[side][i * step + channel];
    return sum / divisor;
  };
  if (params.anchors == Anchors::written) {
    for (int64_t c = threadIdx.x; c < channels; c += kFinishThreads) {
      const T student = mean(0, c), teacher = mean(1, c);
      static_cast<T*>(pair.anchors[0])[mask * channels + c] = pair.anchors[1] ? student : student - teacher;
      if (pair.anchors[1]) static_cast<T*>(pair.anchors[1])[mask * channels + c] = teacher;
    }
    return;
  }
  const int present = count_masks(params.masks, pair.level);
  // What a thread adds up it holds, up to 2,048 channels of a block; what is beyond is added up twice.
  constexpr int kHeld = 8;
  const int64_t pitch = pair.pitch();
  double error = 0, square[2] = {0, 0};
  T held[2][kHeld];
  const auto take = [&](int64_t c, T student, T teacher) {
    const T difference = student - teacher;
    if (pair.difference) static_cast<T*>(pair.difference)[mask * pitch + c] = difference;
    error += static_cast<double>(difference) * difference;
    square[0] += static_cast<double>(student) * student;
    square[1] += static_cast<double>(teacher) * teacher;
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t c = threadIdx.x + k * kFinishThreads;
    held[0][k] = c < channels ? mean(0, c) : T(0);
    held[1][k] = c < channels ? mean(1, c) : T(0);
    if (c < channels) take(c, held[0][k], held[1][k]);
  }
  for (int64_t c = threadIdx.x + kHeld * kFinishThreads; c < channels; c += kFinishThreads)
    take(c, mean(0, c), mean(1, c));
  if (pair.parts & kAnchor) {
    error = sum_over_block(error, scratch);
    const double count = static_cast<double>(present) * static_cast<double>(channels);
    if (threadIdx.x == 0) params.anchor[blockIdx.y * masks + mask] = area > 0 && count > 0 ? error / count : 0;
  }
  if (!(pair.parts & kDistance)) return;
  for (int side = 0; side < 2; ++side) {
    const T inverse = inverse_or_zero(static_cast<T>(sqrt(sum_over_block(square[side], scratch))));
    X* units = static_cast<X*>(pair.units) + side * kParts<X> * masks * pitch;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t c = threadIdx.x + k * kFinishThreads;
      if (c < pitch) write_unit(units, masks, pitch, mask, c, held[side][k] * inverse);
    }
    for (int64_t c = threadIdx.x + kHeld * kFinishThreads; c < pitch; c += kFinishThreads)
      write_unit(units, masks, pitch, mask, c, c < channels ? mean(side, c) * inverse : T(0));
    if (side == 0 && threadIdx.x == 0) static_cast<T*>(pair.inverse_norm)[mask] = inverse;
  }
}

// Launches the pooling of a pyramid, or of given anchors what follows it; `sums` and `softmax` as in PoolParams.
template <class X>
void run_pool(PoolParams<Compute<X>> params, PoolFinishParams<X> finish, cudaStream_t stream) {
  const Pyramid& pyramid = params.pyramid;
  params.copied = PoolMemory<X>::bytes(params.masks.masks, true) <= shared_memory_limit();
  const dim3 grid(pyramid.slices, static_cast<unsigned>(divide_up(pyramid.most_channels, kPoolChannels)));
  if (finish.anchors != Anchors::given)
    launch(pool<X>, "pool", grid, kPoolThreads, PoolMemory<X>::bytes(params.masks.masks, params.copied), stream,
           params);
  finish.pyramid = pyramid;
  finish.masks = params.masks;
  finish.sums = params.sums;
  finish.softmax = params.softmax;
  finish.scale = params.scale;
  finish.sides = params.sides;
  const int64_t blocks =
      finish.anchors == Anchors::given ? 0 : pyramid.batch * divide_up(pyramid.most_channels, kFinishThreads);
  launch(pool_finish<X>, "pool_finish", dim3(static_cast<unsigned>(params.masks.masks + blocks), pyramid.count),
         kFinishThreads, 32 * sizeof(double), stream, finish);
}

}  // namespace sea
