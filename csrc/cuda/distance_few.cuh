// distance() for 16-bit maps with at most 63 anchors and 256 channels. The loss has to be as exact as float32, so unit
// anchors have two parts, rounded and rest (see mma.cuh). The coefficients of the moments, from which only a gradient
// follows, have one; distance() gives them two.
//
// Each warp takes one side and 16 anchors, and multiplies them by all pixels of two tiles. Shared memory has no room
// for both parts of the anchors next to two stages of two tiles. It holds the rounded parts of all anchors; each warp
// keeps the rests of its own anchors in registers until the map ends. A warp reads each block of pixels once for both
// parts, and only one warp reads each anchor.
#pragma once
#include "distance.cuh"
#include "tile_pairs.cuh"

namespace sea {

template <class X>
struct DistanceFewMemory {
  static constexpr int kTiles = 2, kRows = kMaxBlockN, kM = kBlockM<X>, kPixels = kTiles * kM;
  X* units;               // [2 sides, n, k] rounded parts
  X* tiles;               // [2 stages, 2 sides, 2 tiles, k * kM]
  float* cosines;         // [2 sides, kPixels, kMaxBlockN] as in cosine_pair(); then the teacher's exponentials
  Wide<X>* coefficients;  // [kPixels, 2 * kMaxBlockN] half of each row, in the place of the pixel's student cosines
  X* rest;                // [n, k] the rests of one side's unit anchors while they load, in the place of the cosines
  float* inverse_norm;    // [2 sides, kPixels]
  float* absent;          // [kMaxBlockN] as in MainMemory
  double* scratch;        // [32]
  double* terms;          // [kPixels] the loss at each position of a pair, summed over the map's pairs so far
  uint32_t* valid;        // [2 stages, 2 tiles] a bit a pixel: it is in a mask
  TilePair* pairs;        // [2 stages]

  // Pieces at constant offsets come first: their addresses take no register.
  __host__ __device__ DistanceFewMemory(Carver& carver, BlockShape block) {
    inverse_norm = carver.take<float>(2 * kPixels);
    absent = carver.take<float>(kMaxBlockN);
    scratch = carver.take<double>(32);
    terms = carver.take<double>(kPixels);
    valid = carver.take<uint32_t>(4);
    pairs = carver.take<TilePair>(2);
    const int64_t start = carver.used();
    coefficients = carver.take<Wide<X>>(2 * kPixels * kMaxBlockN);
    carver.rewind(start);
    rest = carver.take<X>(kMaxBlockN * kMaxBlockK);
    carver.rewind(start);
    cosines = carver.take<float>(2 * kPixels * kMaxBlockN);
    units = carver.take<X>(2 * block.n * block.k);
    tiles = carver.take<X>(8 * block.k * kM);
  }
};

template <class X>
class DistanceFew : public TilePairs<X, DistanceEntry, DistanceFewMemory<X>> {
  using Base = TilePairs<X, DistanceEntry, DistanceFewMemory<X>>;

 public:
  using Base::at, Base::block, Base::count, Base::entry, Base::kM, Base::kPixels, Base::masks;
  using Base::memory, Base::rows, Base::side, Base::stage, Base::tile, Base::tiles, Base::warp, Base::Base;
  static constexpr int kRowTiles = kPixels / 16, kLanes = kMainThreads / kPixels;

  // The rests of the warp's anchors: channels 16 k .. + 15 in [k], as the right operand of multiply_add().
  using Rests = uint32_t[kMaxBlockK / 16][4];

  __device__ int row() const { return warp() % 4 * 16; }  // of the warp's anchors
  // For work that is done pixel by pixel, kLanes neighboring threads share a pixel.
  __device__ int pixel() const { return thread_index() / kLanes; }
  __device__ bool leads() const { return thread_index() % kLanes == 0; }
  __device__ bool valid(int u) const { return memory.valid[2 * stage() + u / kM] >> u % kM & 1; }

  // Loads what a pair of tiles needs besides its pixels. A barrier has to follow.
  __device__ void begin(bool entered, Rests& rests) const {
    if (entered) load_units(rests);
    if (threadIdx.x < 2u) memory.valid[2 * stage() + threadIdx.x] = valid_pixels(masks, entry(), at(threadIdx.x));
  }

  // Writes the cosines of all pixels, times `scale`, to shared memory. A barrier has to follow.
  __device__ void write_cosines(const Rests& rests, float scale) const {
    float products[kRowTiles][2][4] = {}, squares[2][4] = {};
    const bool there = row() < rows, pixel_rows = entry().maps[side()].pixel_rows;
    if (there && pixel_rows) multiply_units<false, true>(products, squares, rests);
    if (there && !pixel_rows) multiply_units<true, true>(products, squares, rests);
    if (!there && pixel_rows) multiply_units<false, false>(products, squares, rests);
    if (!there && !pixel_rows) multiply_units<true, false>(products, squares, rests);
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    if (t == g / 2)  // this lane has the diagonal
#pragma unroll
      for (int i = 0; i < 2; ++i)
        memory.inverse_norm[side() * kPixels + own_pixel(0) + 8 * i + g] =
            inverse_or_zero(sqrtf(square_of(squares, i, g)));
    __syncthreads();
    if (!there) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      each_pair(products[m], [&](int u, int column, Packed<float, 2> values) {
        u += own_pixel(m);
        const float factor = memory.inverse_norm[side() * kPixels + u] * scale;
        const auto absent = *reinterpret_cast<const Packed<float, 2>*>(memory.absent + row() + column);
        values.x[0] = values.x[0] * factor + absent.x[0];
        values.x[1] = values.x[1] * factor + absent.x[1];
        *cosine_pair(side(), u, row() + column) = values;
      });
  }

  // The cosines of pixel u with anchors p and p + 1. No bank conflicts where groups of 4 lanes access 2 anchors each of
  // 8 neighboring pixels.
  __device__ Packed<float, 2>* cosine_pair(int side, int u, int p) const {
    return reinterpret_cast<Packed<float, 2>*>(memory.cosines + (side * kPixels + u) * kMaxBlockN + (p ^ u % 8 * 8));
  }

  // Calls f(p, k) for this thread's k-th pair of anchors, p and p + 1.
  static constexpr int kOwnPairs = kMaxBlockN / (2 * kLanes);
  template <class F>
  __device__ void each_anchor_pair(F f) const {
    const int own = thread_index() % kLanes;
#pragma unroll
    for (int k = 0; k < kOwnPairs; ++k)
      if (2 * kLanes * k < rows) f(2 * (kLanes * k + own), k);
  }

  __device__ Matrix<Wide<X>> coefficients(int half = 0) const {
    return {memory.coefficients + half * kM * 2 * kMaxBlockN, 2 * kMaxBlockN};
  }

  // If this thread's pixel is not valid, sets it to zero in the student's tile: its coefficients are 0, and 0 times NaN
  // or infinity would be NaN.
  __device__ void clear_invalid_pixel() const {
    if (valid(pixel())) return;
    const Tile<X> own = tile(0, pixel() / kM);
    for (int c = thread_index() % kLanes; c < block.k; c += kLanes) *own.at(c, pixel() % kM) = narrow<X>(0.f);
  }

  // moments[m][n] += coefficients (anchors 16 m .. + 15) times the student's tiles (channels as in write_moments())
  using Moments = float[kMaxBlockN / 16][kTilesK][2][4];
  __device__ void add_moments(Moments& moments) const {
#pragma unroll 1
    for (int half = 0; half < tiles(); ++half) {
      const Operand<Wide<X>, 1, true> left{{coefficients(half)}};
      const Tile<X> own = tile(0, half);
      if (own.pixel_rows)
        multiply<2>(moments, left, 0, rows, Operand<X, 1, true>{{own.matrix}}, 16 * warp(), kStepK, block.k, kM);
      else
        multiply<2>(moments, left, 0, rows, Operand<X, 1, false>{{own.matrix}}, 16 * warp(), kStepK, block.k, kM);
    }
  }

 private:
  using Base::each_step;

  __device__ void load_units(Rests& rests) const {
    __syncthreads();  // every warp is done with what is overwritten
    const DistanceEntry& e = entry();
    if (threadIdx.x < kMaxBlockN)
      memory.absent[threadIdx.x] =
          thread_index() < count && masks.area[e.level * masks.masks + threadIdx.x] > 0 ? 0.f : kAbsent;
    const auto copy = [&](X* to, int part) {  // 0, 1: the student's rounded and rest; 2, 3: the teacher's
      const X* source = static_cast<const X*>(e.units) + part * masks.masks * e.pitch();
      copy_rows<16>(Matrix<X>{to, block.k}, kMainThreads, rows, source, e.pitch(), part_of(masks.masks, rows),
                    part_of(e.pitch(), block.k));
    };
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
      copy(memory.units + s * block.n * block.k, 2 * s);
      copy(memory.rest, 2 * s + 1);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      if (side() == s && row() < rows)
        each_step([&](int k) { blocks_of(memory.rest).load(rests[k], k / 4 * 64, k % 4 * 16); });
      __syncthreads();
    }
  }

  // The warp's anchors in a matrix of units, as the right operand.
  __device__ Blocks<false, X> blocks_of(X* units) const {
    const int lane = thread_index() % 32;
    return {Matrix<X>{units, block.k}, static_cast<unsigned>(row()), static_cast<unsigned>(lane / 16 * 8),
            static_cast<unsigned>(lane / 8 % 2 * 8), lane};
  }

  // The first pixel of products[m]. Each warp of a side starts at a different pixel, and sums up the squares of its
  // first 16.
  __device__ int own_pixel(int m) const { return (warp() + m) % kRowTiles * 16; }

  // If kThere: products[m] += 16 pixels from own_pixel(m) on, times the warp's anchors. squares: as in
  // square_add(), of the 16 pixels of m = 0.
  template <bool kTransposed, bool kThere>
  __device__ void multiply_units(float (&products)[kRowTiles][2][4], float (&squares)[2][4], const Rests& rests) const {
    const int lane = thread_index() % 32;
    const auto pixels = [&](int m) {
      const int first = own_pixel(m);
      const Matrix<X> matrix{tile(side(), first / kM).matrix.data, kTransposed ? kM : block.k};
      return Blocks<kTransposed, X>(matrix, first % kM, lane / 8 % 2 * 8, lane / 16 * 8, lane);
    };
    const Blocks<kTransposed, X> a_blocks[kRowTiles] = {pixels(0), pixels(1), pixels(2), pixels(3)};
    const auto b_blocks = blocks_of(memory.units + side() * block.n * block.k);
    each_step([&](int k) {
      uint32_t b[4];
      if constexpr (kThere) b_blocks.load(b, k / 4 * 64, k % 4 * 16);
#pragma unroll
      for (int m = 0; m < (kThere ? kRowTiles : 1); ++m) {
        uint32_t a[4];
        a_blocks[m].load(a, k / 4 * 64, k % 4 * 16);
        if (m == 0) square_add(squares, a, X());
#pragma unroll
        for (int h = 0; h < (kThere ? 2 : 0); ++h) {
          const uint32_t rounded[2] = {b[2 * h], b[2 * h + 1]}, rest[2] = {rests[k][2 * h], rests[k][2 * h + 1]};
          multiply_add(products[m][h], a, rounded, X());
          multiply_add(products[m][h], a, rest, X());
        }
      }
    });
  }
};

// The divergence and the moments as in distance(), if there are at most kFewAnchors anchors; otherwise returns at once.
// Grid: slices.
template <class X>
__global__ void __launch_bounds__(kMainThreads, 1) distance_few(const __grid_constant__ DistanceParams<X> params) {
  using Loop = DistanceFew<X>;
  const int count = present_masks(params.masks);
  if (count > kFewAnchors) return;
  Loop loop(params.pyramid, params.masks, params.block, count);
  typename Loop::Rests rests;
  typename Loop::Moments moments{};
  if (loop.leads()) loop.memory.terms[loop.pixel()] = 0;
  const auto work = [&] {
    loop.write_cosines(rests, params.scale);
    __syncthreads();
    const int u = loop.pixel();
    const bool valid = loop.valid(u);
    Packed<float, 2> student[Loop::kOwnPairs];
    float student_max = -INFINITY, teacher_max = -INFINITY;
    loop.each_anchor_pair([&](int p, int k) {
      student[k] = *loop.cosine_pair(0, u, p);
      const Packed<float, 2> teacher = *loop.cosine_pair(1, u, p);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        student_max = max(student_max, student[k].x[i]);
        teacher_max = max(teacher_max, teacher.x[i]);
      }
    });
    OnlineSoftmax<X> softmax;
    softmax.rescale(max_over_lanes<Loop::kLanes>(student_max), max_over_lanes<Loop::kLanes>(teacher_max));
    loop.each_anchor_pair([&](int p, int k) {
      Packed<float, 2>& teacher = *loop.cosine_pair(1, u, p);
      Packed<float, 2> values = teacher;
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // from here on, the exponentials replace the cosines
        const auto terms = softmax.add(student[k].x[i], values.x[i], 1.f);
        student[k].x[i] = terms.student;
        values.x[i] = terms.teacher;
      }
      teacher = values;
    });
    softmax.template add_lanes<Loop::kLanes>();
    if (valid && loop.leads()) {
      loop.memory.terms[u] += softmax.divergence(1);
      if (params.save)
        PixelSoftmax<X>(softmax).write(saved_softmax<X>(loop.entry(), loop.at(u / Loop::kM), u % Loop::kM));
    }
    if (!params.moments) return;
    loop.clear_invalid_pixel();
    const float inverse = valid ? loop.memory.inverse_norm[u] : 0.f;
    const float student_factor = inverse / softmax.student_sum, teacher_factor = inverse / softmax.teacher_sum;
    __syncwarp();  // all lanes of a pixel have read its cosines, which the coefficients overwrite
    loop.each_anchor_pair([&](int p, int k) {
      const Packed<float, 2> teacher = *loop.cosine_pair(1, u, p);
      float values[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        values[i] = valid ? student[k].x[i] * student_factor - teacher.x[i] * teacher_factor : 0.f;
      *reinterpret_cast<Packed<Wide<X>, 2>*>(loop.coefficients().at(u, p)) = narrow<Wide<X>>(values);
    });
    __syncthreads();
    loop.add_moments(moments);
  };
  const auto leave = [&] {
    double* const own = loop.memory.terms + loop.pixel();
    double sum = loop.leads() ? *own : 0;
    if (loop.leads()) *own = 0;
    sum = sum_over_block(sum, loop.memory.scratch);
    const int64_t partial = blockIdx.x + loop.at(0).entry, pitch = params.pyramid.max_channels;
    if (threadIdx.x == 0) params.terms[partial] = sum;
    if (params.moments)
      write_moments(moments, params.moments + partial * params.masks.masks * pitch, pitch, count,
                    static_cast<int>(loop.entry().channels));
  };
  loop.each_tile_pair([&](bool entered) { loop.begin(entered, rests); }, work, leave);
}

}  // namespace sea
