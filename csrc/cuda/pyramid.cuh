// The table of levels and maps that one launch covers, passed by value.
#pragma once
#include <cuda_runtime.h>

#include <map.h>

namespace sea {

// The regions as CUDA kernels see them.
struct Masks {
  const int64_t* classes;   // [capacity] categories present, then -1
  const float* area;        // [levels, masks] pixels of each mask
  const float* counted;     // [levels] pixels in any mask
  const Extent* extents;    // [levels, batch]; null: whole maps
  const uint32_t* bits;     // [words, pixels] bit p % 32 of word p / 32: the pixel is in mask p
  int64_t pixels;           // of all levels
  int32_t capacity, masks;  // masks = 1 + 2 * capacity; 0: there are no regions
};

// One level of one set of maps, and where its own share of what the kernels hand each other lies. T is the type
// computed in, X the type of the maps in shared memory; pitch() channels lie in a row of a table.
struct Pair {
  Map student, teacher, gradient;  // data is null where there is none
  int64_t parts;
  int32_t level;
  int64_t first_pixel;  // of the level in Masks::bits
  int64_t first_tile;   // of the pair in this launch
  void* anchors[2];  // T [masks, channels] of either side, where they are handed over; only the first: the difference
  void* units;  // X [2 sides, masks, pitch] unit anchors; of 16-bit types [2 sides, 2 (rounded, rest), masks, pitch]
  void* inverse_norm;  // T [masks] of the student's anchors
  void* difference;    // T [masks, pitch] student's anchors - teacher's
  void* through;       // T [masks, pitch] the distance's gradient of the student's anchors
  void* statistics;    // T [pixels, 2 or 4] of the softmax over anchors
  void* softmax;       // T [4, batch, channels] student: maximum, 1 / sum; teacher likewise

  __host__ __device__ int64_t image() const { return student.height * student.width; }
  __host__ __device__ int64_t pitch() const { return (student.channels + 7) / 8 * 8; }
};

// What one launch covers. Its tiles, pair by pair and image by image, are dealt out to `slices` blocks in equal shares;
// what a block adds up for one pair lies at slice + pair, which is another number for every (slice, pair) that meet.
constexpr int kMostPairs = 48;
struct Pyramid {
  Pair pairs[kMostPairs];
  int32_t count, slices;
  int64_t tiles, batch;
  int64_t most_channels;
};

}  // namespace sea
