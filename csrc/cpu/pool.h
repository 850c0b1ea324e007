// Anchors: masked means of features. The same pass over the maps feeds the online softmax of the localization loss, so
// box maps are read once for both. One task is a block of channels of one level.
#pragma once
#include "kernels.h"
#include "softmax.h"
#include "tile.h"

namespace sea {
namespace SEA_ISA {

// Channels of a block: one vector if channels lie apart in memory, four if they are adjacent (whole cache lines).
template <class T>
inline int64_t pool_channels(const Map& map) {
  return map.stride[1] == 1 ? 4 * kLanes<T> : kLanes<T>;
}

template <class T>
int64_t pool_blocks(const Map& map) {
  return (map.channels + pool_channels<T>(map) - 1) / pool_channels<T>(map);
}

// Adds the pixels [begin, end) of a tile to the sums of their masks: sums of a run first, then one addition per mask.
// The partial sums stay short, which keeps the rounding small.
template <class T>
inline void pool_tile(const Runs& runs, int64_t begin, int64_t end,
                      const T* tile,  // [end - begin, channels]
                      int64_t channels,
                      T* sums) {  // [masks, channels]
  runs.each(begin, end, [&](int64_t run, int64_t from, int64_t to) {
    if (!runs.is_valid(run)) return;
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t n = from - begin; n < to - begin; ++n) sum += load(tile + n * channels + c);
      for (int64_t i = runs.first[run]; i < runs.first[run + 1]; ++i) {
        T* out = sums + runs.masks[i] * channels + c;
        store(out, load(out) + sum);
      }
    }
  });
}

template <class T>
inline void write_means(const Pool<T>& task,
                        const T* sums,  // [masks, width]
                        int64_t width, int64_t c0, int64_t channels,
                        T* anchors) {  // [masks, all channels], of which [c0, c0 + channels) is written
  for (int64_t p = 0; p < task.masks; ++p)
    for (int64_t c = 0; c < channels; ++c)
      anchors[p * task.student.channels + c0 + c] =
          task.area[p] > 0 ? sums[p * width + c] / static_cast<T>(task.area[p]) : 0;
}

template <class T>
void pool(const Pool<T>& task, int64_t block, T* scratch) {
  constexpr int n = kLanes<T>;
  const Map& map = task.student;
  const bool pair = task.teacher.data != nullptr, softmax = task.softmax != nullptr;
  const int64_t width = pool_channels<T>(map), c0 = block * width, image = map.height * map.width;
  const int64_t rows = map.batch * map.channels;
  const int64_t channels = c0 + width > map.channels ? map.channels - c0 : width;
  T* tiles[2] = {scratch, scratch + kTilePixels * width};  // [kTilePixels, width] of student and teacher
  T* sums[2] = {tiles[1] + kTilePixels * width, tiles[1] + (kTilePixels + task.masks) * width};
  for (T* p = scratch; p < sums[1] + task.masks * width; ++p) *p = 0;  // the tiles too: the last block is narrower

  for (int64_t b = 0; b < map.batch; ++b) {
    Softmax<T> state[4];
    bool any = false;
    for (int64_t begin = b * image; begin < (b + 1) * image; begin += kTilePixels) {
      const int64_t end = begin + kTilePixels < (b + 1) * image ? begin + kTilePixels : (b + 1) * image;
      const bool pools = task.runs && !task.runs->skips(begin, end);
      if (!pools && !softmax) continue;
      for (int side = 0; side < 1 + pair; ++side) {
        read_pixels(side ? task.teacher : map, begin, end, c0, channels, tiles[side], width);
        if (pools) pool_tile(*task.runs, begin, end, tiles[side], width, sums[side]);
      }
      if (softmax)
        inside(map, task.extents, begin, end, [&](int64_t, int64_t from, int64_t to) {
          any = true;
          for (int64_t v = 0; v < width / n; ++v)
            softmax_tile(state[v], to - from, task.inverse_temperature, tiles[0] + (from - begin) * width + v * n,
                         tiles[1] + (from - begin) * width + v * n, width);
        });
    }
    for (int64_t c = 0; softmax && any && c < channels; ++c) {
      const Softmax<T>& s = state[c / n];
      const T student_max = s.student_max[c % n], student_sum = s.student_sum[c % n];
      const T teacher_max = s.teacher_max[c % n], teacher_sum = s.teacher_sum[c % n];
      // No logsumexp, which is rounded at the size of the maximum, however small the differences are.
      T* out = task.softmax + b * map.channels + c0 + c;
      out[0] = student_max;
      out[rows] = 1 / student_sum;
      out[2 * rows] = teacher_max;
      out[3 * rows] = 1 / teacher_sum;
      task.divergence[c0 + c] +=
          (s.difference[c % n] / teacher_sum + (student_max - teacher_max)) * task.inverse_temperature +
          std::log(student_sum / teacher_sum);
    }
  }
  if (task.runs) {
    write_means(task, sums[0], width, c0, channels, task.student_anchors);
    // Not `pair`: maps without images have no memory, but they have anchors.
    if (task.teacher_anchors) write_means(task, sums[1], width, c0, channels, task.teacher_anchors);
  }
}

// Adds to a tile [channels, kTilePixels] what every pixel receives from its masks.
template <class T>
inline void spread_tile(const Runs& runs, int64_t begin, int64_t end,
                        const T* spread,  // [masks, channels]
                        int64_t channels,
                        T* sum,     // [channels]
                        T* tile) {  // [channels, kTilePixels]
  runs.each(begin, end, [&](int64_t run, int64_t from, int64_t to) {
    if (!runs.is_valid(run)) return;
    const T* first = spread + runs.masks[runs.first[run]] * channels;
    for (int64_t c = 0; c < channels; ++c) sum[c] = first[c];
    for (int64_t i = runs.first[run] + 1; i < runs.first[run + 1]; ++i) {
      const T* more = spread + runs.masks[i] * channels;
      for (int64_t c = 0; c < channels; ++c) sum[c] += more[c];
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = from - begin; n < to - begin; ++n) tile[c * kTilePixels + n] += sum[c];
  });
}

// The gradient of the maps where it comes from the anchors alone.
template <class T>
void spread(const Map& gradient, const Runs& runs,
            const T* anchors,  // [masks, channels] their gradients over the areas
            int64_t begin, int64_t end, T* scratch) {
  T* tile = scratch + padded(gradient.channels);  // [channels, kTilePixels]
  for (int64_t i = 0; i < gradient.channels * kTilePixels; ++i) tile[i] = 0;
  spread_tile(runs, begin, end, anchors, gradient.channels, scratch, tile);
  write_channels(gradient, begin, end, tile, kTilePixels);
}

}  // namespace SEA_ISA
}  // namespace sea
