// Regions from boxes: the categories present, a bitmask for every pixel, runs of pixels with equal masks, areas; bit
// for bit the same as on the CPU.
//
// Three launches (more where lists are long): categories, masks, areas and runs. Nothing waits for the host: launches
// are sized by shapes, and the number of categories stays on the device, where the kernels read it.
#pragma once
#include <cuda/launch.h>
#include <map.h>
#include <raster.h>

#include <algorithm>
#include <cstdint>
#include <cuda/ptx.cuh>

#include "carve.cuh"

namespace sea {

// ---------------------------------------------------------------------------------------------- what the host hands in

// The boxes of a batch. The image of each box is given by an index per box, or by the number of boxes of each image.
template <class T>
struct BoxList {
  const T* corners;  // [count, 4]: x1 y1 x2 y2
  int64_t count;
  const int64_t* image;   // [count]; or null, and
  const int64_t* counts;  // [batch] on the host
};

template <class T>
struct RasterInput {
  BoxList<T> boxes, ignored;
  const int64_t* labels;     // [boxes.count]
  const int64_t* sizes;      // [batch, 2]: height, width; or null, and
  const int64_t* size_list;  // [batch, 2] on the host; without either, every image fills its maps
  int64_t batch, levels;
  const int64_t* shapes;  // [levels, 2] on the host: height, width
  const double* strides;  // [levels, 2] on the host: y, x
  int64_t num_classes;
  double center_ratio;
  const bool* present;  // [num_classes] the categories that get rows, whether boxes show them or not; null: no others

  int64_t capacity() const { return present ? num_classes : std::min(boxes.count, num_classes); }  // K
  int64_t masks() const { return 1 + 2 * capacity(); }                                             // P
  int64_t words() const { return (masks() + 31) / 32; }
  int64_t pixels() const {  // N
    int64_t sum = 0;
    for (int64_t l = 0; l < levels; ++l) sum += batch * shapes[2 * l] * shapes[2 * l + 1];
    return sum;
  }
  int64_t run_words() const {
    int64_t sum = 0;
    for (int64_t l = 0; l < levels; ++l) sum += batch * ((shapes[2 * l] * shapes[2 * l + 1] + 31) / 32);
    return sum;
  }
};

struct RasterOutput {
  int64_t* classes;  // [K]
  float* area;       // [levels, P]
  float* valid;      // [levels] pixels in any mask
  Extent* extents;   // [levels, batch]
  int32_t* bits;     // [words, N]
  RunWord* runs;     // [run_words]
};

// What one launch leaves for the next.
struct RasterScratch {
  unsigned long long* counters;  // [levels, P + 1] pixels of each mask; the last: pixels in any mask
  int64_t* present;              // [1] number of categories
  int32_t* ranks;                // [boxes] which of the categories; -1: skip this box

  RasterScratch() = default;
  RasterScratch(Carver& carver, int64_t all_counters, int64_t boxes)
      : counters(carver.take<unsigned long long>(all_counters)),
        present(carver.take<int64_t>(1)),
        ranks(carver.take<int32_t>(boxes)) {}
};

// ------------------------------------------------------------------------------------------------------- 1: categories

constexpr int kRankThreads = 1024;
constexpr int64_t kRankWindow = 1 << 17;  // labels at a time, a bit in shared memory for each

template <class T>
struct RankParams {
  const T* corners;       // [boxes, 4]
  const int64_t* labels;  // [boxes]
  const int64_t* image;   // [boxes]; or null: each belongs to one
  const bool* present;    // [num_classes], or null
  int64_t boxes, batch, num_classes, capacity, counters;
  int64_t* classes;  // [capacity]
  RasterScratch scratch;
};

template <class T>
__device__ bool load_valid(const T* corners, int64_t g, T (&box)[4]) {
  for (int i = 0; i < 4; ++i) box[i] = corners[4 * g + i];
  return is_valid(box);
}

// The label of a box; -1: skip it.
template <class T>
__device__ int64_t usable_label(const RankParams<T>& params, int64_t g) {
  const int64_t label = params.labels[g], image = params.image ? params.image[g] : 0;
  T box[4];
  const bool valid = load_valid(params.corners, g, box) && image >= 0 && image < params.batch;
  return valid && label >= 0 && label < params.num_classes ? label : -1;
}

struct RankMemory {
  uint32_t* found;   // [words] bitmask of the labels of the window that are there
  uint32_t* before;  // [words + 1] how many are there in earlier words

  __host__ __device__ RankMemory(Carver& carver, int64_t num_classes) {
    const int64_t words = ((num_classes < kRankWindow ? num_classes : kRankWindow) + 31) / 32;
    found = carver.take<uint32_t>(words);
    before = carver.take<uint32_t>(words + 1);
  }
};

// Block 0 finds the categories and the boxes' ranks among them, the other blocks clear the counters.
template <class T>
__global__ void __launch_bounds__(kRankThreads) rank_labels(const __grid_constant__ RankParams<T> params) {
  const RasterScratch& scratch = params.scratch;
  const int thread = threadIdx.x;
  if (blockIdx.x > 0) {
    for (int64_t i = int64_t{blockIdx.x - 1} * kRankThreads + thread; i < params.counters;
         i += int64_t{gridDim.x - 1} * kRankThreads)
      scratch.counters[i] = 0;
    return;
  }
  Carver carver(shared_memory());
  const RankMemory memory(carver, params.num_classes);
  uint32_t *found = memory.found, *before = memory.before;
  int64_t present = 0;
  for (int64_t begin = 0; begin < params.num_classes; begin += kRankWindow) {
    const int words = static_cast<int>((min(params.num_classes - begin, kRankWindow) + 31) / 32);
    for (int w = thread; w < words; w += kRankThreads) found[w] = 0;
    __syncthreads();
    for (int64_t g = thread; g < params.boxes; g += kRankThreads) {
      const int64_t label = usable_label(params, g) - begin;
      if (label >= 0 && label < kRankWindow) atomicOr(&found[label / 32], 1u << label % 32);
    }
    for (int64_t k = begin + thread; params.present && k < min(begin + kRankWindow, params.num_classes);
         k += kRankThreads)
      if (params.present[k]) atomicOr(&found[(k - begin) / 32], 1u << (k - begin) % 32);
    __syncthreads();
    if (thread < 32) {
      uint32_t total = 0;
      for (int w = thread; w - thread < words; w += 32) {
        const uint32_t own = w < words ? __popc(found[w]) : 0;
        uint32_t sum = own;
        for (int distance = 1; distance < 32; distance *= 2) {
          const uint32_t other = __shfl_up_sync(~0u, sum, distance);
          if (thread >= distance) sum += other;
        }
        if (w < words) before[w] = total + sum - own;
        total += __shfl_sync(~0u, sum, 31);
      }
      if (thread == 0) before[words] = total;
    }
    __syncthreads();
    for (int w = thread; w < words; w += kRankThreads) {
      int64_t k = present + before[w];
      for (uint32_t rest = found[w]; rest != 0; rest &= rest - 1)
        params.classes[k++] = begin + 32 * w + __ffs(rest) - 1;
    }
    for (int64_t g = thread; g < params.boxes; g += kRankThreads) {
      const int64_t usable = usable_label(params, g), label = usable - begin;
      if (usable < 0)
        scratch.ranks[g] = -1;
      else if (label >= 0 && label < kRankWindow)
        scratch.ranks[g] =
            static_cast<int32_t>(present + before[label / 32] + __popc(found[label / 32] & ((1u << label % 32) - 1)));
    }
    present += before[words];
    __syncthreads();  // the next window's words take this one's place
  }
  for (int64_t k = present + thread; k < params.capacity; k += kRankThreads) params.classes[k] = -1;
  if (thread == 0) *scratch.present = present;
}

// ------------------------------------------------------------------------------------------------------------ 2: masks

constexpr int kTileColumns = 32, kTileRows = 8;  // a row of a tile is a warp, and its columns are the bits of one word
constexpr int kTileThreads = kTileColumns * kTileRows;
constexpr int kTileBoxes = 2 * kTileThreads;  // listed at a time
constexpr int kTileWords = 32;                // mask words at a time
constexpr int kRasterLevels = 16;             // in one launch
constexpr int kRasterImages = 256;            // in one launch, where a list says something about them

template <class T>
struct RasterParams {
  BoxList<T> lists[2];   // boxes, ignore boxes
  const int64_t* sizes;  // [batch, 2], or null
  bool listed, sizes_listed;
  int32_t levels;
  int64_t batch, first_image, masks, pixels;
  T center_ratio;
  RasterScratch scratch;  // counters from the launch's first level on
  Extent* extents;        // [levels, batch]
  int32_t* bits;          // [words, pixels]
  struct Level {
    T stride[2];  // y, x
    int32_t height, width;
    uint32_t tile_columns, tiles;  // of an image
    uint32_t first_block;
    int64_t first_pixel;
  } level[kRasterLevels];
  struct Image {
    int64_t first[2];  // in either list
    T height, width;
  } image[kRasterImages + 1];  // with one more, to end the last image's boxes
};

// The interval as bits, of which `origin` is bit 0.
__device__ inline uint32_t interval_bits(Interval interval, int32_t origin) {
  const auto below = [&](int32_t end) { return end - origin >= 32 ? ~0u : (1u << max(end - origin, 0)) - 1; };
  return below(interval.end) & ~below(interval.begin);
}

// What a box covers of a tile: its columns and rows as bits.
struct alignas(16) TileBox {
  uint32_t columns, center_columns;
  uint16_t rows, center_rows;
  int32_t rank;  // -1: an ignore box
};

struct TileMemory {
  TileBox* boxes;   // [kTileBoxes]
  uint32_t* area;   // [32 * kTileWords] pixels of the masks in the current words
  uint32_t* valid;  // [1] pixels in any mask
  int32_t* listed;  // [1] boxes
  uint32_t* bits;   // [words, kTileThreads] bitmasks of the pixels

  __host__ __device__ TileMemory(Carver& carver, int64_t words)
      : boxes(carver.take<TileBox>(kTileBoxes)),
        area(carver.take<uint32_t>(32 * kTileWords)),
        valid(carver.take<uint32_t>(1)),
        listed(carver.take<int32_t>(1)),
        bits(carver.take<uint32_t>((words < kTileWords ? words : kTileWords) * kTileThreads)) {}
};

// A block is a tile of an image on one level. It lists the boxes that meet the tile, then each thread fills the words
// of its own pixel; in whatever order the boxes are listed, the bits are the same.
template <class T>
__global__ void __launch_bounds__(kTileThreads) rasterize_tiles(const __grid_constant__ RasterParams<T> params) {
  Carver carver(shared_memory());
  const TileMemory memory(carver, (params.masks + 31) / 32);
  uint32_t* bits = memory.bits + threadIdx.x;  // [words] of this thread's pixel, kTileThreads apart
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32;
  int l = 0;
  while (l + 1 < params.levels && blockIdx.x >= params.level[l + 1].first_block) ++l;
  const auto& level = params.level[l];
  const uint32_t block = blockIdx.x - level.first_block, tile = block % level.tiles, i = block / level.tiles;
  const int64_t b = params.first_image + i;
  const auto* image = params.image + (params.listed ? i : 0);
  const int32_t x = tile % level.tile_columns * kTileColumns, y = tile / level.tile_columns * kTileRows;  // the tile's

  Extent extent{level.height, level.width};
  if (params.sizes || params.sizes_listed) {
    const T height = params.sizes ? static_cast<T>(static_cast<double>(params.sizes[2 * b])) : image->height;
    const T width = params.sizes ? static_cast<T>(static_cast<double>(params.sizes[2 * b + 1])) : image->width;
    extent = {cover_image(height, level.stride[0], level.height), cover_image(width, level.stride[1], level.width)};
  }
  if (tile == 0 && thread == 0) params.extents[l * params.batch + b] = extent;
  const uint32_t columns = interval_bits({0, extent.columns}, x);
  const uint32_t rows = interval_bits({0, extent.rows}, y) & ((1u << kTileRows) - 1);

  const auto meets_tile = [&](const T(&box)[4], TileBox& out) {
    const auto columns_of = [&](T low, T high) {
      return interval_bits(cover(low, high, level.stride[1], level.width), x);
    };
    const auto rows_of = [&](T low, T high) {
      return interval_bits(cover(low, high, level.stride[0], level.height), y);
    };
    out.columns = columns & columns_of(box[0], box[2]);
    out.rows = rows & rows_of(box[1], box[3]);
    if (out.columns == 0 || out.rows == 0) return false;
    T center[4];
    center_box(box, params.center_ratio, center);
    out.center_columns = is_finite(center) ? out.columns & columns_of(center[0], center[2]) : 0;
    out.center_rows = out.rows & rows_of(center[1], center[3]);
    return true;
  };

  const auto store = [&](int64_t word, uint32_t value) {
    const int64_t pixel = level.first_pixel + (b * level.height + y + row) * level.width + x + lane;
    if (lane < level.width - x && row < level.height - y)
      params.bits[word * params.pixels + pixel] = static_cast<int32_t>(value);
  };
  const int32_t present = static_cast<int32_t>((1 + 2 * *params.scratch.present + 31) / 32);  // words
  unsigned long long* counters = params.scratch.counters + l * (params.masks + 1);

  for (int32_t first = 0; first < present; first += kTileWords) {
    const int32_t words = min(present - first, kTileWords);
    for (int w = 0; w < words; ++w) bits[w * kTileThreads] = 0;
    for (int p = thread; p < 32 * words; p += kTileThreads) memory.area[p] = 0;
    if (thread == 0) *memory.valid = *memory.listed = 0;
    __syncthreads();

    uint32_t in_box = 0, covered = 0;  // columns of this row
    const auto mark = [&](uint32_t mask, uint32_t columns) {
      const int32_t w = static_cast<int32_t>(mask / 32) - first;
      if (w >= 0 && w < words && (columns >> lane & 1)) bits[w * kTileThreads] |= 1u << mask % 32;
    };
    int listed = 0;
    const auto mark_listed = [&] {
#pragma unroll 1
      for (int i = 0; i < listed; ++i) {
        const TileBox box = memory.boxes[i];
        if (!(box.rows >> row & 1)) continue;
        covered |= box.columns;
        if (box.rank < 0) continue;
        in_box |= box.columns;
        const uint32_t center = box.center_rows >> row & 1 ? box.center_columns : 0;
        mark(1 + 2 * box.rank, center);
        mark(2 + 2 * box.rank, box.columns & ~center);
      }
    };
    // The first words hold the background, which every box affects. Later words need only the boxes with bits in them.
#pragma unroll 1
    for (int ignored = 0; ignored < (first == 0 ? 2 : 1); ++ignored) {
      const BoxList<T>& list = params.lists[ignored];
      const int64_t end = list.image ? list.count : image[1].first[ignored];
#pragma unroll 1
      for (int64_t g = thread + (list.image ? 0 : image[0].first[ignored]); g - thread < end; g += kTileThreads) {
        TileBox box;
        T corners[4];
        bool meets = g < end && (!list.image || list.image[g] == b) && load_valid(list.corners, g, corners);
        if (meets) {
          box.rank = ignored ? -1 : params.scratch.ranks[g];
          const int32_t center_word = (1 + 2 * box.rank) / 32, edge_word = (2 + 2 * box.rank) / 32;
          meets = (ignored || box.rank >= 0) && (first == 0 || (edge_word >= first && center_word < first + words)) &&
                  meets_tile(corners, box);
        }
        if (meets) memory.boxes[atomicAdd(memory.listed, 1)] = box;
        listed += __syncthreads_count(meets);
        if (listed > kTileBoxes - kTileThreads) {  // the next boxes might not find room
          mark_listed();
          if (thread == 0) *memory.listed = 0;
          __syncthreads();
          listed = 0;
        }
      }
    }
    mark_listed();
    if (first == 0) {
      const uint32_t inside = rows >> row & 1 ? columns : 0, background = inside & ~covered;
      mark(0, background);
      if (lane == 0) atomicAdd(memory.valid, static_cast<uint32_t>(__popc(in_box | background)));
    }

    for (int w = 0; w < words; ++w) {
      const uint32_t word = bits[w * kTileThreads];
      store(first + w, word);
      for (uint32_t rest = __reduce_or_sync(~0u, word); rest != 0; rest &= rest - 1) {
        const uint32_t p = __ffs(rest) - 1, area = __popc(__ballot_sync(~0u, word >> p & 1));
        if (lane == 0) atomicAdd(&memory.area[32 * w + p], area);
      }
    }
    __syncthreads();
    for (int p = thread; p < 32 * words; p += kTileThreads)
      if (memory.area[p] != 0) atomicAdd(&counters[32 * first + p], static_cast<unsigned long long>(memory.area[p]));
    if (first == 0 && thread == 0) atomicAdd(&counters[params.masks], static_cast<unsigned long long>(*memory.valid));
  }
  for (int64_t w = present; w < (params.masks + 31) / 32; ++w) store(w, 0);
}

// --------------------------------------------------------------------------------------------------- 3: areas and runs

constexpr int kFinishThreads = 256;

struct FinishRegionsParams {
  RasterScratch scratch;  // as in RasterParams
  int64_t masks, pixels, batch;
  const Extent* extents;  // [levels, batch]
  const int32_t* bits;    // [words, pixels]
  RunWord* runs;          // of the launch's first level on
  float *area, *valid;    // [levels, masks], [levels]
  int32_t levels;
  uint32_t area_blocks;
  struct Level {
    int32_t height, width;
    int64_t first_pixel;
    uint32_t first_run;
  } level[kRasterLevels + 1];  // with one more, to end the last level's runs
};

__device__ inline void write_area(const FinishRegionsParams& params, int64_t i) {
  if (i >= params.levels * (params.masks + 1)) return;
  const int64_t l = i / (params.masks + 1), p = i % (params.masks + 1);
  (p < params.masks ? params.area[l * params.masks + p] : params.valid[l]) =
      static_cast<float>(params.scratch.counters[i]);
}

// One warp.
__device__ inline void write_run_word(const FinishRegionsParams& params, uint32_t i) {
  int l = 0;
  while (l + 1 < params.levels && i >= params.level[l + 1].first_run) ++l;
  const auto& level = params.level[l];
  if (i >= params.level[params.levels].first_run) return;
  const int lane = threadIdx.x % 32, pixels = level.height * level.width;
  const uint32_t words = (static_cast<uint32_t>(pixels) + 31) / 32;  // of an image
  const uint32_t b = (i - level.first_run) / words;
  const int n = static_cast<int>((i - level.first_run) % words) * 32 + lane;  // pixel of the image
  const Extent extent = params.extents[l * params.batch + b];
  const auto is_inside = [&](int n) { return n / level.width < extent.rows && n % level.width < extent.columns; };
  const bool inside = n < pixels && is_inside(n);
  bool starts = n == 0 || (n < pixels && inside != is_inside(n - 1)), valid = false;
  const int32_t* bits = params.bits + level.first_pixel + int64_t{b} * pixels + n;
  const int64_t present = (1 + 2 * *params.scratch.present + 31) / 32;  // words
  for (int64_t w = 0; n < pixels && w < present; ++w) {
    const int32_t word = bits[w * params.pixels];
    valid |= word != 0;
    starts |= n > 0 && word != bits[w * params.pixels - 1];
  }
  const RunWord out{__ballot_sync(~0u, starts), __ballot_sync(~0u, inside), __ballot_sync(~0u, valid)};
  if (lane == 0) params.runs[i] = out;
}

// Two jobs that share a launch, since they need the same inputs to be ready.
static __global__ void __launch_bounds__(kFinishThreads)
    finish_regions(const __grid_constant__ FinishRegionsParams params) {
  if (blockIdx.x < params.area_blocks)
    write_area(params, int64_t{blockIdx.x} * kFinishThreads + threadIdx.x);
  else
    write_run_word(params, (blockIdx.x - params.area_blocks) * (kFinishThreads / 32) + threadIdx.x / 32);
}

// ---------------------------------------------------------------------------------------------------------------- host

// Fills `out`; a counting Carver launches nothing.
template <class T>
void rasterize(const RasterInput<T>& in, const RasterOutput& out, Carver& carver, cudaStream_t stream) {
  const int64_t masks = in.masks(), pixels = in.pixels(), all_counters = in.levels * (masks + 1);
  const RasterScratch scratch(carver, all_counters, in.boxes.count);
  if (carver.counts()) return;
  const auto blocks = [](int64_t items, int64_t threads) {
    return static_cast<uint32_t>((items + threads - 1) / threads);
  };

  const RankParams<T> rank{in.boxes.corners, in.labels,     in.boxes.image, in.present,  in.boxes.count, in.batch,
                           in.num_classes,   in.capacity(), all_counters,   out.classes, scratch};
  launch(rank_labels<T>, "rank_labels", dim3(1 + std::min(blocks(all_counters, 4 * kRankThreads), 1024u)), kRankThreads,
         bytes_of<RankMemory>(in.num_classes), stream, rank);

  const bool listed = in.boxes.counts || in.ignored.counts || in.size_list;
  const int64_t shared = bytes_of<TileMemory>(in.words());
  int64_t first_pixel = 0;
  RunWord* runs = out.runs;
  for (int64_t l = 0; l < in.levels; l += kRasterLevels) {
    RasterParams<T> params{};
    FinishRegionsParams finish{};
    params.lists[0] = in.boxes, params.lists[1] = in.ignored;
    params.sizes = in.sizes, params.listed = listed, params.sizes_listed = in.size_list;
    params.levels = static_cast<int32_t>(std::min<int64_t>(in.levels - l, kRasterLevels));
    params.batch = in.batch, params.masks = masks, params.pixels = pixels;
    params.center_ratio = static_cast<T>(in.center_ratio);
    params.scratch = scratch, params.scratch.counters += l * (masks + 1);
    params.extents = out.extents + l * in.batch, params.bits = out.bits;
    int64_t tiles = 0;  // of an image
    for (int64_t i = 0; i < params.levels; ++i) {
      auto& level = params.level[i];
      const int64_t height = in.shapes[2 * (l + i)], width = in.shapes[2 * (l + i) + 1];
      level.height = static_cast<int32_t>(height), level.width = static_cast<int32_t>(width);
      for (int side = 0; side < 2; ++side) level.stride[side] = static_cast<T>(in.strides[2 * (l + i) + side]);
      level.tile_columns = blocks(width, kTileColumns), level.tiles = level.tile_columns * blocks(height, kTileRows);
      level.first_pixel = first_pixel;
      finish.level[i] = {level.height, level.width, first_pixel, finish.level[i].first_run};
      finish.level[i + 1].first_run =
          finish.level[i].first_run + static_cast<uint32_t>(in.batch * ((height * width + 31) / 32));
      first_pixel += in.batch * height * width;
      tiles += level.tiles;
    }
    const int64_t most = listed ? kRasterImages : std::max<int64_t>(INT32_MAX / tiles, 1);  // images in one launch
    auto* image = params.image;
    for (int64_t b = 0; b < in.batch; b += most) {
      const int64_t images = std::min(in.batch - b, most);
      for (int64_t i = 0; i < images && listed; ++i) {
        if (in.boxes.counts) image[i + 1].first[0] = image[i].first[0] + in.boxes.counts[b + i];
        if (in.ignored.counts) image[i + 1].first[1] = image[i].first[1] + in.ignored.counts[b + i];
        if (in.size_list) image[i].height = static_cast<T>(static_cast<double>(in.size_list[2 * (b + i)]));
        if (in.size_list) image[i].width = static_cast<T>(static_cast<double>(in.size_list[2 * (b + i) + 1]));
      }
      params.first_image = b;
      uint32_t grid = 0;
      for (int64_t i = 0; i < params.levels; ++i) {
        params.level[i].first_block = grid;
        grid += static_cast<uint32_t>(images) * params.level[i].tiles;
      }
      launch(rasterize_tiles<T>, "rasterize_tiles", dim3(grid), kTileThreads, shared, stream, params);
      if (listed) image[0] = image[images];
    }
    finish.scratch = params.scratch, finish.masks = masks, finish.pixels = pixels, finish.batch = in.batch;
    finish.extents = params.extents, finish.bits = out.bits, finish.runs = runs;
    finish.area = out.area + l * masks, finish.valid = out.valid + l, finish.levels = params.levels;
    finish.area_blocks = blocks(params.levels * (masks + 1), kFinishThreads);
    const int64_t run_words = finish.level[params.levels].first_run;
    launch(finish_regions, "finish_regions", dim3(finish.area_blocks + blocks(32 * run_words, kFinishThreads)),
           kFinishThreads, 0, stream, finish);
    runs += run_words;
  }
}

}  // namespace sea
