// What the kernels use of CUDA's language and runtime, by the same names.
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// Vectors: aligned to their size, as CUDA's are (a vector load needs it), but for those of three.

namespace emulator {
template <class T>
struct alignas(std::min<size_t>(2 * sizeof(T), 16)) Vector2 {
  T x, y;
};
template <class T>
struct Vector3 {
  T x, y, z;
};
template <class T>
struct alignas(std::min<size_t>(4 * sizeof(T), 16)) Vector4 {
  T x, y, z, w;
};
}  // namespace emulator

using uchar2 = emulator::Vector2<unsigned char>;
using uchar4 = emulator::Vector4<unsigned char>;
using ushort2 = emulator::Vector2<unsigned short>;
using ushort4 = emulator::Vector4<unsigned short>;
using int2 = emulator::Vector2<int>;
using int3 = emulator::Vector3<int>;
using int4 = emulator::Vector4<int>;
using uint2 = emulator::Vector2<unsigned>;
using uint4 = emulator::Vector4<unsigned>;
using longlong2 = emulator::Vector2<long long>;
using ulonglong2 = emulator::Vector2<unsigned long long>;
using float2 = emulator::Vector2<float>;
using float3 = emulator::Vector3<float>;
using float4 = emulator::Vector4<float>;
using double2 = emulator::Vector2<double>;
using double4 = emulator::Vector4<double>;

inline uchar2 make_uchar2(unsigned char x, unsigned char y) { return {x, y}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline double4 make_double4(double x, double y, double z, double w) { return {x, y, z, w}; }

// Bits.

namespace emulator {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits_as<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15, byte = bytes >> 8 * (pick & 7) & 255;
    result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

// Arithmetic. The named roundings are never contracted; nvcc contracts a * b + c elsewhere, g++ does not here.

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return std::fmin(x, y);  // a number rather than NaN
  return y < x ? y : x;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return std::fmax(x, y);
  return x < y ? y : x;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline double rsqrt(double a) { return 1 / sqrt(a); }
inline float rsqrt(float a) { return rsqrtf(a); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }

namespace emulator {
// To an integer, at the ends of its range where the value is beyond it; 0 for NaN.
template <class To, class From>
To saturate(From x) {
  if (isnan(x)) return 0;
  if (x >= -static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::max();
  if (x <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  return static_cast<To>(x);
}
}  // namespace emulator

inline int __float2int_rd(float x) { return emulator::saturate<int>(floorf(x)); }
inline int __float2int_ru(float x) { return emulator::saturate<int>(ceilf(x)); }
inline int __float2int_rn(float x) { return emulator::saturate<int>(rintf(x)); }
inline int __float2int_rz(float x) { return emulator::saturate<int>(truncf(x)); }
inline int __double2int_rd(double x) { return emulator::saturate<int>(floor(x)); }
inline int __double2int_ru(double x) { return emulator::saturate<int>(ceil(x)); }
inline int __double2int_rn(double x) { return emulator::saturate<int>(rint(x)); }
inline int __double2int_rz(double x) { return emulator::saturate<int>(trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// Memory.

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {
template <class T>
struct Identity {
  using Type = T;
};
template <class T>
using Same = typename Identity<T>::Type;  // a parameter that the type is not deduced from

template <class T, class F>
T exchange(T* pointer, F next) {
  in_atomic = true;
  const T old = *pointer;
  *pointer = next(old);
  in_atomic = false;
  return old;
}
}  // namespace emulator

template <class T>
T atomicAdd(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) {
    if constexpr (std::is_integral_v<T>)  // wraps
      return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
    else
      return old + value;
  });
}
template <class T>
T atomicOr(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) { return old & value; });
}
template <class T>
T atomicXor(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) { return old ^ value; });
}
template <class T>
T atomicMax(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* pointer, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* pointer, emulator::Same<T> compare, emulator::Same<T> value) {
  return emulator::exchange(pointer, [&](T old) { return old == compare ? value : old; });
}

// What the threads of a block do together.

inline void __syncthreads(emulator::Site site = emulator::Site::here()) {
  emulator::barrier("__syncthreads", emulator::Vote::kNone, 0, site);
}
inline int __syncthreads_count(int vote, emulator::Site site = emulator::Site::here()) {
  return emulator::barrier("__syncthreads_count", emulator::Vote::kCount, vote, site);
}
inline int __syncthreads_and(int vote, emulator::Site site = emulator::Site::here()) {
  return emulator::barrier("__syncthreads_and", emulator::Vote::kAnd, vote, site);
}
inline int __syncthreads_or(int vote, emulator::Site site = emulator::Site::here()) {
  return emulator::barrier("__syncthreads_or", emulator::Vote::kOr, vote, site);
}

// What the lanes of a warp do together.

namespace emulator {
template <class T>
T shuffled(const char* name, uint32_t mask, Shuffle kind, T value, int by, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(name, mask, kind, bits, by, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Operation has no state.
template <class T, class Operation>
void perform_reduce(void* const* arguments, uint32_t mask) {
  const int first = __builtin_ctz(mask);
  T result = *static_cast<T*>(arguments[first]);
  for (int i = first + 1; i < warpSize; ++i)
    if (mask >> i & 1) result = Operation()(result, *static_cast<T*>(arguments[i]));
  for (int i = first; i < warpSize; ++i)
    if (mask >> i & 1) *static_cast<T*>(arguments[i]) = result;
}

template <class T, class Operation>
T reduce(const char* name, uint32_t mask, T value, Operation, Site site) {
  meet_warp(name, perform_reduce<T, Operation>, mask, &value, site);
  return value;
}

struct Smaller {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xFFFFFFFF, emulator::Site site = emulator::Site::here()) {
  emulator::sync_warp(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int vote, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("__ballot_sync", mask, vote, site);
}
inline int __any_sync(unsigned mask, int vote, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("__any_sync", mask, vote, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot("__all_sync", mask, vote, site) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffled("__shfl_sync", mask, emulator::Shuffle::kIndex, value, source, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffled("__shfl_up_sync", mask, emulator::Shuffle::kUp, value, delta, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::here()) {
  return emulator::shuffled("__shfl_down_sync", mask, emulator::Shuffle::kDown, value, delta, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffled("__shfl_xor_sync", mask, emulator::Shuffle::kXor, value, bits, width, site);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
  using Unsigned = std::make_unsigned_t<T>;  // wraps
  return static_cast<T>(
      emulator::reduce("__reduce_add_sync", mask, static_cast<Unsigned>(value), std::plus<Unsigned>(), site));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce("__reduce_min_sync", mask, value, emulator::Smaller(), site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce("__reduce_max_sync", mask, value, emulator::Larger(), site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce("__reduce_or_sync", mask, value, std::bit_or<unsigned>(), site);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce("__reduce_and_sync", mask, value, std::bit_and<unsigned>(), site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, emulator::Site site = emulator::Site::here()) {
  return emulator::reduce("__reduce_xor_sync", mask, value, std::bit_xor<unsigned>(), site);
}

// The runtime.

struct CUstream_st {};
using cudaStream_t = CUstream_st*;

namespace emulator {
inline CUstream_st the_stream;
inline cudaStream_t stream = nullptr;  // the current one: &the_stream while an operator has a device

inline void check_stream(const char* name, cudaStream_t given) {
  if (given != stream) fail("%s is not on the current stream", name);
}
}  // namespace emulator

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  emulator::check_stream("cudaMemsetAsync", stream);
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
