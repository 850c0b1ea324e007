// The raster rule: which rows and columns of a map a box covers. It is exact: every operation is rounded separately, in
// the type of the boxes, so that every device finds the same masks. Code that includes this must be compiled without
// -ffast-math and, on the CPU, with -ffp-contract=off.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SEA_HOST_DEVICE __host__ __device__
#else
#define SEA_HOST_DEVICE
#endif

namespace sea {

// Sums whose second operand is a product, which nvcc would otherwise contract to one operation with one rounding.
template <class T>
SEA_HOST_DEVICE inline T add_rounded(T a, T product) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8)
    return __dadd_rn(a, product);
  else
    return __fadd_rn(a, product);
#else
  return a + product;
#endif
}

// Not a template, because a template would also accept an array, whose difference with itself is always 0.
SEA_HOST_DEVICE inline bool is_finite(float x) { return x - x == 0; }
SEA_HOST_DEVICE inline bool is_finite(double x) { return x - x == 0; }

template <class T>
SEA_HOST_DEVICE inline bool is_finite(const T* box) {  // [4]
  return is_finite(box[0]) && is_finite(box[1]) && is_finite(box[2]) && is_finite(box[3]);
}

template <class T>
SEA_HOST_DEVICE inline bool is_valid(const T* box) {  // [4] x1 y1 x2 y2
  return is_finite(box) && box[2] >= box[0] && box[3] >= box[1];
}

// Rows or columns [begin, end) of a map.
struct Interval {
  int32_t begin, end;

  SEA_HOST_DEVICE bool empty() const { return begin >= end; }
};

// floor(low / stride) .. max(ceil(high / stride), floor(low / stride) + 1) - 1, clipped to the map. NaN covers nothing.
template <class T>
SEA_HOST_DEVICE inline Interval cover(T low, T high, T stride, int32_t size) {
  using std::ceil;
  using std::floor;
  const T first = floor(low / stride), reach = ceil(high / stride), next = first + 1;
  const T last = reach < next ? next : reach, limit = static_cast<T>(size);
  if (!(first < limit) || !(last > 0)) return {0, 0};
  return {first > 0 ? static_cast<int32_t>(first) : 0, last < limit ? static_cast<int32_t>(last) : size};
}

// How many rows or columns of a map lie inside an image of this height or width.
template <class T>
SEA_HOST_DEVICE inline int32_t cover_image(T image_size, T stride, int32_t size) {
  return image_size > 0 ? cover(T(0), image_size, stride, size).end : 0;
}

// The box with the same center and sides scaled by the ratio.
template <class T>
SEA_HOST_DEVICE inline void center_box(const T* box, T ratio, T* center) {  // [4], [4]
  for (int i = 0; i < 2; ++i) {
    const T middle = (box[i] + box[i + 2]) / 2, half = ratio * (box[i + 2] - box[i]) / 2;
    center[i] = add_rounded(middle, -half);
    center[i + 2] = add_rounded(middle, half);
  }
}

}  // namespace sea
