// Vectors of one instruction set, and operations on them: transposition, exponential, matrix product. They are the
// compiler's own vector types, so that one source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Ignores NaN in x: it shows later, in the sum of the exponentials of x - maximum.
template <class V>
inline V maximum(V x, V m) {
  return x > m ? x : m;
}

typedef uint32_t Bits32 __attribute__((vector_size(SEA_VECTOR_BYTES)));

// e^x to 2 ulp for x <= 88: e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial. -inf gives 0; NaN and
// what is larger are handed through.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat(-87.3f);
  const Vec<float> clamped = x > low ? x : low;
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
  Bits32 bits, exponent;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  p = x > low ? p : Vec<float>{};
  return x <= 88.f ? p : x;
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

// Rows of the register block of a matrix product: with two vectors a row it fills the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 12;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6;
#else
constexpr int kBlockRows = 4;
#endif

// c[m, :] += sum_k a[k, m] b[k, :] for kRows rows and kVectors vectors of columns.
template <int kRows, int kVectors, class T>
inline void multiply_block(int64_t depth, const T* a, int64_t a_k, int64_t a_m, const T* b, int64_t b_k, T* c,
                           int64_t c_m) {
  Vec<T> sum[kRows][kVectors] = {};  // not c: a sum over many products is more exact in parts
  for (int64_t k = 0; k < depth; ++k) {
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
                          T* c, int64_t c_m) {
  if constexpr (kRows > 0) {
    if (rows >= kRows) return multiply_block<kRows, kVectors>(depth, a, a_k, a_m, b, b_k, c, c_m);
    multiply_rows<kRows - 1, kVectors>(rows, depth, a, a_k, a_m, b, b_k, c, c_m);
  }
}

// c[m, n] += sum_k a[k, m] b[k, n] for m < rows, k < depth, n < columns (a multiple of the lanes).
// a is read in blocks of kBlockRows rows, a_block elements apart: kBlockRows * a_m where a is a plain matrix.
template <class T>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_k, int64_t a_m,
                     int64_t a_block, const T* b, int64_t b_k, T* c, int64_t c_m) {
  constexpr int pair = 2 * kLanes<T>;
  for (int64_t n = 0; n < columns; n += pair)
    for (int64_t m = 0; m < rows; m += kBlockRows) {
      const T* block = a + m / kBlockRows * a_block;
      T* out = c + m * c_m + n;
      if (n + pair <= columns)
        multiply_rows<kBlockRows, 2>(rows - m, depth, block, a_k, a_m, b + n, b_k, out, c_m);
      else
        multiply_rows<kBlockRows, 1>(rows - m, depth, block, a_k, a_m, b + n, b_k, out, c_m);
    }
}

}  // namespace SEA_ISA
}  // namespace sea
