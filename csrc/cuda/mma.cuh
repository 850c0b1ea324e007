// Matrix products of a warp, with operands in shared memory and 16 x 16 outputs at a time. All types except float64 use
// the tensor cores.
//
// Tensor cores multiply 16-bit operands or tf32. A computed operand would lose accuracy if it were rounded to 16 bits,
// so it may come in two parts, rounded and rest (x = rounded + rest to 16 bits of mantissa), which are multiplied
// separately. float32 operands are split into two tf32 parts on the way, which is as exact as float32.
#pragma once
#include "tile.cuh"

namespace sea {

constexpr int kSwizzlePeriod = 128;  // bytes of a row after which the swizzle of its chunks repeats

// An operand, as the sum of kCount matrices. kTransposed: the rows in memory are those of the inner dimension.
template <class X, int kCount, bool kTransposed>
struct Operand {
  Matrix<X> parts[kCount];
};

// Calls f(row, column, value) for the elements of a 16 x 16 product that this lane holds: two halves of 8 columns, each
// as in multiply_add().
template <class T, class F>
__device__ inline void each(T (&product)[2][4], F f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) f(lane / 4 + i / 2 * 8, 8 * h + lane % 4 * 2 + i % 2, product[h][i]);
}

// The same, two neighboring columns at a time: f(row, column, Packed of both).
template <class T, class F>
__device__ inline void each_pair(const T (&product)[2][4], F f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      f(lane / 4 + i / 2 * 8, 8 * h + lane % 4 * 2, Packed<T, 2>{{{product[h][i], product[h][i + 1]}}});
}

// Where a lane finds its row of the 16 x 16 blocks that lie along the inner dimension of a matrix of 16-bit elements.
// The two parts (0 or 8) choose its quarter of a block. Only the start depends on `outer`; the steps along the inner
// dimension do not.
template <bool kTransposed, class X>
class Blocks {
 public:
  __device__ Blocks(const Matrix<X>& matrix, unsigned outer, unsigned outer_part, unsigned inner_part, int lane)
      : pitch_(matrix.pitch) {
    const unsigned row = lane % 8 + (kTransposed ? inner_part : outer + outer_part);
    const unsigned swizzle = matrix.swizzle(lane % 8);  // all rows of this lane are 8 apart
    start_ = shared_address(matrix.data + row * pitch_);
    if (kTransposed)
      start_ += ((outer + outer_part) / 8 ^ swizzle) * 16;
    else
      chunk_ = inner_part / 8 ^ swizzle;
  }

  // The block at base + step of the inner dimension. step, a multiple of 16, is a constant where loops are unrolled;
  // base is whole periods of the swizzle.
  __device__ void load(uint32_t (&out)[4], unsigned base, unsigned step) const {
    if constexpr (kTransposed)
      load_matrices_transposed(out, start_ + (base + step) * pitch_ * 2);
    else
      load_matrices(out, start_ + base * 2 + (step / 8 ^ chunk_) * 16);
  }

 private:
  unsigned pitch_;
  uint32_t start_, chunk_ = 0;  // start_: a shared address in bytes
};

// Where a lane finds its elements along the inner dimension of a matrix of float32. Tensor cores expect the elements t
// and t + 4 of every 8. They get 2t and 2t + 1 instead, swapped if t is 1 or 2. Both operands have this order, so the
// product is the same. It lets the lanes of a warp read from different banks, whether the matrix is transposed or not.
template <bool kTransposed, class X>
class Cells {
 public:
  __device__ Cells(const Matrix<X>& matrix, unsigned first, unsigned g, int t) : pitch_(matrix.pitch) {
    const unsigned outer = first + g, inner[2] = {2 * t + (t ^ t / 2) % 2u, 2 * t + 1 - (t ^ t / 2) % 2u};
    if constexpr (kTransposed) {
      start_[0] = matrix.at(inner[0], outer);
      start_[1] = matrix.at(inner[1], outer);  // swizzles repeat every 8 rows
    } else {
      start_[0] = matrix.data + outer * pitch_ + inner[0] % 4;
      start_[1] = matrix.data + outer * pitch_ + inner[1] % 4;
      chunk_ = t / 2 ^ matrix.swizzle(g);  // all outer indices of this lane are 8 apart
    }
  }

  // The lane's element j (0 or 1) of the 8 that start at base + step. step is a multiple of 8; base as in Blocks.
  __device__ X load(unsigned base, unsigned step, int j) const {
    if constexpr (kTransposed)
      return start_[j][(base + step) * pitch_];
    else
      return start_[j][base + (step / 4 ^ chunk_) * 4];
  }

 private:
  unsigned pitch_, chunk_ = 0;
  const X* start_[2];
};

// x = rounded + rest in tf32 (10 bits of mantissa), the rest cut off. NaN and infinities make the rest NaN.
__device__ inline void split_to_tf32(float x, float& rounded, float& rest) {
  constexpr uint32_t kBits = 0xFFFFE000;
  rounded = __uint_as_float((__float_as_uint(x) + 0x1000) & kBits);
  rest = __uint_as_float(__float_as_uint(x - rounded) & kBits);
}

__device__ inline uint32_t half_to_bfloat16(uint32_t pair) {
  const __half2 x = *reinterpret_cast<const __half2*>(&pair);
  const __nv_bfloat16 low = narrow<__nv_bfloat16>(widen(x.x)), high = narrow<__nv_bfloat16>(widen(x.y));
  return static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16 | __bfloat16_as_ushort(low);
}

// products[m][n] += a(rows row + 16 m ..) b(columns column + n * step ..), summed over `inner`, a multiple of 16. Rows
// and columns that begin at or past `rows` or `columns` are skipped. Where the types differ, b is float16 and is
// rounded to bfloat16. kUnrolled (1, 2 or 4): how many blocks of 16 of the inner dimension are unrolled; it divides
// their number. float64 ignores it.
template <int kUnrolled = 1, int kRows, int kColumns, class T, class A, int kA, bool kTransposedA, class B, int kB,
          bool kTransposedB>
__device__ inline void multiply(T (&products)[kRows][kColumns][2][4], const Operand<A, kA, kTransposedA>& a_operand,
                                int row, int rows, const Operand<B, kB, kTransposedB>& b_operand, int column, int step,
                                int columns, int inner) {
  constexpr bool kPeriods = 16 * kUnrolled * sizeof(A) % kSwizzlePeriod == 0;  // what is unrolled is whole periods
  const int lane = thread_index() % 32;
  if constexpr (sizeof(A) == 2) {
    const unsigned low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const auto a_blocks = [&](int m, int part) {
      return Blocks<kTransposedA, A>(a_operand.parts[part], row + 16 * m, low, high, lane);
    };
    const auto b_blocks = [&](int n, int part) {
      return Blocks<kTransposedB, B>(b_operand.parts[part], column + n * step, high, low, lane);
    };
#pragma unroll 1
    for (int k = 0; k < inner; k += 16 * kUnrolled)
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) {
        const unsigned base = kPeriods ? k : 0, rest = (kPeriods ? 0 : k) + 16 * i;
        uint32_t a[kRows][kA][4];
#pragma unroll
        for (int m = 0; m < kRows; ++m)
          if (row + 16 * m < rows)
#pragma unroll
            for (int l = 0; l < kA; ++l) a_blocks(m, l).load(a[m][l], base, rest);
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          if (column + n * step < columns) {
            uint32_t b[kB][4];
#pragma unroll
            for (int r = 0; r < kB; ++r) {
              b_blocks(n, r).load(b[r], base, rest);
              if constexpr (!std::is_same_v<A, B>)
#pragma unroll
                for (int j = 0; j < 4; ++j) b[r][j] = half_to_bfloat16(b[r][j]);
            }
#pragma unroll
            for (int r = 0; r < kB; ++r)
#pragma unroll
              for (int l = 0; l < kA; ++l)
                if (l + r < 2)  // the product of both rests is below the rounding
#pragma unroll
                  for (int m = 0; m < kRows; ++m)
                    if (row + 16 * m < rows)
#pragma unroll
                      for (int h = 0; h < 2; ++h) {
                        const uint32_t half[2] = {b[r][2 * h], b[r][2 * h + 1]};
                        multiply_add(products[m][n][h], a[m][l], half, A());
                      }
          }
      }
  } else if constexpr (sizeof(A) == 4) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < inner; k += 16 * kUnrolled)
#pragma unroll
      for (int i = 0; i < 2 * kUnrolled; ++i) {
        const unsigned base = kPeriods ? k : 0, rest = (kPeriods ? 0 : k) + 8 * i;
        float a[kRows][4], a_rest[kRows][4];
#pragma unroll
        for (int m = 0; m < kRows; ++m)
          if (row + 16 * m < rows)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const Cells<kTransposedA, A> cells(a_operand.parts[0], row + 16 * m + j % 2 * 8, g, t);
              split_to_tf32(cells.load(base, rest, j / 2), a[m][j], a_rest[m][j]);
            }
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          if (column + n * step < columns)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const Cells<kTransposedB, B> cells(b_operand.parts[0], column + n * step + 8 * h, g, t);
              float b[2], b_rest[2];
#pragma unroll
              for (int j = 0; j < 2; ++j) split_to_tf32(cells.load(base, rest, j), b[j], b_rest[j]);
#pragma unroll
              for (int m = 0; m < kRows; ++m)
                if (row + 16 * m < rows) {
                  // Tensor cores truncate their sums, so long sums are left to ordinary additions.
                  float sum[4] = {};
                  multiply_add(sum, a_rest[m], b);
                  multiply_add(sum, a[m], b_rest);
                  multiply_add(sum, a[m], b);
#pragma unroll
                  for (int j = 0; j < 4; ++j) products[m][n][h][j] += sum[j];
                }
            }
      }
  } else {
    const auto a_at = [&](int r, int k) {
      return *(kTransposedA ? a_operand.parts[0].at(k, row + r) : a_operand.parts[0].at(row + r, k));
    };
    const auto b_at = [&](int k, int c) {
      return *(kTransposedB ? b_operand.parts[0].at(k, column + c) : b_operand.parts[0].at(column + c, k));
    };
#pragma unroll
    for (int m = 0; m < kRows; ++m)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        if (row + 16 * m < rows && column + n * step < columns)
          each(products[m][n], [&](int r, int c, double& out) {
            double sum = 0;
            for (int k = 0; k < inner; ++k) sum += a_at(16 * m + r, k) * b_at(k, n * step + c);
            out += sum;
          });
  }
}

// squares[h] += the products of 16 pixels with pixels 8 h .. + 7 of themselves, over 16 channels. a: the pixels, as the
// left operand of multiply_add(). Only the squares count, see square_of().
template <class X>
__device__ inline void square_add(float (&squares)[2][4], const uint32_t (&a)[4], X type) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t same[2] = {a[h], a[h + 2]};
    multiply_add(squares[h], a, same, type);
  }
}

// The square of pixel 8 h + g, where g = lane / 4 and lane % 4 == g / 2; other lanes do not have it.
__device__ inline float square_of(const float (&squares)[2][4], int h, int g) {
  return g % 2 ? squares[h][2 * h + 1] : squares[h][2 * h];
}

// squares[m] as in square_add(), of a tile's pixels 16 m .. + 15, over the channels first .. first + inner - 1,
// multiples of 16.
template <bool kTransposed, int kRows, class X>
__device__ inline void multiply_by_itself(float (&squares)[kRows][2][4], const Matrix<X>& pixels, int first,
                                          int inner) {
  const int lane = thread_index() % 32;
#pragma unroll 1
  for (int k = first; k < first + inner; k += 16)
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      uint32_t a[4];
      Blocks<kTransposed, X>(pixels, 16 * m, lane / 8 % 2 * 8, lane / 16 * 8, lane).load(a, 0, k);
      square_add(squares[m], a, X());
    }
}

}  // namespace sea
