// The masks of a tile's pixels: their bitmasks, and where the runs of pixels with equal masks start. A row of pixels
// has few runs, so what is done once for each run is cheap next to what is done for each pixel.
#pragma once
#include "carve.cuh"
#include "pyramid.cuh"
#include "reduce.cuh"

namespace sea {

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

// Which pixels of a tile are in a mask, as bits. The tile lies within 32 pixels whose first is a multiple of 32.
__device__ inline uint32_t valid_pixels(const Masks& masks, const Entry& entry, const WorkTile& at) {
  if (at.count == 0) return 0;
  const int64_t word = entry.first_run + at.image * divide_up(entry.image(), 32) + at.first / 32;
  return (masks.runs ? masks.runs[word].valid : 0) >> at.first % 32 & ~0u >> (32 - at.count);
}

// The runs of a tile, listed in shared memory.
struct TileMasks {
  uint32_t* inner;        // [pixels / 32, rounded up] a bit a pixel: it lies inside the image
  uint32_t* valid;        // as inner: it is in a mask
  int32_t* begin;         // [pixels + 2] first pixel of each run; after the last, `pixels`
  int32_t* first;         // [pixels + 1] where the masks of each run begin in `masks`; after the last, their number
  uint16_t* masks;        // [room] the masks of each run, one run after the other, as far as there is room
  const uint32_t* words;  // [count, stride] bitmasks of the pixels, where the regions have them
  int count, pixels, room;
  int64_t stride;

  TileMasks() = default;
  __host__ __device__ TileMasks(Carver& carver, int pixels_, int room_) : count(0), pixels(pixels_), room(room_) {
    inner = carver.take<uint32_t>(divide_up(pixels, 32));
    valid = carver.take<uint32_t>(divide_up(pixels, 32));
    begin = carver.take<int32_t>(pixels + 2);
    first = carver.take<int32_t>(pixels + 1);
    masks = carver.take<uint16_t>(room);
  }

  // One warp does it. All threads of the block call it; a barrier has to follow. Without `lists`, each() cannot be
  // called.
  template <int kWarp = 0>
  __device__ void load(const Masks& regions, const Entry& entry, const WorkTile& at, bool lists = true) {
    words = count == 0 ? nullptr : regions.bits + entry.first_pixel + at.image * entry.image() + at.first;
    stride = regions.pixels;
    if (count > (1 << 16) / 32) room = 0;        // masks are listed in 16 bits
    if (threadIdx.x - 32 * kWarp >= 32) return;  // unsigned: also of the warps before
    const int lane = threadIdx.x - 32 * kWarp;
    int runs = 0;
    for (int u = 0; u < pixels; u += 32) {
      const int left = at.count - u;  // pixels of the image
      const uint32_t all = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
      RunWord word{0, ~0u, 0};
      if (regions.runs && left > 0) {
        const int64_t first = entry.first_run + at.image * divide_up(entry.image(), 32);
        word = regions.runs[first + (at.first + u) / 32];
        const int shift = at.first % 32;
        word.starts >>= shift, word.inside >>= shift, word.valid >>= shift;
      }
      word.starts = (word.starts & all) | (u == 0);
      if (left >= 0 && left < 32 && at.count < pixels) word.starts |= 1u << left;
      if (word.starts >> lane & 1) begin[runs + __popc(word.starts & ((1u << lane) - 1))] = u + lane;
      runs += __popc(word.starts);
      if (lane == 0) {
        inner[u / 32] = word.inside & all;
        valid[u / 32] = word.valid & all;
      }
    }
    if (lane == 0) begin[runs] = pixels;
    __syncwarp();
    if (lists) list(runs, lane);
  }

  __device__ bool inside_at(int u) const { return inner[u / 32] >> u % 32 & 1; }
  __device__ bool valid_at(int u) const { return valid[u / 32] >> u % 32 & 1; }
  // Which of the pixels u .. u + kStep - 1 lie inside the image, as bits.
  template <int kStep>
  __device__ uint32_t inside(int u) const {
    return inner[u / 32] >> u % 32 & ((1u << kStep) - 1);
  }

  // Calls f(mask) for the masks of a run.
  template <class F>
  __device__ void each(int run, F f) const {
    const int end = first[run + 1];
    if (end <= room) {
      for (int i = first[run]; i < end; ++i) f(masks[i]);
      return;
    }
    for (int w = 0; w < count; ++w)
      for (uint32_t word = words[w * stride + begin[run]]; word != 0; word &= word - 1) f(32 * w + __ffs(word) - 1);
  }

 private:
  // The lanes of a warp take a word of a run each.
  __device__ void list(int runs, int lane) {
    int total = 0;
    for (int i = lane; i - lane < runs * count; i += 32) {
      const int run = i / count, w = i % count;
      uint32_t word = i < runs * count && valid_at(begin[run]) ? words[w * stride + begin[run]] : 0;
      const int own = __popc(word);
      int end = own;  // where this lane's masks end
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, end, distance);
        if (lane >= distance) end += other;
      }
      int at = total + end - own;
      if (i < runs * count && w == 0) first[run] = at;
      for (; word != 0 && at < room; word &= word - 1) masks[at++] = static_cast<uint16_t>(32 * w + __ffs(word) - 1);
      total += __shfl_sync(kAllLanes, end, 31);
    }
    if (lane == 0) first[runs] = total;
  }
};

// Calls f(k) for the bits k that are set among kCount.
template <int kCount, class F>
__device__ inline void each_set(uint32_t bits, F f) {
  if (bits == (1u << kCount) - 1) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) f(k);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (bits >> k & 1) f(k);
  }
}

// A channel's walk over the runs of a tile, some pixels at a time, from the pixel `from` on.
class RunCursor {
 public:
  __device__ explicit RunCursor(const TileMasks& masks, int from = 0) : masks_(masks), end_(masks.begin[1]) {
    while (end_ <= from) end_ = masks.begin[++run_ + 1];
  }

  __device__ int run() const { return run_; }

  // For the kStep pixels from u on: part(bits of those that lie in the current run), and leave(run) where it ends.
  template <int kStep, class Part, class Leave>
  __device__ void advance(int u, Part part, Leave leave) {
    constexpr uint32_t kAll = (1u << kStep) - 1;
    if (end_ - u > kStep) return part(kAll);
    for (uint32_t rest = kAll; rest != 0;) {
      const uint32_t later = end_ - u >= kStep ? 0 : kAll << (end_ - u) & kAll;
      part(rest & ~later);
      rest = later;
      if (end_ - u > kStep) return;
      leave(run_);
      ++run_;
      end_ = masks_.begin[run_ + 1];
    }
  }

 private:
  const TileMasks& masks_;
  int run_ = 0, end_;
};

}  // namespace sea
