// What the kernels use of CUDA's half, by the same names.
#pragma once
#include "half.h"

using __half = emulator::Half<10>;
using half = __half;
using __half2 = emulator::Half2<10>;

inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __double2half(double x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return emulator::half_of_bits<10>(bits); }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline float __low2float(__half2 x) { return x.x; }
inline float __high2float(__half2 x) { return x.y; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }  // a number rather than NaN
