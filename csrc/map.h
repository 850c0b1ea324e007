// The arguments that all kernels share: maps as pointers with strides, and loss flags. No torch here.
#pragma once
#include <cstdint>

namespace sea {

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// One feature map of one pyramid level.
struct Map {
  void* data;  // [batch, channels, height, width], any strides
  Dtype dtype;
  int64_t batch, channels, height, width;
  int64_t stride[4];  // in elements

  __attribute__((always_inline)) int64_t pixels() const { return batch * height * width; }
};

inline Map make_map(void* data, Dtype dtype, const int64_t* sizes, const int64_t* strides) {  // [4] each
  Map map{data, dtype, sizes[0], sizes[1], sizes[2], sizes[3], {strides[0], strides[1], strides[2], strides[3]}};
  // The stride of a dimension of size 1 means nothing. Choose one that makes the pixels evenly spaced.
  if (map.height == 1 && map.width == 1) map.stride[2] = map.stride[0];
  if (map.width == 1) map.stride[3] = map.stride[2];
  return map;
}

// Loss flags: the losses that one set of maps takes part in.
enum LossFlag : int64_t { kAnchor = 1, kDistance = 2, kLocalization = 4 };

// What regions know about 32 neighboring pixels of an image of a level, a bit each.
struct RunWord {
  uint32_t starts;  // it is the first of its image, or differs from the pixel before in masks or in `inside`
  uint32_t inside;  // it lies inside its image
  uint32_t valid;   // it lies in a mask
};

// Rows and columns of a level that lie inside an image.
struct Extent {
  int32_t rows, columns;
};

}  // namespace sea
