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
  const RunWord* runs;        // [words of runs] for every 32 pixels of an image of a level
  int64_t pixels;             // of all levels
  int32_t capacity, masks;    // masks = 1 + 2 * capacity; 0: there are no regions
};

// The images of a map take turns in the order of tiles, a strip of 2^10 pixels each. So the work of an image with many
// boxes is spread over many blocks. Where a slice would have two strips at most, each image is one strip.
constexpr int kStripBits = 10, kWholeBits = 30;

// One map of a launch: its shape and its place in the order of tiles. The tables of all kernels have entries that
// derive from this.
struct Entry {
  int64_t batch, channels, height, width;
  int64_t first_pixel;  // of the level in Masks::bits
  int64_t first_run;    // of the level in Masks::runs
  int64_t first_tile;   // of the map in this launch
  int64_t first_work;   // what comes before its first tile, in units of TileWork
  int32_t tile_work;    // of each of its tiles
  int32_t level;
  int32_t losses;      // flags
  int32_t strip_bits;  // log2 of the pixels of a strip, a multiple of every kernel's tile

  __host__ __device__ int64_t image() const { return height * width; }
  __host__ __device__ int64_t strips() const { return divide_up(image(), int64_t{1} << strip_bits) * batch; }
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
  // T [masks, table_pitch] gradients of each pixel of a mask, not yet multiplied by the loss's own gradient. Exception:
  // in anchor_pool's backward, anchor_gradient is that of the anchor, not yet divided by the mask's area.
  void* difference;       // of the anchor loss: a multiple of the student's anchors - teacher's
  void* anchor_gradient;  // of the distances
  int64_t table_pitch;
  void* pixel_softmax;  // T [pixels, 2 or 4] the pixels' softmax over anchors, saved for backward
  void* softmax;        // T [4, batch, channels] the channels' softmax over positions, saved for backward
};

// What a block does for one tile of a map, and before the first one, in any unit. A function of shapes and loss flags
// alone, since it decides where sums are cut.
struct TileWork {
  int32_t tile = 1, first = 0;
};

// The maps that one launch covers. Their tiles, map by map and strip by strip, are divided into `slices`, one for each
// block. Those of a wave have equal work. A block stores its sums for an entry at index slice + entry, which is unique
// for every slice and entry that meet.
constexpr int kMaxEntries = 48;
template <class E>
struct Pyramid {
  E entries[kMaxEntries];
  int32_t count, slices, waves;
  int64_t tiles, work, batch, max_channels;  // batch: the largest
};

// ------------------------------------------------------------------------------------------------------ tile scheduler

// Where a slice's share of all work begins. Each wave has less work than the one before. When a block ends, the next
// one takes its place, and later blocks are smaller, so all multiprocessors finish at about the same time.
template <class E>
__host__ __device__ inline int64_t work_before(const Pyramid<E>& pyramid, int64_t slice) {
  const int64_t waves = pyramid.waves, in_wave = pyramid.slices / waves, wave = slice / in_wave;
  // Their shares are in the ratio n : n - 1 : .. : 1. left(k): the work of the last k waves.
  const auto left = [&](int64_t rest) { return pyramid.work * (rest * (rest + 1)) / (waves * (waves + 1)); };
  const int64_t from = left(waves - wave), share = from - left(waves - wave - 1);
  return pyramid.work - from + slice % in_wave * share / in_wave;
}

// A slice has the tiles whose work begins within its share of all work.
template <class E>
__host__ __device__ inline int64_t first_tile(const Pyramid<E>& pyramid, int64_t slice) {
  if (pyramid.tiles == 0) return 0;
  const int64_t at = work_before(pyramid, slice);
  int32_t i = pyramid.count - 1;
  while (i > 0 && pyramid.entries[i].first_work > at) --i;
  const Entry& entry = pyramid.entries[i];
  const int64_t end = i + 1 < pyramid.count ? pyramid.entries[i + 1].first_tile : pyramid.tiles;
  if (at <= entry.first_work) return entry.first_tile;
  const int64_t tile = entry.first_tile + divide_up(at - entry.first_work, entry.tile_work);
  return tile < end ? tile : end;
}

// Of a single wave.
template <class E>
__host__ __device__ inline int64_t slice_of(const Pyramid<E>& pyramid, int64_t entry, int64_t tile) {
  const Entry& e = pyramid.entries[entry];
  const int64_t at = e.first_work + (tile - e.first_tile) * e.tile_work;
  return pyramid.tiles == 0 ? 0 : ((at + 1) * pyramid.slices - 1) / pyramid.work;
}

// The slices first .. last that meet the tiles begin .. end - 1 of an entry; none where last < first.
struct SliceRange {
  int64_t first, last;
};

template <class E>
__host__ __device__ inline SliceRange slices_of(const Pyramid<E>& pyramid, int64_t entry, int64_t begin, int64_t end) {
  if (begin == end) return {0, -1};
  return {slice_of(pyramid, entry, begin), slice_of(pyramid, entry, end - 1)};
}

// Those of all its tiles.
template <class E>
__host__ __device__ inline SliceRange slices_of(const Pyramid<E>& pyramid, int64_t entry) {
  const int64_t end = entry + 1 < pyramid.count ? pyramid.entries[entry + 1].first_tile : pyramid.tiles;
  return slices_of(pyramid, entry, pyramid.entries[entry].first_tile, end);
}

// The tile of a launch that a block works on.
struct WorkTile {
  int entry = 0, image = 0;
  int first = 0, count = 0;  // pixels of the image
  int64_t tile = -1;

  // Moves on to `to`, which is not before the current tile. The next tile costs no division.
  template <class E>
  __device__ void seek(const Pyramid<E>& pyramid, int64_t to, int tile_pixels) {
    const bool next = count > 0 && to == tile + 1;
    if (next) {
      const Entry& e = pyramid.entries[entry];
      const int strip = first >> e.strip_bits;
      first += count;
      if (first >> e.strip_bits > strip || first == e.image()) {
        if (++image < e.batch)
          first = strip << e.strip_bits;
        else
          image = 0;
      }
    }
    const int before = entry;
    while (entry + 1 < pyramid.count && to >= pyramid.entries[entry + 1].first_tile) ++entry;
    const Entry& e = pyramid.entries[entry];
    const int pixels = static_cast<int>(e.image());
    if (next && entry != before) image = first = 0;
    if (!next && to != tile) {
      // Tiles: of an image, and of all strips but the last ones. A row is one strip of every image.
      const unsigned per_image = (pixels + tile_pixels - 1) / tile_pixels;
      const unsigned whole = min((1u << e.strip_bits) / tile_pixels, per_image);
      const unsigned in_row = whole * static_cast<unsigned>(e.batch);
      const unsigned at = static_cast<unsigned>(to - e.first_tile), row = at / in_row;
      const unsigned tiles = min(whole, per_image - row * whole);  // of each strip of this row
      image = static_cast<int>((at - row * in_row) / tiles);
      first = static_cast<int>(row * whole + (at - row * in_row) % tiles) * tile_pixels;
    }
    tile = to;
    count = pixels - first < tile_pixels ? pixels - first : tile_pixels;
  }
};

// ---------------------------------------------------------------------------------------------------------------- host

// The table of those pairs (kMaxEntries at most) that takes(pair) accepts. slices: of each wave. work(pair) returns
// their TileWork.
template <class E, class Takes, class Work>
Pyramid<E> make_pyramid(const std::vector<Pair>& pairs, int tile_pixels, int slices, Takes takes, Work work,
                        int waves = 1, int strip_bits = kStripBits) {
  Pyramid<E> out{};
  int32_t most = 1;
  for (const Pair& pair : pairs) {
    if (!takes(pair)) continue;
    if (pair.image() > INT32_MAX - 128) throw std::runtime_error("sea_kernels: a map of 2^31 pixels or more");
    const TileWork of_pair = work(pair);
    const int64_t tiles = pair.batch * divide_up(pair.image(), tile_pixels);
    E& entry = out.entries[out.count++] = E(pair);
    entry.first_tile = out.tiles;
    entry.tile_work = of_pair.tile;
    entry.first_work = out.work + of_pair.first;
    out.batch = std::max(out.batch, pair.batch);
    out.tiles += tiles;
    out.work += tiles == 0 ? 0 : of_pair.first + tiles * of_pair.tile;
    out.max_channels = std::max(out.max_channels, pair.channels);
    most = std::max(most, of_pair.tile);
  }
  // No slice between the first and the last one of an entry may be empty: each has room for any tile.
  out.waves = waves;
  const int64_t in_wave = out.tiles == 0 ? 0 : std::clamp<int64_t>(out.work / most, 1, slices);
  out.slices = static_cast<int32_t>(waves * in_wave);
  const bool strips = out.tiles * tile_pixels > in_wave * (int64_t{2} << strip_bits);
  for (int32_t i = 0; i < out.count; ++i) out.entries[i].strip_bits = strips ? strip_bits : kWholeBits;
  return out;
}

template <class E>
Pyramid<E> make_pyramid(const std::vector<Pair>& pairs, int tile_pixels, int slices) {
  return make_pyramid<E>(
      pairs, tile_pixels, slices, [](const Pair&) { return true; }, [](const Pair&) { return TileWork{}; });
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
