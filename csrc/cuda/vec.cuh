// Elements of maps: widened to the type that is computed in and narrowed back, 16 bytes at a time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <map.h>

#include <cstdint>
#include <cuda/ptx.cuh>
#include <type_traits>

namespace sea {

// The type that maps of X are computed in.
template <class X>
using Compute = std::conditional_t<std::is_same_v<X, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class X, class T>
__device__ inline X narrow(T x) {
  if constexpr (std::is_same_v<X, __half>)
    return __float2half_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<X, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else
    return static_cast<X>(x);
}

// The number of parts in which a computed value is stored as X: the rounded value, and for 16-bit types also the rest
// (value - rounded).
template <class X>
constexpr int kParts = sizeof(X) == 2 ? 2 : 1;

template <class X>
constexpr Dtype kDtype = std::is_same_v<X, double>   ? Dtype::float64
                         : std::is_same_v<X, float>  ? Dtype::float32
                         : std::is_same_v<X, __half> ? Dtype::float16
                                                     : Dtype::bfloat16;

template <class To, class From>
__device__ inline To convert(From x) {
  if constexpr (std::is_same_v<To, From>)
    return x;
  else
    return narrow<To>(widen(x));
}

// Elements that are moved at once: 16 bytes, or fewer.
template <class X, int kCount = 16 / sizeof(X)>
struct alignas(kCount * sizeof(X)) Packed {
  static constexpr int kSize = kCount;
  union {
    X x[kSize];
    uint32_t words[kSize * sizeof(X) / 4];
  };
};

template <class Pair>
__device__ inline uint32_t bits_of(Pair pair) {
  static_assert(sizeof(Pair) == 4);
  return reinterpret_cast<uint32_t&>(pair);
}

// Load and store all 16 bytes at once. store_packed() writes to shared memory only.
template <class X>
__device__ inline Packed<X> load_packed(const X* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Packed<X> packed;
  packed.words[0] = bits.x, packed.words[1] = bits.y, packed.words[2] = bits.z, packed.words[3] = bits.w;
  return packed;
}
template <class X>
__device__ inline void store_packed(X* to, const Packed<X>& packed) {
  store_shared(to, packed.words);
}

template <class X, class T, int kCount>
__device__ inline void widen(const Packed<X, kCount>& packed, T (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (std::is_same_v<X, __nv_bfloat16>) {  // the upper half of a float: one instruction each
      const uint32_t pair = packed.words[k / 2];
      x[k] = __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
      x[k] = widen(packed.x[k]);
    }
  }
}

template <class X, class T, int kCount>
__device__ inline Packed<X, kCount> narrow(const T (&x)[kCount]) {
  Packed<X, kCount> packed;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (sizeof(X) > 2) {
      packed.x[k] = narrow<X>(x[k]);
    } else if (k % 2 == 0) {  // two at once
      if constexpr (std::is_same_v<X, __half>)
        packed.words[k / 2] = bits_of(__floats2half2_rn(x[k], x[k + 1]));
      else
        packed.words[k / 2] = bits_of(__floats2bfloat162_rn(x[k], x[k + 1]));
    }
  }
  return packed;
}

// Exponentials of differences over a temperature. For 16-bit maps they are powers of two, exp2(difference * scale),
// which is a multiplication and one fast instruction; for other maps they are as exact as the type.
template <class X>
struct Exponential {
  using T = Compute<X>;
  static constexpr bool kFast = sizeof(X) == 2;
  static constexpr double kNatural = kFast ? 0.6931471805599453 : 1;  // ln 2: turns its logarithms into natural ones

  __device__ static T log(T x) {
    if constexpr (kFast)
      return log2f(x);
    else
      return ::log(x);
  }
  static T scale(double temperature) { return static_cast<T>(1 / (kNatural * temperature)); }
  __device__ static T of(T difference, T scale) {
    if constexpr (kFast)
      return exp2_approximate(difference * scale);
    else
      return exp(difference * scale);
  }
};

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// How many of `left` items (which may be negative) fit into a block of `most`.
__host__ __device__ inline int part_of(int64_t left, int most) {
  return static_cast<int>(left < 0 ? 0 : left < most ? left : most);
}
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace sea
