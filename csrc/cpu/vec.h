// Vectors of one instruction set, and operations on them: transposition, exponential, matrix product. They are the
// compiler's own vector types, so that one source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SEA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SEA_VECTOR_BYTES 32
#else
#define SEA_VECTOR_BYTES 16
#endif

namespace sea {
namespace SEA_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SEA_VECTOR_BYTES)));
  typedef int32_t index __attribute__((vector_size(SEA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(SEA_VECTOR_BYTES)));
  typedef int64_t index __attribute__((vector_size(SEA_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
// Each lane is all ones or all zeros.
template <class T>
using Mask = typename VectorOf<T>::index;
template <class T>
constexpr int kLanes = SEA_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// Stores past the caches, for data that is not read again soon. p is aligned to a vector. Such stores are ordered by
// the atomic increment that every worker's last task ends with.
inline void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}

inline void stream(double* p, Vec<double> v) { store(p, v); }

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Mask of the first n lanes (n is clamped).
template <class T>
inline Mask<T> first_lanes(int64_t n) {
  constexpr int lanes = kLanes<T>;
  struct Table {
    std::decay_t<decltype(Mask<T>()[0])> lane[2 * lanes];
    constexpr Table() : lane() {
      for (int i = 0; i < lanes; ++i) lane[i] = -1;
    }
  };
  static constexpr Table table;
  Mask<T> mask;
  std::memcpy(&mask, table.lane + (n < 0 ? lanes : n > lanes ? 0 : lanes - n), sizeof mask);
  return mask;
}

// Mask of the lanes [from, to).
template <class T>
inline Mask<T> lanes_between(int64_t from, int64_t to) {
  return first_lanes<T>(to) & ~first_lanes<T>(from);
}

// x in the lanes of `mask`, 0 in the others, whatever x is there.
template <class T>
inline Vec<T> keep(Vec<T> x, Mask<T> mask) {
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Mask<T>>(x) & mask);
}

// Whether any lane is set.
template <class T>
inline bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
  int64_t words[2];
  std::memcpy(words, &mask, sizeof words);
  return (words[0] | words[1]) != 0;
#endif
}

// Ignores NaN in x: it shows later, in the sum of the exponentials of x - maximum.
template <class V>
inline V maximum(V x, V m) {
  return x > m ? x : m;
}

typedef uint32_t Bits32 __attribute__((vector_size(SEA_VECTOR_BYTES)));

// e^x to 2 ulp for x <= 0: e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial. -inf gives 0, NaN gives
// NaN.
inline Vec<float> exp(Vec<float> x) {
  // NaN is kept.
#if defined(__AVX512F__)
  const Vec<float> low = splat(-104.f);  // e^-104 rounds to 0
  const Vec<float> clamped =
      reinterpret_cast<Vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(low), reinterpret_cast<__m512>(x)));
#else
  const Vec<float> low = splat(-87.3f);
  const Vec<float> clamped = low > x ? low : x;
#endif
  const Vec<float> shifter = splat(0x1.8p23f);
  const Vec<float> shifted = clamped * 0x1.715476p0f + shifter;
  const Vec<float> n = shifted - shifter;
  const Vec<float> r = (clamped - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float> p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  Bits32 bits, exponent;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  p = x > low ? p : Vec<float>{};
  return x <= 0.f ? p : x;
#endif
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class T, bool kHigh>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int first = kHigh ? kLanes<T> / 2 : 0;
#if defined(__clang__)
  Vec<T> out;
  for (int i = 0; i < kLanes<T>; ++i) out[i] = i % 2 ? b[first + i / 2] : a[first + i / 2];
  return out;
#else
  typename VectorOf<T>::index order;
  for (int i = 0; i < kLanes<T>; ++i) order[i] = first + i / 2 + (i % 2 ? kLanes<T> : 0);
  return __builtin_shuffle(a, b, order);
#endif
}

// Square transposition: log2(lanes) perfect shuffles of the rows.
template <class T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<T, false>(rows[i], rows[i + n / 2]);
      next[2 * i + 1] = interleave<T, true>(rows[i], rows[i + n / 2]);
    }
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Lane i is the sum of row i.
template <class T>
inline Vec<T> sum_rows(Vec<T> (&rows)[kLanes<T>]) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      rows[i] = interleave<T, false>(rows[i], rows[i + half]) + interleave<T, true>(rows[i], rows[i + half]);
  return rows[0];
}

template <class T>
inline T sum_lanes(Vec<T> x) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

// Rows of the register block of a matrix product: with two vectors a row it fills the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 12;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6;
#else
constexpr int kBlockRows = 4;
#endif

// c[m, :] += sum_k a[k, m] b[k, :] for kRows rows and kVectors vectors of columns. Where `ahead` is not null, it also
// prefetches these columns of a later b, so that memory and processor work at the same time.
template <int kRows, int kVectors, class T>
inline void multiply_block(int64_t depth, const T* a, int64_t a_k, int64_t a_m, const T* b, int64_t b_k, T* c,
                           int64_t c_m, const T* ahead, int64_t ahead_k) {
  Vec<T> sum[kRows][kVectors] = {};  // not c: a sum over many products is more exact in parts
  for (int64_t k = 0; k < depth; ++k) {
    if (ahead)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(ahead + k * ahead_k + v * kLanes<T>, 0, 2);
    Vec<T> right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_k + v * kLanes<T>);
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> left = splat(a[k * a_k + m * a_m]);
      for (int v = 0; v < kVectors; ++v) sum[m][v] += left * right[v];
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v)
      store(c + m * c_m + v * kLanes<T>, load(c + m * c_m + v * kLanes<T>) + sum[m][v]);
}

// The rows that are left over, one template instance for each number of them.
template <int kRows, int kVectors, class T>
inline void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t a_k, int64_t a_m, const T* b, int64_t b_k,
                          T* c, int64_t c_m, const T* ahead, int64_t ahead_k) {
  if constexpr (kRows > 0) {
    if (rows >= kRows) return multiply_block<kRows, kVectors>(depth, a, a_k, a_m, b, b_k, c, c_m, ahead, ahead_k);
    multiply_rows<kRows - 1, kVectors>(rows, depth, a, a_k, a_m, b, b_k, c, c_m, ahead, ahead_k);
  }
}

// c[m, n] += sum_k a[k, m] b[k, n] for m < rows, k < depth, n < columns (a multiple of the lanes).
// a is read in blocks of kBlockRows rows, a_block elements apart: kBlockRows * a_m where a is a plain matrix.
// ahead [k, n]: a later b, which is prefetched; or null.
template <class T>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_k, int64_t a_m,
                     int64_t a_block, const T* b, int64_t b_k, T* c, int64_t c_m, const T* ahead = nullptr,
                     int64_t ahead_k = 0) {
  constexpr int pair = 2 * kLanes<T>;
  for (int64_t n = 0; n < columns; n += pair)
    for (int64_t m = 0; m < rows; m += kBlockRows) {
      const T* block = a + m / kBlockRows * a_block;
      T* out = c + m * c_m + n;
      const T* next = ahead && m == 0 ? ahead + n : nullptr;
      if (n + pair <= columns)
        multiply_rows<kBlockRows, 2>(rows - m, depth, block, a_k, a_m, b + n, b_k, out, c_m, next, ahead_k);
      else
        multiply_rows<kBlockRows, 1>(rows - m, depth, block, a_k, a_m, b + n, b_k, out, c_m, next, ahead_k);
    }
}

}  // namespace SEA_ISA
}  // namespace sea
