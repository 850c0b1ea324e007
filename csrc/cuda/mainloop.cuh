// The main loop of the kernels that compare pixels with anchors, but for those of few anchors (tile_pairs.cuh): tiles
// of pixels stream through shared memory, and their cosines with the unit anchors are matrix products.
//
// In the terms of a matrix product, M is pixels, N anchors and K channels. A thread block has one slice of the tiles,
// each of block M pixels. The unit anchors of the current map stay in shared memory, block N anchors and block K
// channels at a time, while the next tile loads. If there are more anchors than block N (several chunks) or more
// channels than block K (several groups), both are loaded piece by piece. A thread block writes the gradients of one
// group only, its own. It visits this group last, so that the group's tile is in shared memory when the cosines are
// complete.
//
// Each kernel passes each_chunk() a function that processes the cosines of a chunk: online softmax (distance.cuh),
// moments and directions (their gradients), or a store (cosine.cuh).
#pragma once
#include "anchors.cuh"
#include "mma.cuh"
#include "runs.cuh"

namespace sea {

constexpr int kMainThreads = 256, kMaxBlockN = 64, kMaxBlockK = 256;
constexpr int kBatch = 8;  // tiles that distance() compares with a chunk of anchors before it loads the next chunk
// Finite, and far below any cosine over a temperature: its exponential is 0. (Anchors of a chunk without others count
// until a later chunk's maximum makes their sum 0.)
constexpr float kAbsent = -8e37f;
template <class X>
constexpr int kBlockM = sizeof(X) == 2 ? 32 : 16;

// Block N and block K: the unit anchors, and their channels, that are in shared memory at once.
struct BlockShape {
  int n, k;
};

template <class X>
struct MainMemory {
  using T = Compute<X>;
  static constexpr int kM = kBlockM<X>;
  X* units;         // [2 sides, parts, n, k]
  X* tiles;         // [2 stages, 2 sides, k, kM]
  T* cosines;       // [2 sides, kM, n + 8]: without bank conflicts where 4 lanes store 2 neighbors each of 8 rows
  X* coefficients;  // [parts, kM, kMaxBlockN], after the cosines
  T* softmax;       // [kBatch, 5, kM] an OnlineSoftmax for each pixel, after the coefficients
  T* squares;       // [2 sides, shares of the channels, kM], in the place of the coefficients
  T* out;           // [kM, k + 8], in the place of all four
  double* scratch;  // [32]
  T* inverse_norm;  // [2 sides, kM] of the pixels
  T* direct;        // [2, kM] what a pixel's direction and the pixel itself are multiplied by in its gradient
  T* absent;        // [kMaxBlockN] added to an anchor's cosines: 0, or kAbsent if its mask is empty or there is none
  TileMasks masks;

  __host__ __device__ MainMemory(Carver& carver, BlockShape block)
      : units(carver.take<X>(2 * kParts<X> * block.n * block.k)),
        tiles(carver.take<X>(4 * block.k * kM)),
        masks(carver, kM, 192) {
    scratch = carver.take<double>(32);
    inverse_norm = carver.take<T>(2 * kM);
    direct = carver.take<T>(2 * kM);
    absent = carver.take<T>(kMaxBlockN);
    const int64_t start = carver.used();
    cosines = carver.take<T>(2 * kM * (block.n + 8));
    const int64_t after = carver.used();
    coefficients = carver.take<X>(kParts<X> * kM * kMaxBlockN);
    softmax = carver.take<T>(kBatch * 5 * kM);
    carver.rewind(after);
    squares = carver.take<T>(2 * kMainThreads);
    carver.rewind(start);
    out = carver.take<T>(kM * (block.k + 8));
  }
};

// The largest block for which shared memory has room.
template <class X>
BlockShape choose_block(int64_t masks, int64_t channels) {
  for (int k = kMaxBlockK; k >= 64; k /= 2)
    for (int n = kMaxBlockN; n >= 16; n /= 2) {
      const bool wider = k > 64 && k / 2 >= channels, taller = n > 16 && n / 2 >= masks;
      if (!wider && !taller && bytes_of<MainMemory<X>>(BlockShape{n, k}) <= shared_memory_limit()) return {n, k};
    }
  throw std::runtime_error("sea_kernels: this GPU has too little shared memory for the distances");
}

// What the moments' coefficients are stored in: they are not bounded, and float16 would overflow.
template <class X>
using Wide = std::conditional_t<std::is_same_v<X, __half>, __nv_bfloat16, X>;

// An entry of the kernels that use the main loop.
struct MainEntry : Entry {
  TileMap maps[2];    // student, teacher; of one side: the features
  const void* units;  // X [sides, parts, masks, pitch]

  MainEntry() = default;
  explicit MainEntry(const Pair& pair)
      : Entry(pair), maps{TileMap(pair.student), TileMap(pair.teacher)}, units(pair.units) {}
};

constexpr int kMainWarps = kMainThreads / 32;
// A warp's channels in products with all channels of a block: 16 of every kStepK.
constexpr int kStepK = 16 * kMainWarps, kTilesK = kMaxBlockK / kStepK;

// Writes the block's moments (anchors 16 m .. + 15, channels 16 warp + kStepK n .. + 15) and sets them to zero.
template <class T>
__device__ inline void write_moments(T (&moments)[kMaxBlockN / 16][kTilesK][2][4],
                                     T* out,  // [rows, columns], rows `pitch` apart
                                     int64_t pitch, int rows, int columns) {
  const int first = 16 * (thread_index() / 32);
#pragma unroll
  for (int m = 0; m < kMaxBlockN / 16; ++m)
#pragma unroll
    for (int n = 0; n < kTilesK; ++n)
      each(moments[m][n], [&](int row, int column, T& value) {
        const int p = 16 * m + row, c = first + kStepK * n + column;
        if (p < rows && c < columns) out[p * pitch + c] = value;
        value = 0;
      });
}

// All methods are called by all threads of the block. E derives from MainEntry.
template <class X, class E>
class MainLoop {
 public:
  using T = Compute<X>;
  static constexpr int kWarps = kMainWarps, kM = kBlockM<X>, kRowTiles = kM / 16, kLanes = kMainThreads / kM;
  // For work that is done pixel by pixel, kLanes neighboring threads share a pixel. For 16-bit types a warp has every
  // other one of 8 pixels, because neighbors share banks in the cosines and coefficients.
  __device__ int pixel() const {
    if constexpr (sizeof(X) == 2)
      return warp() / 2 * 8 + thread_index() % 32 / kLanes * 2 + warp() % 2;
    else
      return thread_index() / kLanes;
  }
  __device__ int lane() const { return thread_index() % kLanes; }
  __device__ int warp() const { return thread_index() / 32; }

  const Pyramid<E>& pyramid;
  const Masks& masks;
  const BlockShape block;
  const int sides;
  const bool everywhere;  // for every pixel and every anchor, not only for valid pixels and categories present
  const bool lists;       // of the masks of a tile's runs
  Carver carver;
  MainMemory<X> memory;
  int count, chunks, groups, own;  // anchors; own: the group whose gradients this block writes
  int64_t begin, end;              // the tiles that each_tile() visits: at first all of the slice
  WorkTile at{};
  Tile<X> tile[2];  // student, teacher; of one side, twice the same

  __device__ MainLoop(const Pyramid<E>& pyramid_, const Masks& masks_, BlockShape block_, int sides_, bool everywhere_,
                      bool lists_)
      : pyramid(pyramid_),
        masks(masks_),
        block(block_),
        sides(sides_),
        everywhere(everywhere_),
        lists(lists_),
        carver(shared_memory()),
        memory(carver, block_) {
    const int present = present_masks(masks);
    count = everywhere ? masks.masks : present;
    memory.masks.count = (present + 31) / 32;
    chunks = (count + block.n - 1) / block.n;
    groups = static_cast<int>(divide_up(pyramid.max_channels, block.k));
    own = blockIdx.y;
    begin = slice_begin();
    end = slice_end();
  }

  __device__ int64_t slice_begin() const { return first_tile(pyramid, blockIdx.x); }
  __device__ int64_t slice_end() const { return first_tile(pyramid, blockIdx.x + 1); }
  __device__ const E& entry() const { return pyramid.entries[at.entry]; }
  __device__ int64_t own_channel() const { return static_cast<int64_t>(own) * block.k; }
  __device__ int own_channels() const { return channels_of(entry(), own); }
  __device__ bool valid(int u) const { return everywhere ? u < at.count : memory.masks.valid_at(u); }
  // Of the pixels u .. u + kStep - 1, of which at least one is in the tile, as bits.
  template <int kStep>
  __device__ uint32_t valid_bits(int u) const {
    constexpr uint32_t kAll = (1u << kStep) - 1;
    return everywhere ? kAll >> (kStep - part_of(at.count - u, kStep)) : memory.masks.valid[u / 32] >> u % 32 & kAll;
  }
  // Where this block stores what it sums up over the tiles of the current entry.
  __device__ int64_t partial() const { return blockIdx.x + at.entry; }

  // Calls work(tile) for each tile of the block, and leave() after the last one of each entry. work calls each_chunk()
  // exactly once.
  template <class Work, class Leave>
  __device__ void each_tile(Work work, Leave leave) {
    step_ = 0;
    at = next_ = {};
    if (begin < end) load(0, begin, group_at(0));
    for (int64_t t = begin; t < end; ++t) {
      WorkTile next = at;
      next.seek(pyramid, t, kM);
      if (t > begin && next.entry != at.entry) leave();
      at = next;
      memory.masks.load(masks, entry(), at, lists);
      work(t);
      __syncthreads();
    }
    if (begin < end) leave();
  }

  // Calls work(first mask, masks rounded up to 16) for the chunks first .. last - 1, with the cosines times `scale` in
  // memory. Calls ready() before that, as soon as the tile of the own group is in memory, where it stays. No barrier
  // follows the last work().
  template <class Ready, class Work>
  __device__ void each_chunk(int64_t t, int first, int last, T scale, Ready ready, Work work) {
    for (int chunk = first; chunk < last; ++chunk) {
      const int p0 = chunk * block.n, rows = static_cast<int>(round_up(part_of(count - p0, block.n), 16));
      T products[kRowTiles][1][2][4] = {};
      Squares squares{};
      for (int i = 0; i < groups; ++i) {
        const int group = group_at(i);
        if (groups > 1 || chunk == first) consumer_wait(t, chunk + 1 < last, i);
        load_units(chunk, group, rows);
        if (chunk == first && i + 1 == groups) ready();
        if (chunk == first) add_squares(squares);
        multiply_units(products, rows);
      }
      if (chunk == first) write_norms(squares);
      __syncthreads();
      write_cosines(products, rows, scale);
      __syncthreads();
      work(p0, rows);
      if (chunk + 1 < last) __syncthreads();
    }
  }

  __device__ T* cosine(int side, int u, int row) const {
    return memory.cosines + (side * kM + u) * (block.n + 8) + row;
  }

  // A thread has its pixel's rows in pairs. Calls f(row, k) for its k-th pair, row and row + 1. (`rows` is a multiple
  // of 16, so of 8 lanes each has a pair.)
  static constexpr int kOwnPairs = kMaxBlockN / (2 * kLanes);
  template <class F>
  __device__ void each_row_pair(int rows, F f) const {
#pragma unroll
    for (int k = 0; k < kOwnPairs; ++k)
      if (2 * kLanes * k + (kLanes > 8 ? 2 * lane() : 0) < rows) f(2 * (kLanes * k + lane()), k);
  }
  __device__ Packed<T, 2> cosine_pair(int side, int u, int row) const {
    return *reinterpret_cast<const Packed<T, 2>*>(cosine(side, u, row));
  }

  // Writes the coefficients f(row, k) of this thread's pixel, two at a time, in parts where the type asks for them.
  template <class C, class F>
  __device__ void write_coefficients(int rows, F f) {
    static_assert(sizeof(C) == sizeof(X));
    const int u = pixel();
    each_row_pair(rows, [&](int row, int k) {
      Packed<T, 2> values = f(row, k);
#pragma unroll
      for (int part = 0; part < kParts<X>; ++part) {
        const Packed<C, 2> rounded = narrow<C>(values.x);
        *reinterpret_cast<Packed<C, 2>*>(coefficients<C>(part).at(u, row)) = rounded;
        if (part + 1 == kParts<X>) break;
        T back[2];
        widen(rounded, back);
        values.x[0] -= back[0];
        values.x[1] -= back[1];
      }
    });
  }

  // moments[m][n] += coefficients (anchors 16 m .. + 15) times the student's tile (channels as in write_moments())
  using Moments = T[kMaxBlockN / 16][kTilesK][2][4];
  __device__ void add_moments(Moments& moments, int rows) {
    Operand<Wide<X>, kParts<X>, true> left;
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) left.parts[part] = coefficients<Wide<X>>(part);
    X* const data = tile[0].matrix.data;
    if (tile[0].pixel_rows)
      multiply<kRowTiles>(moments, left, 0, rows, Operand<X, 1, true>{{{data, block.k}}}, 16 * warp(), kStepK, block.k,
                          kM);
    else
      multiply<kRowTiles>(moments, left, 0, rows, Operand<X, 1, false>{{{data, kM}}}, 16 * warp(), kStepK, block.k, kM);
  }

  __device__ void write_moments(Moments& moments,
                                T* out,  // [masks, max_channels]
                                int64_t p0) {
    sea::write_moments(moments, out + p0 * pyramid.max_channels + own_channel(), pyramid.max_channels,
                       part_of(count - p0, block.n), own_channels());
  }

  // Sets pixels that are not valid to zero in the student's tile: what is multiplied by zero must be finite.
  __device__ void clear_invalid_pixels() {
    bool any = false;
    for (int u = threadIdx.x % kM; !any && u < at.count; u += kM) any = !valid(u);
    if (!__syncthreads_or(any)) return;
    for (int i = threadIdx.x; i < block.k * kM; i += kMainThreads)
      if (!valid(i % kM)) *tile[0].at(i / kM, i % kM) = narrow<X>(0.f);
    __syncthreads();
  }

  // directions[m][n] += coefficients (pixels 16 m .. + 15) times the student's unit anchors (channels as in moments)
  using Directions = T[kRowTiles][kTilesK][2][4];
  __device__ void add_directions(Directions& directions, int rows) {
    Operand<X, kParts<X>, false> left;
    Operand<X, kParts<X>, true> right;
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) {
      left.parts[part] = coefficients<X>(part);
      right.parts[part] = units(0, part);
    }
    multiply(directions, left, 0, kM, right, 16 * warp(), kStepK, block.k, rows);
  }

  __device__ void write_directions(Directions& directions) {  // to memory.out
    const int first = 16 * warp();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTilesK; ++n)
        if (first + kStepK * n < block.k)
          each_pair(directions[m][n], [&](int row, int column, Packed<T, 2> values) {
            *reinterpret_cast<Packed<T, 2>*>(direction(first + kStepK * n + column, 16 * m + row)) = values;
          });
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTilesK; ++n) each(directions[m][n], [](int, int, T& value) { value = 0; });
  }

  __device__ T* direction(int channel, int u) const { return memory.out + u * (block.k + 8) + channel; }

 private:
  int step_;                                            // tiles waited for so far
  int stage_;                                           // of the last one
  int unit_entry_ = -1, unit_chunk_ = -1, unit_group_;  // which anchors are in memory.units
  WorkTile next_{};

  __device__ int channels_of(const Entry& e, int group) const {
    return part_of(e.channels - static_cast<int64_t>(group) * block.k, block.k);
  }
  __device__ int group_at(int i) const { return groups == 1 ? 0 : (own + 1 + i) % groups; }

  __device__ X* tile_data(int stage, int side) const { return memory.tiles + (2 * stage + side) * block.k * kM; }

  __device__ Matrix<X> units(int side, int part) const {
    return {memory.units + (side * kParts<X> + part) * block.n * block.k, block.k};
  }

  template <class C>
  __device__ Matrix<C> coefficients(int part) const {
    return {reinterpret_cast<C*>(memory.coefficients) + part * kM * kMaxBlockN, kMaxBlockN};
  }

  __device__ void load(int stage, int64_t t, int group) {
    next_.seek(pyramid, t, kM);
    const E& e = pyramid.entries[next_.entry];
    // The threads share the sides where half of them are enough for a row of a tile: one for every 4 bytes.
    constexpr int kTurns = sizeof(X) == 2 ? 1 : 2, kThreads = kMainThreads / 2 * kTurns;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      const int side = thread_index() / kThreads + turn;
      if (side < sides)
        load_tile(tile_data(stage, side), e.maps[side], next_.image, next_.first, next_.count, kM,
                  static_cast<int64_t>(group) * block.k, channels_of(e, group), block.k, kThreads);
    }
    copy_async_commit();
  }

  // Waits for the i-th group of tile t, and starts to load what comes after it.
  __device__ void consumer_wait(int64_t t, bool more_chunks, int i) {
    const int stage = stage_ = step_++ % 2;
    if (groups > 1) __syncthreads();  // every warp is done with the group that is overwritten
    const bool same = groups > 1 && (i + 1 < groups || more_chunks);
    if (same || t + 1 < end) {
      load(1 - stage, same ? t : t + 1, group_at(i + 1 < groups ? i + 1 : 0));
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    tile[0] = make_tile(tile_data(stage, 0), entry().maps[0], kM, block.k);
    tile[1] = sides == 2 ? make_tile(tile_data(stage, 1), entry().maps[1], kM, block.k) : tile[0];
    __syncthreads();
  }

  __device__ void load_units(int chunk, int group, int rows) {
    if (unit_entry_ == at.entry && unit_chunk_ == chunk && unit_group_ == group) return;
    unit_entry_ = at.entry;
    unit_chunk_ = chunk;
    unit_group_ = group;
    __syncthreads();
    const E& e = entry();
    const int64_t pitch = e.pitch(), c0 = static_cast<int64_t>(group) * block.k;
    const int64_t p0 = static_cast<int64_t>(chunk) * block.n;
    if (threadIdx.x < kMaxBlockN) {
      const int64_t mask = p0 + threadIdx.x;
      memory.absent[threadIdx.x] =
          mask < count && masks.area[e.level * masks.masks + mask] > 0 ? T(0) : static_cast<T>(kAbsent);
    }
    for (int i = 0; i < sides * kParts<X>; ++i) {
      const X* source = static_cast<const X*>(e.units) + (i * masks.masks + p0) * pitch + c0;
      copy_rows<16>(units(i / kParts<X>, i % kParts<X>), kMainThreads, rows, source, pitch,
                    part_of(masks.masks - p0, rows), part_of(pitch - c0, block.k));
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  // 16-bit types: a warp has one side and a share of the channels. Other types: a thread has one pixel and every
  // kShares-th channel; neighboring threads have neighboring pixels.
  static constexpr bool kByProducts = sizeof(X) == 2;
  static constexpr int kShares = kByProducts ? kWarps / 2 : kMainThreads / kM;
  using Squares = std::conditional_t<kByProducts, T[kRowTiles][2][4], T[2]>;

  __device__ void add_squares(Squares& squares) {
    if constexpr (kByProducts) {
      const int side = product_side(), inner = block.k / kShares, first = warp() % kShares * inner;
      if (side >= sides) return;
      if (side ? tile[1].pixel_rows : tile[0].pixel_rows)
        multiply_by_itself<false>(squares, Matrix<X>{tile_data(stage_, side), block.k}, first, inner);
      else
        multiply_by_itself<true>(squares, Matrix<X>{tile_data(stage_, side), kM}, first, inner);
    } else {
      const int u = threadIdx.x % kM, c = threadIdx.x / kM;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (side >= sides) break;
        if (tile[side].pixel_rows) {
          for (int i = 0; i < block.k; i += kShares) add_square(squares[side], *tile[side].matrix.at(u, c + i));
        } else {  // a lane's rows are a multiple of 8 apart: their swizzles are the same
          const X* const x = Matrix<X>{tile[side].matrix.data, kM}.at(c, u);
#pragma unroll 8
          for (int i = 0; i < block.k; i += kShares) add_square(squares[side], x[i * kM]);
        }
      }
    }
  }
  static __device__ void add_square(T& sum, T x) { sum += x * x; }

  __device__ void write_norms(const Squares& squares) {
    if constexpr (kByProducts) {
      T* const out = memory.squares + warp() * kM;  // warps: sides, shares
      const int row = thread_index() % 32 / 4;
      if (row / 2 == thread_index() % 4)  // this lane has the diagonal
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) out[16 * m + 8 * h + row] = square_of(squares[m], h, row);
    } else {
#pragma unroll
      for (int side = 0; side < 2; ++side) memory.squares[side * kMainThreads + threadIdx.x] = squares[side];
    }
    __syncthreads();
    const int side = threadIdx.x / kM, u = threadIdx.x % kM;
    if (side >= sides) return;
    T sum = 0;
#pragma unroll
    for (int share = 0; share < kShares; ++share) sum += memory.squares[(side * kShares + share) * kM + u];
    memory.inverse_norm[side * kM + u] = inverse_or_zero(sqrt(sum));
  }

  // A warp has one side and 16 anchors.
  __device__ int product_side() const { return warp() / (kWarps / 2); }
  __device__ int product_row() const { return warp() % (kWarps / 2) * 16; }

  __device__ void multiply_units(T (&products)[kRowTiles][1][2][4], int rows) {
    constexpr int kUnrolled = sizeof(X) == 2 ? 4 : 2;  // 4 of float32 would spill registers
    const int side = product_side(), column = product_row();
    if (side >= sides || column >= rows) return;
    Operand<X, kParts<X>, false> right;
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) right.parts[part] = units(side, part);
    X* const data = tile_data(stage_, side);
    if (side ? tile[1].pixel_rows : tile[0].pixel_rows)
      multiply<kUnrolled>(products, Operand<X, 1, false>{{{data, block.k}}}, 0, kM, right, column, 16, rows, block.k);
    else
      multiply<kUnrolled>(products, Operand<X, 1, true>{{{data, kM}}}, 0, kM, right, column, 16, rows, block.k);
  }

  __device__ void write_cosines(T (&products)[kRowTiles][1][2][4], int rows, T scale) {
    const int side = product_side(), first = product_row();
    if (side >= sides || first >= rows) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      each_pair(products[m][0], [&](int u, int row, Packed<T, 2> values) {
        const T factor = memory.inverse_norm[side * kM + 16 * m + u] * scale;
        const auto absent = *reinterpret_cast<const Packed<T, 2>*>(memory.absent + first + row);
        values.x[0] = values.x[0] * factor + absent.x[0];
        values.x[1] = values.x[1] * factor + absent.x[1];
        *reinterpret_cast<Packed<T, 2>*>(cosine(side, 16 * m + u, first + row)) = values;
      });
  }
};

}  // namespace sea
