// Tiles: some pixels of one image and some channels of a map, copied to shared memory.
//
// A tile keeps the order of its map: a row for each channel (NCHW) or a row for each pixel (channels_last), so that
// both are copied asynchronously, 16 bytes at a time where the strides allow it. The chunks of 16 bytes are swizzled
// within their row, so that the 8 rows that the tensor cores read at one column lie in different banks.
#pragma once
#include <cuda/ptx.cuh>

#include "pyramid.cuh"

namespace sea {

// A matrix in shared memory: rows of `pitch` elements, 64 bytes or a multiple of 128.
template <class X>
struct Matrix {
  X* data;  // [rows, pitch]
  int pitch;

  __device__ X* at(int row, int column) const {
    constexpr int kChunk = 16 / sizeof(X);
    const int swizzle = pitch * static_cast<int>(sizeof(X)) == 64 ? row / 2 % 4 : row % 8;
    return data + row * pitch + ((column / kChunk ^ swizzle) * kChunk | column % kChunk);
  }
};

template <class X>
struct Tile {
  Matrix<X> matrix;
  bool pixel_rows;

  __device__ X* at(int channel, int pixel) const {
    return pixel_rows ? matrix.at(pixel, channel) : matrix.at(channel, pixel);
  }
};

// 16 bytes' worth of pixels of one channel, widened.
template <class X, class T>
__device__ inline void read_pixels(const Tile<X>& tile, int channel, int pixel, T (&x)[Packed<X>::kSize]) {
  if (tile.pixel_rows) {
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) x[k] = widen(*tile.matrix.at(pixel + k, channel));
  } else {
    const Packed<X> packed = *reinterpret_cast<const Packed<X>*>(tile.matrix.at(channel, pixel));
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) x[k] = widen(packed.x[k]);
  }
}

// How a map lies in memory.
struct Layout {
  bool even;        // all pixels of an image have one stride
  bool pixel_rows;  // of its tiles
  int vector;       // bytes that can be copied at once; 0: it has to be copied element by element

  // type, element: of the tile
  __device__ Layout(const Map& map, Dtype type, int element) {
    even = map.height == 1 || map.stride[2] == map.stride[3] * map.width;
    const bool pixels_together = even && map.stride[3] == 1;
    pixel_rows = map.stride[1] == 1 && !pixels_together;
    const int64_t across = pixel_rows ? map.stride[3] : map.stride[1];
    uint64_t bits = reinterpret_cast<uint64_t>(map.data) | static_cast<uint64_t>(across * element) |
                    static_cast<uint64_t>(map.stride[0] * element) | 16;
    vector = static_cast<int>(bits & (~bits + 1));
    if (map.dtype != type || vector < 4 || vector < element || !(pixels_together || (pixel_rows && even))) vector = 0;
  }
};

__device__ inline int64_t offset_of(const Map& map, int64_t image, int64_t channel, int pixel) {
  const int width = static_cast<int>(map.width);
  return image * map.stride[0] + channel * map.stride[1] + pixel / width * map.stride[2] +
         pixel % width * map.stride[3];
}

template <int kBytes, class X>
__device__ inline void copy_rows(const Matrix<X>& matrix, int rows, int columns,
                                 const X* source,  // [valid_rows, valid_columns]
                                 int64_t stride, int valid_rows, int valid_columns) {
  constexpr int kElements = kBytes / sizeof(X);
  const int per_row = columns / kElements;
  for (int i = threadIdx.x; i < rows * per_row; i += blockDim.x) {
    const int row = i / per_row, column = i % per_row * kElements;
    const int valid = row < valid_rows ? part_of(valid_columns - column, kElements) : 0;
    const X* from = valid > 0 ? source + row * stride + column : source;
    copy_async<kBytes>(matrix.at(row, column), from, valid * static_cast<int>(sizeof(X)));
  }
}

// The tile that load_tile() makes of a map.
template <class X>
__device__ inline Tile<X> make_tile(X* data,  // as in load_tile()
                                    const Map& map, int pixels, int width) {
  const Layout layout(map, kDtype<X>, sizeof(X));
  return {{data, layout.pixel_rows ? width : pixels}, layout.pixel_rows};
}

// Starts to load `count` pixels from `first` on and `channels` channels from c0 on. The rest of the tile, up to
// `pixels` pixels and `width` channels, becomes zero. Readers wait for the copies and then for a barrier.
template <class X>
__device__ inline void load_tile(X* data,  // [width, pixels] or [pixels, width], as the map lies
                                 const Map& map, int64_t image, int first, int count, int pixels, int64_t c0,
                                 int channels, int width) {
  const Layout layout(map, kDtype<X>, sizeof(X));
  const Tile<X> tile = make_tile(data, map, pixels, width);
  const int rows = layout.pixel_rows ? pixels : width, columns = layout.pixel_rows ? width : pixels;
  const int valid_rows = layout.pixel_rows ? count : channels, valid_columns = layout.pixel_rows ? channels : count;
  if (layout.vector) {
    const X* source =
        static_cast<const X*>(map.data) + image * map.stride[0] + c0 * map.stride[1] + first * map.stride[3];
    const int64_t stride = layout.pixel_rows ? map.stride[3] : map.stride[1];
    if (layout.vector == 16) copy_rows<16>(tile.matrix, rows, columns, source, stride, valid_rows, valid_columns);
    if (layout.vector == 8) copy_rows<8>(tile.matrix, rows, columns, source, stride, valid_rows, valid_columns);
    if constexpr (sizeof(X) <= 4)
      if (layout.vector == 4) copy_rows<4>(tile.matrix, rows, columns, source, stride, valid_rows, valid_columns);
    return;
  }
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int row = i / columns, column = i % columns;
    const int channel = layout.pixel_rows ? column : row, pixel = layout.pixel_rows ? row : column;
    X value = narrow<X>(0.f);
    if (row < valid_rows && column < valid_columns)
      value = load_as<X>(map.data, map.dtype, offset_of(map, image, c0 + channel, first + pixel));
    *tile.matrix.at(row, column) = value;
  }
}

// Writes a tile to a map.
template <class X>
__device__ inline void store_tile(const Tile<X>& tile, const Map& map, int64_t image, int first, int count, int64_t c0,
                                  int channels) {
  constexpr int kElements = Packed<X>::kSize;
  const Layout layout(map, kDtype<X>, sizeof(X));
  const int rows = layout.pixel_rows ? count : channels, columns = layout.pixel_rows ? channels : count;
  if (layout.vector == 16 && layout.pixel_rows == tile.pixel_rows) {
    const int64_t stride = layout.pixel_rows ? map.stride[3] : map.stride[1];
    X* target = static_cast<X*>(map.data) + image * map.stride[0] + c0 * map.stride[1] + first * map.stride[3];
    const int per_row = (columns + kElements - 1) / kElements;
    for (int i = threadIdx.x; i < rows * per_row; i += blockDim.x) {
      const int row = i / per_row, column = i % per_row * kElements;
      X* out = target + row * stride + column;
      const X* from = tile.matrix.at(row, column);
      if (column + kElements <= columns)
        *reinterpret_cast<Packed<X>*>(out) = *reinterpret_cast<const Packed<X>*>(from);
      else
        for (int k = 0; k < columns - column; ++k) out[k] = from[k];
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int row = i / columns, column = i % columns;
    const int channel = layout.pixel_rows ? column : row, pixel = layout.pixel_rows ? row : column;
    store_as(map.data, map.dtype, offset_of(map, image, c0 + channel, first + pixel), *tile.at(channel, pixel));
  }
}

}  // namespace sea
