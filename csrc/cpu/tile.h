// A tile: some pixels of a map, copied to a small dense buffer in the type that is computed in, and back. Code that
// computes on tiles does not depend on layouts, strides and 16-bit types.
#pragma once
#include <map.h>

#include <type_traits>

#include "vec.h"

namespace sea {
namespace SEA_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  // Shifted into a float32 the exponent is 112 too small; a multiplication corrects it, subnormals included.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return bit_cast<float>(value | (x.bits & 0x8000u) << 16);
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void narrow(float x, Half& out) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 makes the float32 adder round at the right place.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t value = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : large;
  out.bits = static_cast<uint16_t>(value | (bits >> 16 & 0x8000u));
}
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
template <class Small>
inline void narrow(double x, Small& out) {
  narrow(static_cast<float>(x), out);
}

// One vector of any type as the type computed in, and back. The last argument only says which type that is.
template <class In, class T>
inline Vec<T> read(const In* p, T) {
  T block[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) block[i] = static_cast<T>(widen(p[i]));
  return load(block);
}
template <class Out, class T>
inline void write(Out* p, Vec<T> x, T) {
  T block[kLanes<T>];
  store(block, x);
  for (int i = 0; i < kLanes<T>; ++i) narrow(block[i], p[i]);
}
template <class T>
inline Vec<T> read(const T* p, T) {
  return load(p);
}
template <class T>
inline void write(T* p, Vec<T> x, T) {
  store(p, x);
}

typedef uint16_t Bits16 __attribute__((vector_size(SEA_VECTOR_BYTES / 2)));
inline Vec<float> read(const BFloat16* p, float) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}
inline void write(BFloat16* p, Vec<float> x, float) {
  const Bits32 bits = bit_cast<Bits32>(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Bits32 quiet = rounded - rounded + 0x7fc0u;
  const Bits16 out = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Bits16);
  std::memcpy(p, &out, sizeof out);
}
#if defined(__AVX512F__)
inline Vec<float> read(const Half* p, float) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void write(Half* p, Vec<float> x, float) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vec<float> read(const Half* p, float) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void write(Half* p, Vec<float> x, float) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <class T>
constexpr Dtype kDtype = std::is_same<T, float>::value ? Dtype::float32 : Dtype::float64;

// Calls f with a null pointer of the element type.
template <class F>
inline void visit(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(static_cast<float*>(nullptr));
    case Dtype::float64:
      return f(static_cast<double*>(nullptr));
    case Dtype::float16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

// Prefetches the cache lines of `count` elements. If the rows of a tile lie far apart, no hardware prefetcher follows
// them.
template <bool kWrite, class T>
inline void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i, kWrite, 2);
}

// out[r, c] = in[r, c] for a dense row-major out. Rows or columns of `in` that are contiguous are read as vectors. It
// prefetches the elements that lie `ahead` further on, in the next tile.
template <class In, class T>
inline void gather(int64_t rows, int64_t columns, const In* in, int64_t in_row, int64_t in_column, int64_t ahead,
                   T* out, int64_t out_row) {
  constexpr int n = kLanes<T>;
  int64_t done_rows = 0, done_columns = 0;
  if (in_column == 1) {
    done_rows = rows;
    done_columns = columns / n * n;
    for (int64_t r = 0; r < rows; ++r) {
      if (ahead) prefetch<false>(in + r * in_row + ahead, columns);
      for (int64_t c = 0; c < done_columns; c += n) store(out + r * out_row + c, read(in + r * in_row + c, T()));
    }
  } else if (in_row == 1) {
    done_rows = rows / n * n;
    done_columns = columns / n * n;
    for (int64_t c = 0; c < done_columns; c += n) {
      for (int i = 0; ahead && i < n; ++i) prefetch<false>(in + (c + i) * in_column + ahead, rows);
      for (int64_t r = 0; r < done_rows; r += n) {
        Vec<T> square[n];
        for (int i = 0; i < n; ++i) square[i] = read(in + r + (c + i) * in_column, T());
        transpose<T>(square);
        for (int j = 0; j < n; ++j) store(out + (r + j) * out_row + c, square[j]);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < done_rows ? done_columns : 0; c < columns; ++c)
      out[r * out_row + c] = static_cast<T>(widen(in[r * in_row + c * in_column]));
}

// Maps of at least this size are written past the caches.
constexpr int64_t kLargeBytes = 4 << 20;

// The reverse: out[r, c] = in[r, c] for a dense row-major in. `large`: the map is larger than the caches, so its lines
// are written without being fetched first. Lines of other maps are prefetched `ahead`.
template <class T, class Out>
inline void scatter(int64_t rows, int64_t columns, const T* in, int64_t in_row, Out* out, int64_t out_row,
                    int64_t out_column, int64_t ahead, bool large) {
  constexpr int n = kLanes<T>;
  int64_t done_rows = 0, done_columns = 0;
  if (out_column == 1) {
    done_rows = rows;
    done_columns = columns / n * n;
    for (int64_t r = 0; r < rows; ++r) {
      Out* row = out + r * out_row;
      if constexpr (std::is_same<Out, float>::value && std::is_same<T, float>::value)
        if (large && reinterpret_cast<uintptr_t>(row) % SEA_VECTOR_BYTES == 0) {
          for (int64_t c = 0; c < done_columns; c += n) stream(row + c, load(in + r * in_row + c));
          continue;
        }
      prefetch<true>(row + ahead, columns);
      for (int64_t c = 0; c < done_columns; c += n) write(row + c, load(in + r * in_row + c), T());
    }
  } else if (out_row == 1) {
    done_rows = rows / n * n;
    done_columns = columns / n * n;
    for (int64_t c = 0; c < done_columns; c += n)
      for (int64_t r = 0; r < done_rows; r += n) {
        Vec<T> square[n];
        for (int j = 0; j < n; ++j) square[j] = load(in + (r + j) * in_row + c);
        transpose<T>(square);
        for (int i = 0; i < n; ++i) write(out + r + (c + i) * out_column, square[i], T());
      }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < done_rows ? done_columns : 0; c < columns; ++c)
      narrow(in[r * in_row + c], out[r * out_row + c * out_column]);
}

// Calls f(column of the tile, pixels, offset of the first) for every stretch of the pixels [begin, end) of a map,
// counted over batch and rows, whose addresses are evenly spaced by stride[3].
template <class F>
inline void stretches(const Map& map, int64_t begin, int64_t end, F f) {
  const int64_t image = map.height * map.width;
  const bool rows_join = map.height == 1 || map.stride[2] == map.width * map.stride[3];
  const bool images_join = rows_join && (map.batch == 1 || map.stride[0] == image * map.stride[3]);
  for (int64_t n = begin; n < end;) {
    const int64_t b = n / image, y = n % image / map.width, x = n % map.width;
    int64_t stop = images_join ? end : rows_join ? (b + 1) * image : n - x + map.width;
    if (stop > end) stop = end;
    f(n - begin, stop - n, b * map.stride[0] + y * map.stride[2] + x * map.stride[3]);
    n = stop;
  }
}

// Calls f(image, begin, end) for every stretch of the pixels [begin, end) that lies inside its image.
template <class F>
inline void inside(const Map& map, const Extent* extents, int64_t begin, int64_t end, F f) {
  const int64_t image = map.height * map.width;
  for (int64_t n = begin; n < end;) {
    const int64_t b = n / image, y = n % image / map.width;
    const Extent whole{static_cast<int32_t>(map.height), static_cast<int32_t>(map.width)};
    const Extent extent = extents ? extents[b] : whole;
    const bool rows_join = extent.columns == map.width;
    int64_t next = b * image + (rows_join || y >= extent.rows ? image : (y + 1) * map.width);
    int64_t stop =
        b * image + (rows_join ? extent.rows * map.width : y * map.width + (y < extent.rows ? extent.columns : 0));
    if (stop > end) stop = end;
    if (n < stop) f(b, n, stop);
    n = next;
  }
}

// tile[c, n] <- map, for the channels [c0, c0 + channels) and the pixels [begin, end).
template <class T>
inline void read_channels(const Map& map, int64_t begin, int64_t end, int64_t c0, int64_t channels, T* tile,
                          int64_t tile_row) {
  visit(map.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(map.data) + c0 * map.stride[1];
    stretches(map, begin, end, [&](int64_t at, int64_t count, int64_t offset) {
      gather(channels, count, data + offset, map.stride[1], map.stride[3], count * map.stride[3], tile + at, tile_row);
    });
  });
}

// Vectors of a row of a tile.
template <class T>
constexpr int kVectors = kTilePixels / kLanes<T>;

// Some pixels of a tile.
template <class T>
struct Pixels {
  Mask<T> vectors[kVectors<T>];

  void add(int64_t from, int64_t to) {
    for (int v = 0; v < kVectors<T>; ++v) vectors[v] |= lanes_between<T>(from - v * kLanes<T>, to - v * kLanes<T>);
  }
};

// The pixels of a tile as rows of channels.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  int64_t ahead;  // where the next tile is; 0: it was prefetched when this one was copied
  T* operator[](int64_t c) const { return data + c * stride; }
  // To be called row by row between computations, so that memory and processor work at the same time.
  template <bool kWrite>
  void prefetch_next(int64_t c) const {
    if (ahead) prefetch<kWrite>(data + c * stride + ahead, kTilePixels);
  }
};

// The pixels [begin, end) of the channels from c0 on, where the map has them as rows of the type computed in. Else
// `data` is null.
template <class T>
inline Rows<T> map_rows(const Map& map, int64_t begin, int64_t end, int64_t c0) {
  Rows<T> out{};
  if (map.stride[3] != 1 || map.dtype != kDtype<T>) return out;
  stretches(map, begin, end, [&](int64_t, int64_t count, int64_t offset) {
    if (count == kTilePixels)
      out = {static_cast<T*>(map.data) + offset + c0 * map.stride[1], map.stride[1], kTilePixels};
  });
  return out;
}

// The pixels [begin, end) of the channels [c0, c0 + channels): the map itself, or a copy.
template <class T>
inline Rows<T> read_rows(const Map& map, int64_t begin, int64_t end, int64_t c0, int64_t channels,
                         T* buffer) {  // [channels, kTilePixels]
  const Rows<T> rows = map_rows<T>(map, begin, end, c0);
  if (rows.data) return rows;
  read_channels(map, begin, end, c0, channels, buffer, kTilePixels);
  return {buffer, kTilePixels, 0};
}

// tile[n, c] <- map, for the channels [c0, c0 + channels) and the pixels [begin, end).
template <class T>
inline void read_pixels(const Map& map, int64_t begin, int64_t end, int64_t c0, int64_t channels, T* tile,
                        int64_t tile_row) {
  visit(map.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(map.data) + c0 * map.stride[1];
    stretches(map, begin, end, [&](int64_t at, int64_t count, int64_t offset) {
      gather(count, channels, data + offset, map.stride[3], map.stride[1], count * map.stride[3], tile + at * tile_row,
             tile_row);
    });
  });
}

// Whether a map is larger than the caches, so that its lines are better written without being fetched first.
inline bool is_large(const Map& map) {
  const int64_t size = map.dtype == Dtype::float64 ? 8 : map.dtype == Dtype::float32 ? 4 : 2;
  return map.pixels() * map.channels * size >= kLargeBytes;
}

// map <- tile[c, n], for the channels [c0, c0 + channels) and the pixels [begin, end).
template <class T>
inline void write_channels(const Map& map, int64_t begin, int64_t end, int64_t c0, int64_t channels, const T* tile,
                           int64_t tile_row) {
  visit(map.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(map.data) + c0 * map.stride[1];
    stretches(map, begin, end, [&](int64_t at, int64_t count, int64_t offset) {
      scatter(channels, count, tile + at, tile_row, data + offset, map.stride[1], map.stride[3], count * map.stride[3],
              is_large(map));
    });
  });
}

}  // namespace SEA_ISA
}  // namespace sea
