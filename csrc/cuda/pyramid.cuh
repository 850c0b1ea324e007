// The table of maps that one launch covers, and the tile scheduler.
//
// All levels and all maps go through one launch: their pointers are a table in the kernel's parameters, so nothing is
// copied to the device first and a CUDA graph may contain the launch. Each kernel has a table of its own type with only
// the fields that it reads.
#pragma once
#include <cuda_runtime.h>
#include <map.h>

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "vec.cuh"

namespace sea {

// The regions as CUDA kernels see them.
struct Masks {
  const int64_t* classes;     // [capacity] the categories present, then -1
  const float* area;          // [levels, masks] pixels of each mask
  const float* valid_pixels;  // [levels] pixels in any mask
  const Extent* extents;      // [levels, batch]; null: the images fill the maps
  const uint32_t* bits;       // [words, pixels] bitmasks: bit p % 32 of word p / 32 says whether the pixel is in mask p
  int64_t pixels;             // of all levels
  int32_t capacity, masks;    // masks = 1 + 2 * capacity; 0: there are no regions
};

// One map of a launch: its shape and its place in the order of tiles. The tables of all kernels have entries that
// derive from this.
struct Entry {
  int64_t batch, channels, height, width;
  int64_t first_pixel;  // of the level in Masks::bits
  int64_t first_tile;   // of the map in this launch
  int32_t level;
  int32_t losses;  // flags

  __host__ __device__ int64_t image() const { return height * width; }
  __host__ __device__ int64_t pitch() const { return round_up(channels, 8); }  // of rows in the tables of anchors
};

// One level of one set of maps as the host knows it: everything that any kernel reads or writes. T is the type computed
// in, X the type of the maps in shared memory.
struct Pair : Entry {
  Map student, teacher;  // teacher: none for the operators of one side
  Map gradient;          // of the student
  Map cosines;           // of anchor_cosine: its output [batch, masks, height, width], in backward the gradient of that
  void* anchors[2];      // T [masks, anchor_pitch] of student and teacher; or their difference, and null
  int64_t anchor_pitch;
  double* anchor_terms;        // [masks] of the anchor loss
  double* localization_terms;  // [batch, blocks of channels] of the localization loss
  void* units;         // X [sides, masks, pitch] unit anchors; of 16-bit types [sides, 2 (rounded, rest), masks, pitch]
  void* inverse_norm;  // T [masks] of the student's anchors
  void* difference;    // T [masks, pitch] student's anchors - teacher's
  void* anchor_gradient;  // T [masks, table_pitch] of the student's anchors
  int64_t table_pitch;    // of anchor_gradient; of difference as well where there are both
  void* pixel_softmax;    // T [pixels, 2 or 4] the pixels' softmax over anchors, saved for backward
  void* softmax;          // T [4, batch, channels] the channels' softmax over positions, saved for backward
};

// The maps that one launch covers. Their tiles, map by map and image by image, are divided into `slices` of equal
// length, one for each block. A block stores its sums for an entry at index slice + entry, which is unique for every
// slice and entry that meet.
constexpr int kMaxEntries = 48;
template <class E>
struct Pyramid {
  E entries[kMaxEntries];
  int32_t count, slices;
  int64_t tiles, batch, max_channels;
};

// ------------------------------------------------------------------------------------------------------ tile scheduler

template <class E>
__host__ __device__ inline int64_t first_tile(const Pyramid<E>& pyramid, int64_t slice) {
  return slice * pyramid.tiles / pyramid.slices;
}

template <class E>
__host__ __device__ inline int64_t slice_of(const Pyramid<E>& pyramid, int64_t tile) {
  return pyramid.tiles == 0 ? 0 : ((tile + 1) * pyramid.slices - 1) / pyramid.tiles;
}

// The slices first .. last that meet the tiles begin .. end - 1; none where last < first.
struct SliceRange {
  int64_t first, last;
};

template <class E>
__host__ __device__ inline SliceRange slices_of(const Pyramid<E>& pyramid, int64_t begin, int64_t end) {
  if (begin == end) return {0, -1};
  return {slice_of(pyramid, begin), slice_of(pyramid, end - 1)};
}

// Those of an entry.
template <class E>
__host__ __device__ inline SliceRange slices_of(const Pyramid<E>& pyramid, int64_t entry) {
  const int64_t end = entry + 1 < pyramid.count ? pyramid.entries[entry + 1].first_tile : pyramid.tiles;
  return slices_of(pyramid, pyramid.entries[entry].first_tile, end);
}

// The tile of a launch that a block works on.
struct WorkTile {
  int entry, image;
  int first, count;  // pixels of the image

  // Moves on to `tile`, which is not before the current one.
  template <class E>
  __device__ void seek(const Pyramid<E>& pyramid, int64_t tile, int tile_pixels) {
    while (entry + 1 < pyramid.count && tile >= pyramid.entries[entry + 1].first_tile) ++entry;
    const Entry& e = pyramid.entries[entry];
    const unsigned at = static_cast<unsigned>(tile - e.first_tile);
    const int pixels = static_cast<int>(e.image()), per_image = (pixels + tile_pixels - 1) / tile_pixels;
    image = static_cast<int>(at / per_image);
    first = static_cast<int>(at % per_image) * tile_pixels;
    count = pixels - first < tile_pixels ? pixels - first : tile_pixels;
  }
};

// ---------------------------------------------------------------------------------------------------------------- host

// The table of those pairs (kMaxEntries at most) that takes(pair) accepts.
template <class E, class Takes>
Pyramid<E> make_pyramid(const std::vector<Pair>& pairs, int tile_pixels, int slices, Takes takes) {
  Pyramid<E> out{};
  for (const Pair& pair : pairs) {
    if (!takes(pair)) continue;
    if (pair.image() > INT32_MAX - 128) throw std::runtime_error("sea_kernels: a map of 2^31 pixels or more");
    E& entry = out.entries[out.count++] = E(pair);
    entry.first_tile = out.tiles;
    out.batch = pair.batch;
    out.tiles += pair.batch * divide_up(pair.image(), tile_pixels);
    out.max_channels = std::max(out.max_channels, pair.channels);
  }
  out.slices = static_cast<int32_t>(std::min<int64_t>(out.tiles, slices));
  return out;
}

template <class E>
Pyramid<E> make_pyramid(const std::vector<Pair>& pairs, int tile_pixels, int slices) {
  return make_pyramid<E>(pairs, tile_pixels, slices, [](const Pair&) { return true; });
}

// Calls f(pairs of one launch) for as many launches as are needed.
template <class F>
void each_launch(const std::vector<Pair>& pairs, F f) {
  for (size_t i = 0; i < pairs.size(); i += kMaxEntries) {
    const size_t end = std::min(pairs.size(), i + kMaxEntries);
    f(std::vector<Pair>(pairs.begin() + i, pairs.begin() + end));
  }
}

}  // namespace sea
