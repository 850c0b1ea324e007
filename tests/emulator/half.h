// Conversions of the two 16-bit floating-point types: to nearest, ties to even; NaN becomes 0x7FFF, as on the GPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_runtime.h"

namespace emulator {

template <int kMantissa>
inline constexpr int kBias = (1 << (14 - kMantissa)) - 1;

template <int kMantissa>
uint16_t narrow(double x) {
  constexpr int bias = kBias<kMantissa>;
  constexpr uint16_t infinity = (2 * bias + 1) << kMantissa;
  uint64_t bits = bits_as<uint64_t>(x);
  const uint16_t sign = bits >> 63 << 15;
  bits &= ~uint64_t{0} >> 1;
  if (bits > uint64_t{0x7FF} << 52) return 0x7FFF;
  const int exponent = static_cast<int>(bits >> 52) - 1023;
  if (exponent > bias) return sign | infinity;
  const int scale = std::max(exponent, 1 - bias);  // below it, numbers are subnormal
  const int dropped = 52 - kMantissa + scale - exponent;
  if (dropped > 53) return sign;
  const uint64_t significand = (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
  const uint64_t rest = significand & ((uint64_t{1} << dropped) - 1), half = uint64_t{1} << (dropped - 1);
  uint64_t kept = significand >> dropped;
  kept += rest > half || (rest == half && kept & 1);
  return sign |
         static_cast<uint16_t>(((scale + bias - 1) << kMantissa) + kept);  // kept's top bit adds 1 to the exponent
}

template <int kMantissa>
float widen(uint16_t bits) {
  constexpr int bias = kBias<kMantissa>;
  const uint32_t sign = uint32_t{bits} >> 15 << 31, magnitude = bits & 0x7FFF;
  const uint32_t exponent = magnitude >> kMantissa;
  if (exponent == 2 * bias + 1) return bits_as<float>(sign | 0x7F800000 | magnitude << (23 - kMantissa));
  if (bias == 127) return bits_as<float>(sign | magnitude << 16);
  if (exponent == 0)
    return std::copysign(std::ldexp(static_cast<float>(magnitude), 1 - bias - kMantissa), bits_as<float>(sign));
  return bits_as<float>(sign | ((magnitude << (23 - kMantissa)) + (uint32_t{127 - bias} << 23)));
}

// kMantissa 7: bfloat16; 10: half.
template <int kMantissa>
struct Half {
  uint16_t bits;
  Half() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  Half(T x) : bits(narrow<kMantissa>(static_cast<double>(x))) {}
  operator float() const { return widen<kMantissa>(bits); }
};

template <int kMantissa>
struct alignas(4) Half2 {
  Half<kMantissa> x, y;
};

template <int kMantissa>
Half<kMantissa> half_of_bits(uint16_t bits) {
  return bits_as<Half<kMantissa>>(bits);
}

}  // namespace emulator
