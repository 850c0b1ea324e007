// Regions from boxes, for one image on one level: bitmasks of its pixels, and their number in each mask. The raster
// rule (raster.h) is exact, so this is compiled once, without contraction of floating point, and not for each
// instruction set.
#pragma once
#include <map.h>
#include <raster.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sea {

// The boxes of one image.
template <class T>
struct ImageBoxes {
  struct Box {
    const T* corners;  // [4] x1 y1 x2 y2
    int64_t rank;      // of its category among those present
  };
  std::vector<Box> boxes;
  std::vector<const T*> ignored;  // [4] each
  bool has_size;                  // else the image fills its maps
  T height, width;
};

// The pixels of one image on one level.
struct Plane {
  int32_t height, width;
  int32_t* bits;  // [words, word_stride] bit p % 32 of word p / 32 says whether the pixel is in mask p
  int64_t words;  // of all masks
  int64_t used;   // words that hold masks of categories present; the others are all zero
  int64_t word_stride;
  RunWord* runs;  // [pixels / 32, rounded up]

  int64_t pixels() const { return int64_t{height} * width; }
};

struct Rectangle {
  Interval rows, columns;
};

// The part of a plane that a box covers, inside its image.
template <class T>
Rectangle cover_box(const T* box, const T* stride, const Plane& plane, Extent extent) {  // [4], [2] y x
  Rectangle r{cover(box[1], box[3], stride[0], plane.height), cover(box[0], box[2], stride[1], plane.width)};
  r.rows.end = std::min(r.rows.end, extent.rows);
  r.columns.end = std::min(r.columns.end, extent.columns);
  return r;
}

// Mask 0, the background: pixels inside the image that no box and no ignore box covers.
template <class T>
void rasterize_background(const ImageBoxes<T>& image, const T* stride, Extent extent, const Plane& plane) {
  std::vector<char> covered(plane.pixels(), 0);
  const auto cover_with = [&](const T* corners) {
    const Rectangle r = cover_box(corners, stride, plane, extent);
    for (int64_t y = r.rows.begin; y < r.rows.end && !r.columns.empty(); ++y)
      std::fill(covered.begin() + y * plane.width + r.columns.begin, covered.begin() + y * plane.width + r.columns.end,
                1);
  };
  for (const auto& box : image.boxes) cover_with(box.corners);
  for (const T* corners : image.ignored) cover_with(corners);
  for (int64_t y = 0; y < extent.rows; ++y)
    for (int64_t x = 0; x < extent.columns; ++x) plane.bits[y * plane.width + x] = !covered[y * plane.width + x];
}

// Masks 1 + 2 rank (center) and 2 + 2 rank (edge) of a box.
template <class T>
void rasterize_box(const typename ImageBoxes<T>::Box& box, const T* stride, T center_ratio, Extent extent,
                   const Plane& plane) {
  T center[4];
  center_box(box.corners, center_ratio, center);
  const Rectangle outer = cover_box(box.corners, stride, plane, extent);
  Rectangle inner = cover_box(center, stride, plane, extent);
  inner.columns = {std::max(inner.columns.begin, outer.columns.begin), std::min(inner.columns.end, outer.columns.end)};
  inner.rows = {std::max(inner.rows.begin, outer.rows.begin), std::min(inner.rows.end, outer.rows.end)};
  const bool has_center = is_finite(center) && !inner.columns.empty();
  const auto mark = [&](int64_t mask, int64_t row, int64_t from, int64_t to) {
    int32_t* out = plane.bits + mask / 32 * plane.word_stride + row * plane.width;
    for (int64_t i = from; i < to; ++i) out[i] |= static_cast<int32_t>(1u << mask % 32);
  };
  for (int32_t row = outer.rows.begin; row < outer.rows.end; ++row) {
    const bool crosses = has_center && row >= inner.rows.begin && row < inner.rows.end;
    const Interval middle = crosses ? inner.columns : Interval{outer.columns.begin, outer.columns.begin};
    mark(2 + 2 * box.rank, row, outer.columns.begin, middle.begin);
    mark(1 + 2 * box.rank, row, middle.begin, middle.end);
    mark(2 + 2 * box.rank, row, middle.end, outer.columns.end);
  }
}

// Writes the bits of a plane; returns what of it lies inside the image.
template <class T>
Extent rasterize_image(const ImageBoxes<T>& image, const T* stride, T center_ratio, const Plane& plane) {
  Extent extent{plane.height, plane.width};
  if (image.has_size)
    extent = {cover_image(image.height, stride[0], plane.height), cover_image(image.width, stride[1], plane.width)};
  for (int64_t w = 0; w < plane.words; ++w) std::fill_n(plane.bits + w * plane.word_stride, plane.pixels(), 0);
  rasterize_background(image, stride, extent, plane);
  for (const auto& box : image.boxes) rasterize_box(box, stride, center_ratio, extent, plane);
  return extent;
}

// Writes the runs of a plane, from its bits.
inline void write_runs(const Plane& plane, Extent extent) {
  std::fill_n(plane.runs, (plane.pixels() + 31) / 32, RunWord{});
  bool inside_before = false;
  for (int64_t n = 0; n < plane.pixels(); ++n) {
    const bool inside = n / plane.width < extent.rows && n % plane.width < extent.columns;
    bool starts = n == 0 || inside != inside_before, valid = false;
    for (int64_t w = 0; w < plane.used; ++w) {
      const int32_t* word = plane.bits + w * plane.word_stride + n;
      valid = valid || word[0] != 0;
      starts = starts || word[0] != word[-1];
    }
    RunWord& out = plane.runs[n / 32];
    out.starts |= uint32_t{starts} << n % 32;
    out.inside |= uint32_t{inside} << n % 32;
    out.valid |= uint32_t{valid} << n % 32;
    inside_before = inside;
  }
}

// The number of pixels in each of the masks of categories present; the last entry: of valid pixels, those in any mask.
inline std::vector<int64_t> count_pixels(const Plane& plane, int64_t masks) {
  std::vector<int64_t> count(masks + 1, 0);
  for (int64_t n = 0; n < plane.pixels(); ++n) {
    int32_t any = 0;
    for (int64_t w = 0; w < plane.used; ++w) {
      any |= plane.bits[w * plane.word_stride + n];
      for (uint32_t word = static_cast<uint32_t>(plane.bits[w * plane.word_stride + n]); word != 0; word &= word - 1)
        ++count[32 * w + __builtin_ctz(word)];
    }
    count[masks] += any != 0;
  }
  return count;
}

}  // namespace sea
