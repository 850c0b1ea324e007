// Tiles: some pixels of one image and some channels of a map, copied to shared memory and back.
//
// A tile keeps the order of its map: a row for each channel (NCHW) or a row for each pixel (channels_last). A thread
// moves chunks of 16 bytes at one column of the tile, row by row. They are copied asynchronously where the strides are
// multiples of 4 bytes; chunks at odd addresses are put together from aligned words, and those of other strides or
// dtypes from their elements. The chunks are swizzled within their row, so that the 8 rows that the tensor cores read
// at one column lie in different banks.
#pragma once
#include <cuda/ptx.cuh>

#include "pyramid.cuh"

namespace sea {

// A matrix in shared memory: rows of `pitch` elements, 64 bytes or a multiple of 128.
template <class X>
struct Matrix {
  X* data;  // [rows, pitch]
  int pitch;

  __device__ unsigned swizzle(unsigned row) const {
    return pitch * static_cast<int>(sizeof(X)) == 64 ? row / 2 % 4 : row % 8;
  }
  __device__ X* at(unsigned row, unsigned column) const {
    constexpr unsigned kChunk = 16 / sizeof(X);
    return data + (row * pitch + ((column / kChunk ^ swizzle(row)) * kChunk | column % kChunk));
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

// 16 bytes' worth of pixels of one channel.
template <class X>
__device__ inline Packed<X> read_packed(const Tile<X>& tile, int channel, int pixel) {
  if (!tile.pixel_rows) return load_packed(tile.matrix.at(channel, pixel));
  Packed<X> packed;
#pragma unroll
  for (int k = 0; k < Packed<X>::kSize; ++k) packed.x[k] = *tile.matrix.at(pixel + k, channel);
  return packed;
}

template <class X, class T>
__device__ inline void read_pixels(const Tile<X>& tile, int channel, int pixel, T (&x)[Packed<X>::kSize]) {
  if (!tile.pixel_rows) {
    widen(load_packed(tile.matrix.at(channel, pixel)), x);
  } else {
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) x[k] = widen(*tile.matrix.at(pixel + k, channel));
  }
}

template <class X, class T>
__device__ inline void write_pixels(const Tile<X>& tile, int channel, int pixel, const T (&x)[Packed<X>::kSize]) {
  const Packed<X> packed = narrow<X>(x);
  if (!tile.pixel_rows) {
    store_packed(tile.matrix.at(channel, pixel), packed);
  } else {
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) *tile.matrix.at(pixel + k, channel) = packed.x[k];
  }
}

// A map of any strides as the kernels read and write it, and how its tiles lie in memory.
struct TileMap {
  void* data;         // [batch, channels, height, width]
  int64_t stride[4];  // in elements
  Dtype dtype;
  int32_t width;
  bool pixel_rows;  // of its tiles
  bool unit;        // the elements of a row of a tile are neighbors
  uint8_t aligned;  // bytes, a power of two up to 16, that the chunks of a tile are aligned to, if `unit`

  TileMap() = default;
  explicit TileMap(const Map& map)
      : data(map.data),
        stride{map.stride[0], map.stride[1], map.stride[2], map.stride[3]},
        dtype(map.dtype),
        width(static_cast<int32_t>(map.width)) {
    const bool even = map.height == 1 || map.stride[2] == map.stride[3] * map.width;
    const bool pixels_together = even && map.stride[3] == 1;
    pixel_rows = even && map.stride[1] == 1 && !pixels_together;
    unit = pixels_together || pixel_rows;
    const int64_t element = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
    const int64_t across = pixel_rows ? stride[3] : stride[1];
    const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>((across | stride[0]) * element) | 16;
    aligned = static_cast<uint8_t>(bits & (~bits + 1));
  }

  // Where an image's pixel or channel lies, in elements.
  __device__ int64_t offset_of_pixel(int pixel) const { return pixel / width * stride[2] + pixel % width * stride[3]; }
  __device__ int64_t offset_of(int64_t image, int64_t channel, int pixel) const {
    return image * stride[0] + channel * stride[1] + offset_of_pixel(pixel);
  }
};

// For the weights of tiles: what it costs to move a tile of a map, over what one of aligned rows costs. From the
// strides alone, and not from where the map happens to lie, since weights decide where sums are cut.
inline double moving_cost(Map map, double words, double elements) {  // of rows that are aligned to 4 bytes; to less
  map.data = nullptr;
  const TileMap tiles(map);
  return tiles.unit && tiles.aligned == 16 ? 1 : tiles.unit && tiles.aligned >= 4 ? words : elements;
}

// What a thread moves of a matrix: kCount elements at one column of every step-th row. So many threads share it; those
// of a block may be divided into groups of so many that have a matrix each.
template <int kCount>
struct Share {
  int row, step, column;

  __device__ Share(int threads, int columns) {  // columns: of the matrix; a power of two
    const int shift = 31 - __clz(columns / kCount), thread = thread_index() & (threads - 1);
    row = thread >> shift;
    step = threads >> shift;
    column = (thread - (row << shift)) * kCount;
  }
};

// Starts to copy rows of neighbors, kBytes at a time. Beyond the valid rows and columns the matrix becomes zero.
template <int kBytes, class X>
__device__ inline void copy_rows(const Matrix<X>& matrix, int threads, int rows,
                                 const X* source,  // [valid_rows, valid_columns]
                                 int64_t stride, int valid_rows, int valid_columns) {
  const Share<kBytes / sizeof(X)> share(threads, matrix.pitch);
  const X* from = source + share.row * stride + share.column;
  if (rows <= valid_rows && matrix.pitch <= valid_columns) {
#pragma unroll(kBytes == 16 ? 4 : 8)
    for (int row = share.row; row < rows; row += share.step, from += share.step * stride)
      copy_async<kBytes>(matrix.at(row, share.column), from, kBytes);
  } else {
#pragma unroll 1
    for (int row = share.row; row < rows; row += share.step, from += share.step * stride)
      copy_async<kBytes>(matrix.at(row, share.column), from,
                         row < valid_rows && share.column < valid_columns ? kBytes : 0);
  }
}

// A chunk of 16-bit elements at any address, from aligned words. Those from `count` on are not read, and are zero; but
// the first word may begin with the element before. kWhole: count is 0 or 8.
template <bool kWhole, class X>
__device__ inline Packed<X> load_unaligned(const X* from, int count) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  const uint32_t* aligned = reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
  const int odd = address >> 1 & 1;
  const auto half = [&](int k) { return uint32_t{*reinterpret_cast<const uint16_t*>(aligned + k)}; };
  uint32_t words[5] = {};
  if constexpr (kWhole) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (count > 0) words[k] = aligned[k];
    if (count > 0 && odd) words[4] = half(4);
  } else {
#pragma unroll
    for (int k = 0; k < 5; ++k)
      if (count > 0 && count + odd >= 2 * k + 2)
        words[k] = aligned[k];
      else if (count > 0 && count + odd == 2 * k + 1)
        words[k] = half(k);
  }
  Packed<X> out;
#pragma unroll
  for (int k = 0; k < 4; ++k) out.words[k] = __byte_perm(words[k], words[k + 1], odd ? 0x5432 : 0x3210);
  return out;
}

// Stores a chunk at any address.
template <class X>
__device__ inline void store_unaligned(X* to, const Packed<X>& chunk) {
  if constexpr (sizeof(X) > 2) {
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) to[k] = chunk.x[k];
  } else if (reinterpret_cast<uintptr_t>(to) & 2) {
    to[0] = chunk.x[0];
#pragma unroll
    for (int k = 0; k < 3; ++k)
      reinterpret_cast<uint32_t*>(to + 1)[k] = __byte_perm(chunk.words[k], chunk.words[k + 1], 0x5432);
    to[7] = chunk.x[7];
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) reinterpret_cast<uint32_t*>(to)[k] = chunk.words[k];
  }
}

// Calls f with a null pointer to the type of a map's elements, which is X if X has 16 bits.
template <class X, class F>
__device__ inline void with_dtype(Dtype dtype, F f) {
  if constexpr (sizeof(X) == 2)
    f(static_cast<X*>(nullptr));
  else if (dtype == Dtype::float64)
    f(static_cast<double*>(nullptr));
  else if (dtype == Dtype::float16)
    f(static_cast<__half*>(nullptr));
  else if (dtype == Dtype::bfloat16)
    f(static_cast<__nv_bfloat16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

// The tile that load_tile() makes of a map.
template <class X>
__device__ inline Tile<X> make_tile(X* data,  // as in load_tile()
                                    const TileMap& map, int pixels, int width) {
  return {{data, map.pixel_rows ? width : pixels}, map.pixel_rows};
}

// Chosen piece by piece: a choice between the tiles themselves would put them into local memory.
template <class X>
__device__ inline Tile<X> tile_of(const Tile<X> (&tiles)[2], int side) {
  return {{side ? tiles[1].matrix.data : tiles[0].matrix.data, side ? tiles[1].matrix.pitch : tiles[0].matrix.pitch},
          side ? tiles[1].pixel_rows : tiles[0].pixel_rows};
}

// Calls f(tiles of student and teacher), whose rows are pixels or channels. Where both lie alike, f is compiled for
// that.
template <class X, class F>
__device__ inline void with_tiles(X* const (&data)[2],  // as in load_tile()
                                  bool student_rows, bool teacher_rows, int pixels, int width, F f) {
  const auto call = [&](bool student, bool teacher) {
    const Tile<X> tiles[2] = {{{data[0], student ? width : pixels}, student},
                              {{data[1], teacher ? width : pixels}, teacher}};
    f(tiles);
  };
  if (!student_rows && !teacher_rows)
    call(false, false);
  else if (student_rows && teacher_rows)
    call(true, true);
  else
    call(student_rows, teacher_rows);
}

// Starts to load `count` pixels from `first` on and `channels` channels from c0 on. The rest of the tile, up to
// `pixels` pixels and `width` channels, becomes zero. Readers wait for the copies and then for a barrier. `threads`, a
// power of two, share the work; like the tile's sizes, it is best a constant.
template <class X>
__device__ inline void load_tile(X* data,  // [width, pixels] or [pixels, width], as the map lies
                                 const TileMap& map, int64_t image, int first, int count, int pixels, int64_t c0,
                                 int channels, int width, int threads) {
  constexpr int kSize = Packed<X>::kSize;
  const auto load = [&](int rows, int columns, int valid_rows, int valid_columns, int64_t stride, int64_t start) {
    const Matrix<X> matrix{data, columns};
    const bool same = map.unit && map.dtype == kDtype<X>;
    if (same && map.aligned >= 4 && (valid_columns * static_cast<int>(sizeof(X)) & (map.aligned - 1)) == 0) {
      const X* source = static_cast<const X*>(map.data) + start;
      if (map.aligned == 16)
        copy_rows<16>(matrix, threads, rows, source, stride, valid_rows, valid_columns);
      else if (map.aligned == 8)
        copy_rows<8>(matrix, threads, rows, source, stride, valid_rows, valid_columns);
      else if constexpr (sizeof(X) <= 4)
        copy_rows<4>(matrix, threads, rows, source, stride, valid_rows, valid_columns);
      return;
    }
    const Share<kSize> share(threads, columns);
    const int valid = part_of(valid_columns - share.column, kSize);
    if constexpr (sizeof(X) == 2)
      if (same) {
        const auto load_chunks = [&](auto whole) {
          constexpr bool kWhole = decltype(whole)::value;
          constexpr int kBatch = kWhole ? 2 : 1;  // chunks whose words are under way at once
          const X* from = static_cast<const X*>(map.data) + start + share.row * stride + share.column;
#pragma unroll 1
          for (int row = share.row; row < rows; row += kBatch * share.step) {
            Packed<X> chunks[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i, from += share.step * stride)
              chunks[i] = load_unaligned<kWhole>(from, row + i * share.step < valid_rows ? valid : 0);
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
              if (row + i * share.step < rows) store_packed(matrix.at(row + i * share.step, share.column), chunks[i]);
          }
        };
        if (valid == 0 || valid == kSize)
          load_chunks(std::true_type());
        else
          load_chunks(std::false_type());
        return;
      }
    with_dtype<X>(map.dtype, [&](auto* null) {
      using S = std::remove_pointer_t<decltype(null)>;
      constexpr int kPart = kSize < 4 ? kSize : 4;  // elements whose offsets are in registers at once
#pragma unroll 1
      for (int part = 0; part < kSize; part += kPart) {
        int64_t offsets[kPart];
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          const int column = share.column + part + k;
          offsets[k] = part + k >= valid ? 0 : map.unit ? column : map.offset_of_pixel(first + column);
        }
        const S* from = static_cast<const S*>(map.data) + start + share.row * stride;
#pragma unroll 1
        for (int row = share.row; row < rows; row += share.step, from += share.step * stride) {
          Packed<X, kPart> values;
#pragma unroll
          for (int k = 0; k < kPart; ++k)
            values.x[k] = part + k < valid && row < valid_rows ? convert<X>(from[offsets[k]]) : convert<X>(S());
          *reinterpret_cast<Packed<X, kPart>*>(matrix.at(row, share.column + part)) = values;
        }
      }
    });
  };
  const int64_t start = image * map.stride[0] + c0 * map.stride[1] + (map.unit ? first * map.stride[3] : 0);
  if (map.pixel_rows)
    load(pixels, width, count, channels, map.stride[3], start);
  else
    load(width, pixels, channels, count, map.stride[1], start);
}

// Writes the first `count` pixels and `channels` channels of a tile to a map; `threads` as in load_tile().
template <class X>
__device__ inline void store_tile(const Tile<X>& tile, const TileMap& map, int64_t image, int first, int count,
                                  int64_t c0, int channels, int threads) {
  constexpr int kSize = Packed<X>::kSize;
  const Share<kSize> share(threads, tile.matrix.pitch);
  const int rows = tile.pixel_rows ? count : channels;
  const int valid = part_of((tile.pixel_rows ? channels : count) - share.column, kSize);
  if (valid == 0) return;
  const auto chunk = [&](int row) { return *reinterpret_cast<const Packed<X>*>(tile.matrix.at(row, share.column)); };
  const int64_t start = image * map.stride[0] + c0 * map.stride[1];
  if (map.unit && map.dtype == kDtype<X> && map.pixel_rows == tile.pixel_rows && valid == kSize) {
    const int64_t stride = map.pixel_rows ? map.stride[3] : map.stride[1];
    const auto store = [&](auto put) {
      X* to = static_cast<X*>(map.data) + start + first * map.stride[3] + share.row * stride + share.column;
      for (int row = share.row; row < rows; row += share.step, to += share.step * stride) put(to, chunk(row));
    };
    if (map.aligned == 16)
      store([](X* to, const Packed<X>& x) { *reinterpret_cast<Packed<X>*>(to) = x; });
    else
      store([&](X* to, const Packed<X>& x) { store_unaligned(to, x); });
    return;
  }
  with_dtype<X>(map.dtype, [&](auto* null) {
    using S = std::remove_pointer_t<decltype(null)>;
    int64_t offsets[kSize];  // of the elements of a chunk
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      offsets[k] = k >= valid        ? 0
                   : tile.pixel_rows ? (share.column + k) * map.stride[1]
                                     : map.offset_of_pixel(first + share.column + k);
#pragma unroll 1
    for (int row = share.row; row < rows; row += share.step) {
      const Packed<X> x = chunk(row);
      S* to = static_cast<S*>(map.data) + start +
              (tile.pixel_rows ? map.offset_of_pixel(first + row) : row * map.stride[1]);
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        if (k < valid) to[offsets[k]] = convert<S>(x.x[k]);
    }
  });
}

}  // namespace sea
