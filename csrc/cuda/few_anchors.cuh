// The main loop of backward for 16-bit maps with at most 127 anchors (of 128 rows, one is needed for h_r, below) and at
// most 256 channels. Forward, whose loss has to be as exact as float32, uses distance_few.cuh if there are at most 63
// anchors. A batch of 16 COCO images is close to 63. Everything else uses mainloop.cuh.
//
// Shared memory holds all anchors, and all channels of two tiles, while the next two tiles load. With more than 63
// anchors, it holds one tile, while the next one loads. Each warp takes one side and 16 pixels and reads them once.
// Their cosines with all anchors, or with half of them, stay in its registers; of these, only the teacher's softmax is
// passed on, to the student's warp with the same pixels and anchors.
//
// The coefficients e_p of a pixel add up to 0, so directions do not change if one vector is subtracted from all unit
// anchors h_p. The products are those of d_p = h_p - h_r, where r is the first anchor that is present at this level:
// float16 is exact enough for them without a second part. Rounding d_p loses l_p. Pixels point roughly along h_r, so
// for a unit pixel f, f . l_p is about (f . h_r) (h_r . l_p), and with the rounded d_p
//   f . h_p is about f . d_p + (f . h_r) (1 + h_r . l_p).
// To get f . h_r, row `rows` - 1 of the units is h_r itself.
#pragma once
#include "tile_pairs.cuh"

namespace sea {

// For two columns of the products: `factor` times f . h_r is added, and after scaling `absent` as in MainMemory.
struct ColumnPair {
  float factor[2], absent[2];
};

// What is added up over warps that share pixels but not anchors: f . h_r, which only one of them has, the sum of the
// exponentials, and that of e_p (f . h_p).
enum Partial { kReference, kExponentials, kAlong, kPartials };

template <class X, int kTiles_>
struct FewMemory {
  static constexpr int kTiles = kTiles_, kM = kBlockM<X>, kPixels = kTiles * kM;
  static constexpr int kSplit = 2 / kTiles;  // warps that share the anchors
  static constexpr int kRows = kSplit * kMaxBlockN;

  __half* units;         // [2 sides, n, k] d_p; row `rows` - 1 is h_r
  X* tiles;              // [2 stages, 2 sides, kTiles, k * kM]
  float* exchange;       // [kPixels, n] from the teacher's warps to the student's, as their lanes hold it
  __half* coefficients;  // [kPixels, kRows]
  float* partial;        // [kPartials, 2 parts, 2 sides, kPixels]
  float* out;            // [k, kM], in the place of exchange, coefficients and partial: see direction()
  ColumnPair* columns;   // [2 sides, n / 2]
  float* direct;         // [2, kPixels] as in MainMemory
  TilePair* pairs;       // [2 stages]
  TileMasks masks[kTiles];

  __host__ __device__ FewMemory(Carver& carver, BlockShape block)
      : units(carver.take<__half>(2 * block.n * block.k)), tiles(carver.take<X>(4 * kTiles * block.k * kM)) {
    for (TileMasks& of_tile : masks) of_tile = TileMasks(carver, kM, 128);
    columns = carver.take<ColumnPair>(block.n);
    direct = carver.take<float>(2 * kPixels);
    pairs = carver.take<TilePair>(2);
    const int64_t start = carver.used();
    exchange = carver.take<float>(kPixels * block.n);
    coefficients = carver.take<__half>(kPixels * kRows);
    partial = carver.take<float>(kSplit == 2 ? kPartials * 4 * kPixels : 0);
    carver.rewind(start);
    out = carver.take<float>(kM * block.k);
  }
};

// All methods are called by all threads of the block. E derives from MainEntry.
template <class X, class E, int kTiles>
class FewAnchors : public TilePairs<X, E, FewMemory<X, kTiles>> {
  using Memory = FewMemory<X, kTiles>;
  using Base = TilePairs<X, E, Memory>;
  using Base::each_step;

 public:
  using Base::at, Base::block, Base::count, Base::entry, Base::kM, Base::kPixels, Base::lane, Base::masks;
  using Base::memory, Base::rows, Base::side, Base::tile, Base::warp;
  static constexpr int kWarpM = 16;  // pixels of a warp
  static constexpr int kSplit = Memory::kSplit;

  __device__ FewAnchors(const Pyramid<E>& pyramid, const Masks& masks, BlockShape block, int count)
      : Base(pyramid, masks, block, count) {
    for (TileMasks& of_tile : memory.masks) of_tile.count = (count + 31) / 32;
  }

  __device__ int first() const { return warp() % (4 / kSplit) * kWarpM; }  // pixel of this warp; each lane has two
  __device__ int part() const { return warp() % 4 / (4 / kSplit); }        // of the anchors
  // The rows of this warp's part: first_row() .. first_row() + own_rows() - 1. Both are multiples of 16.
  __device__ int first_row() const { return part() * most_rows(); }
  __device__ int own_rows() const { return min(most_rows(), rows - first_row()); }
  __device__ int pixel(int i) const { return first() + lane() / 4 + 8 * i; }
  __device__ bool valid(int u) const { return valid_bits<1>(u / kM, u % kM); }
  // Of the pixels u .. u + kStep - 1 of a tile, as bits.
  template <int kStep>
  __device__ uint32_t valid_bits(int half, int u) const {
    return (half ? memory.masks[kTiles - 1].valid : memory.masks[0].valid)[0] >> u & ((1u << kStep) - 1);
  }
  __device__ TileMasks masks_of(int half) const {
    TileMasks out = memory.masks[0];
    const TileMasks& second = memory.masks[kTiles - 1];
    if (half) {
      out.inner = second.inner, out.valid = second.valid, out.begin = second.begin;
      out.first = second.first, out.masks = second.masks, out.words = second.words;
    }
    return out;
  }

  // Loads what a pair of tiles needs besides its pixels. A barrier has to follow.
  __device__ void begin(bool entered) {
    if (entered) load_units();
    memory.masks[0].template load<0>(masks, entry(), at(0));
    if constexpr (kTiles == 2) memory.masks[1].template load<1>(masks, entry(), at(1));
  }

  // [j][i]: the cosine of pixel(i / 2) with the anchor first_row() + 8 j + 2 (lane % 4) + i % 2.
  using Cosines = float[kMaxBlockN / 8][4];

  // The cosines of the warp's pixels with its anchors, times `scale`, and 1 / |F| of both pixels.
  __device__ void find_cosines(Cosines& z, float (&inverse)[2], float scale) const {
    Steps x;
    const Tile<X> own = tile(side(), first() / kM);
    const int lane = thread_index() % 32;
    const unsigned low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const auto read = [&](auto blocks) { this->each_step([&](int k) { blocks.load(x[k], k / 4 * 64, k % 4 * 16); }); };
    if (own.pixel_rows)
      read(Blocks<false, X>(own.matrix, first() % kM, low, high, lane));
    else
      read(Blocks<true, X>(own.matrix, first() % kM, low, high, lane));
    find_inverse(inverse, x);
    each_step([&](int k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float pair[2];
        widen(Packed<X, 2>{.words = {x[k][i]}}, pair);
        x[k][i] = bits_of(__floats2half2_rn(pair[0] * inverse[i % 2], pair[1] * inverse[i % 2]));
      }
    });
#pragma unroll
    for (int j = 0; j < kMaxBlockN / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) z[j][i] = 0;
#pragma unroll
    for (int m = 0; m < kMaxBlockN / 16; m += 2)
      if (16 * m + 16 < own_rows())
        multiply_units<2>(z, x, m);
      else if (16 * m < own_rows())
        multiply_units<1>(z, x, m);
    float along[2] = {};  // f . h_r, the last column, which the last of four lanes holds
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 1; j < kMaxBlockN / 8; j += 2)
        if (first_row() + 8 * j + 8 == rows) along[i] = z[j][2 * i + 1];
      along[i] = __shfl_sync(kAllLanes, along[i], lane | 3);
    }
    write_partial(kReference, along);
    if constexpr (kSplit == 2) __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) along[i] = sum_partial(kReference, i, along[i]);
    each_column_pair([&](int j, int pair) {
      const ColumnPair column = memory.columns[side() * block.n / 2 + pair];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        z[j][i] = fma(along[i / 2], column.factor[i % 2], z[j][i]) * scale + column.absent[i % 2];
    });
  }

  // Calls f(j, pair) for this lane's pairs of columns: first_row() + 8 j + 2 (lane % 4) and the next, the columns of
  // pair `pair`.
  template <class F>
  __device__ void each_column_pair(F f) const {
    const int t = first_row() / 2 + thread_index() % 4, rows = own_rows();
#pragma unroll
    for (int j = 0; j < kMaxBlockN / 8; j += 2)
      if (8 * j < rows) {
        f(j, 4 * j + t);
        f(j + 1, 4 * j + 4 + t);
      }
  }

  // Adds up a number per pixel over the parts of the anchors. Each warp writes its numbers for pixel(0) and pixel(1),
  // which four lanes share, and reads the sums after a barrier. A warp that has all anchors keeps its own.
  __device__ void write_partial(Partial what, const float (&own)[2]) const {
    if constexpr (kSplit == 2)
      if (lane() % 4 == 0)
#pragma unroll
        for (int i = 0; i < 2; ++i) memory.partial[((what * 2 + part()) * 2 + side()) * kPixels + pixel(i)] = own[i];
  }
  __device__ float sum_partial(Partial what, int i, float own) const {
    if (kSplit == 1) return own;
    const float* const first = memory.partial + (what * 4 + side()) * kPixels + pixel(i);
    return first[0] + first[2 * kPixels];
  }

  // Where a warp of the teacher leaves two numbers for the same lane of the student's.
  __device__ float2& exchange(int j, int i) const {
    const int of_warp = warp() % 4 * (block.n / kSplit) / 8;
    return reinterpret_cast<float2*>(memory.exchange)[((of_warp + j) * 2 + i) * 32 + lane()];
  }

  __device__ Matrix<__half> coefficients() const { return {memory.coefficients, Memory::kRows}; }

  __device__ void write_coefficients(const Cosines& values) const {
    each_column_pair([&](int j, int pair) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float two[2] = {values[j][2 * i], values[j][2 * i + 1]};
        *reinterpret_cast<Packed<__half, 2>*>(coefficients().at(pixel(i), 2 * pair)) = narrow<__half>(two);
      }
    });
  }

  // directions[m][n] += coefficients (pixels 16 m .. + 15) times the student's d_p (channels 16 warp + kStepK n .. +
  // 15)
  using Directions = float[kPixels / 16][kTilesK][2][4];
  __device__ void add_directions(Directions& directions) const {
    const Operand<__half, 1, false> left{{coefficients()}};
    multiply<1>(directions, left, 0, kPixels, Operand<__half, 1, true>{{units(0)}}, 16 * warp(), kStepK, block.k, rows);
  }

  // Writes the directions of one tile to memory.out.
  template <int kHalf>
  __device__ void write_directions(const Directions& directions) const {
    const int g = lane() / 4, t = lane() % 4;  // as in multiply_add()
#pragma unroll
    for (int n = 0; n < kTilesK; ++n) {
      const int first = 16 * warp() + kStepK * n;
      if (first >= block.k) break;
#pragma unroll
      for (int m = 0; m < kM / 16; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // direction(channel, 16 m + 8 (i / 2) + g), whose chunk is put together from what differs between lanes and
            // what is a constant here
            const int channel = first + 8 * h + 2 * t + i % 2, chunk = (g / 4 ^ 2 * t) ^ (4 * m + i / 2 * 2 + i % 2);
            memory.out[channel * kM + chunk * 4 + g % 4] = directions[kHalf * kM / 16 + m][n][h][i];
          }
    }
  }

  // The directions of the four pixels from u / 4 * 4 on. Without bank conflicts where lanes have neighboring channels,
  // and where they have 8 pixels and 4 of 8 channels.
  __device__ const float* direction(int channel, int u) const {
    return memory.out + channel * kM + (u / 4 ^ channel % 8) * 4;
  }

 private:
  __device__ Matrix<__half> units(int side) const { return {memory.units + side * block.n * block.k, block.k}; }
  __device__ int most_rows() const { return kSplit == 1 ? rows : static_cast<int>(round_up(rows / 2, 16)); }

  // d_p and what goes with it. Each warp handles one row at a time.
  __device__ void load_units() {
    const E& e = entry();
    const float* area = masks.area + e.level * masks.masks;
    const auto there = [&](int p) { return p < count && area[p] > 0; };
    int reference = 0;
#pragma unroll
    for (int p = Memory::kRows - 32; p >= 0; p -= 32)
      if (const uint32_t present = __ballot_sync(kAllLanes, there(p + lane())))
        reference = p + __ffs(static_cast<int>(present)) - 1;
    for (int i = warp(); i < 2 * rows; i += kMainThreads / 32) {
      const int side = i / rows, p = i % rows;
      const X* rounded = static_cast<const X*>(e.units) + side * kParts<X> * masks.masks * e.pitch();
      const auto unit = [&](int64_t p, int c, float (&value)[2]) {  // of channels c and c + 1
        float rest[2];
        const X* from = rounded + p * e.pitch() + c;
        widen(*reinterpret_cast<const Packed<X, 2>*>(from), value);
        widen(*reinterpret_cast<const Packed<X, 2>*>(from + masks.masks * e.pitch()), rest);
        value[0] += rest[0], value[1] += rest[1];
      };
      float lost = 0;
      for (int c = 2 * lane(); c < block.k; c += 64) {
        float d[2] = {}, r[2] = {};
        if (c < e.channels && (p < count || p + 1 == rows)) {
          unit(reference, c, r);
          if (p < count) unit(p, c, d);
          const float sign = p < count ? -1 : 1;
          d[0] += sign * r[0], d[1] += sign * r[1];
        }
        const Packed<__half, 2> out = narrow<__half>(d);
        *reinterpret_cast<Packed<__half, 2>*>(units(side).at(p, c)) = out;
        float back[2];
        widen(out, back);
        lost += r[0] * (d[0] - back[0]) + r[1] * (d[1] - back[1]);
      }
      lost = sum_over_lanes<32>(lost);
      if (lane() == 0) {
        ColumnPair& pair = memory.columns[side * block.n / 2 + p / 2];
        pair.factor[p % 2] = 1 + lost;
        pair.absent[p % 2] = there(p) ? 0.f : kAbsent;
      }
    }
  }

  // The channels of the warp's pixels: 16 k .. + 15 in x[k], as the left operand of multiply_add().
  using Steps = uint32_t[kMaxBlockK / 16][4];

  // The products with the rows 16 m .. of the warp's units.
  template <int kCount>
  __device__ void multiply_units(Cosines& z, const Steps& x, int m) const {
    const int lane = thread_index() % 32;
    const unsigned low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    each_step([&](int k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        uint32_t b[4];
        Blocks<false, __half>(units(side()), first_row() + 16 * (m + i), high, low, lane)
            .load(b, k / 4 * 64, k % 4 * 16);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
          multiply_add(z[2 * (m + i) + h], x[k], half, __half());
        }
      }
    });
  }

  // 1 / |F| of pixel(0) and pixel(1): the diagonal of the products of the pixels with themselves.
  __device__ void find_inverse(float (&inverse)[2], const Steps& x) const {
    float squares[2][4] = {};
    each_step([&](int k) { square_add(squares, x[k], X()); });
    const int g = lane() / 4, source = (lane() & ~3) | g / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      inverse[i] = inverse_or_zero(sqrtf(__shfl_sync(kAllLanes, square_of(squares, i, g), source)));
  }
};

}  // namespace sea
