// The masks of a tile's pixels: their bitmasks, and where the runs of pixels with equal masks start. A row of pixels
// has few runs, so what is done once for each run is cheap next to what is done for each pixel.
#pragma once
#include "carve.cuh"
#include "pyramid.cuh"
#include "reduce.cuh"

namespace sea {

// Whether a pixel lies inside its image.
__device__ inline bool inside(const Masks& masks, const Entry& entry, int image, int pixel) {
  if (masks.extents == nullptr) return true;
  const Extent extent = masks.extents[entry.level * entry.batch + image];
  const int width = static_cast<int>(entry.width);
  return pixel / width < extent.rows && pixel % width < extent.columns;
}

// How many masks may have pixels: the background and two for each category present. All threads of the block call it.
__device__ inline int present_masks(const Masks& masks) {
  if (masks.masks == 0) return 0;
  int present = 0;
  for (int k = 0; k < masks.capacity; k += blockDim.x) {
    const int mine = k + threadIdx.x;
    present += __syncthreads_count(mine < masks.capacity && masks.classes[mine] >= 0);
  }
  return 1 + 2 * present;
}

struct TileMasks {
  const uint32_t* words;  // [count, stride] bitmasks, in shared memory or where the regions have them
  uint32_t* starts;       // [pixels / 32, rounded up] a bit a pixel: its masks differ from those of the pixel before
  uint32_t* inner;        // as starts: it lies inside the image
  uint32_t* valid;        // as starts: it is in a mask
  uint32_t* copy;         // [max_words, pixels]; null: not copied to shared memory
  int count, pixels;      // of words; of the tile
  int64_t stride;

  // max_words: how many to make room for, or 0: they are read where they are
  __host__ __device__ TileMasks(Carver& carver, int64_t max_words, int pixels_) : count(0), pixels(pixels_) {
    starts = carver.take<uint32_t>(divide_up(pixels, 32));
    inner = carver.take<uint32_t>(divide_up(pixels, 32));
    valid = carver.take<uint32_t>(divide_up(pixels, 32));
    copy = max_words > 0 ? carver.take<uint32_t>(max_words * pixels) : nullptr;
  }

  // Needs `pixels` threads at least, in whole warps. All threads of the block call it; a barrier has to follow.
  __device__ void load(const Masks& masks, const Entry& entry, const WorkTile& at) {
    const int u = threadIdx.x, lane = u % 32;
    const uint32_t* bits = count == 0 ? nullptr : masks.bits + entry.first_pixel + at.image * entry.image() + at.first;
    words = copy ? copy : bits;
    stride = copy ? pixels : masks.pixels;
    if (u >= (pixels + 31) / 32 * 32) return;
    bool differs = u == 0;
    uint32_t any = 0;
    for (int w = 0; w < count; ++w) {
      const uint32_t word = u < at.count ? bits[w * masks.pixels + u] : 0;
      uint32_t before = __shfl_up_sync(kAllLanes, word, 1);
      if (lane == 0 && u > 0 && u <= at.count) before = bits[w * masks.pixels + u - 1];
      if (copy && u < pixels) copy[w * pixels + u] = word;
      differs |= word != before;
      any |= word;
    }
    const uint32_t start = __ballot_sync(kAllLanes, differs), in_mask = __ballot_sync(kAllLanes, any != 0);
    const uint32_t in = __ballot_sync(kAllLanes, u < at.count && inside(masks, entry, at.image, at.first + u));
    if (lane == 0) {
      starts[u / 32] = start;
      inner[u / 32] = in;
      valid[u / 32] = in_mask;
    }
  }

  __device__ bool starts_at(int u) const { return starts[u / 32] >> u % 32 & 1; }
  __device__ bool inside_at(int u) const { return inner[u / 32] >> u % 32 & 1; }
  __device__ bool valid_at(int u) const { return valid[u / 32] >> u % 32 & 1; }

  // Calls f(mask) for the masks of a pixel.
  template <class F>
  __device__ void each(int u, F f) const {
    for (int w = 0; w < count; ++w)
      for (uint32_t word = words[w * stride + u]; word != 0; word &= word - 1) f(32 * w + __ffs(word) - 1);
  }
};

}  // namespace sea
