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
inline void pool_tile(const Runs& runs, int64_t run, int64_t begin, int64_t end, Rows<T> rows, int64_t channels,
                      int64_t width,
                      T* sums) {  // [masks, width]
  constexpr int n = kLanes<T>;
  runs.each(run, begin, end, [&](int64_t run, int64_t from, int64_t to) {
    if (!runs.is_valid(run)) return;
    Pixels<T> pixels;
    pixels.add(from - begin, to - begin);
    const int64_t first = (from - begin) / n, last = (to - begin + n - 1) / n;
    for (int64_t c0 = 0; c0 < channels; c0 += n) {
      Vec<T> partial[n];
      for (int c = 0; c < n; ++c) {
        const T* row = rows[c0 + c < channels ? c0 + c : channels - 1];
        partial[c] = keep<T>(load(row + first * n), pixels.vectors[first]);
        for (int64_t v = first + 1; v < last; ++v) partial[c] += keep<T>(load(row + v * n), pixels.vectors[v]);
      }
      const Vec<T> sum = sum_rows<T>(partial);
      for (int64_t i = runs.first[run]; i < runs.first[run + 1]; ++i) {
        T* out = sums + runs.masks[i] * width + c0;
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
  const Map& map = task.student;
  const bool pair = task.teacher.data != nullptr;
  const int64_t width = pool_channels<T>(map), c0 = block * width, image = map.height * map.width;
  const int64_t rows = map.batch * map.channels;
  const int64_t channels = c0 + width > map.channels ? map.channels - c0 : width;
  T* copies[2] = {scratch, scratch + width * kTilePixels};  // [width, kTilePixels] of student and teacher
  T* sums[2] = {copies[1] + width * kTilePixels, copies[1] + width * (kTilePixels + task.masks)};  // [masks, width]
  for (T* p = sums[0]; p < sums[1] + task.masks * width; ++p) *p = 0;

  int64_t run = 0;  // that holds the first pixel of the tile
  for (int64_t b = 0; b < map.batch; ++b) {
    Softmax<T> states[4 * kLanes<T>];
    bool has_pixels = false;
    for (int64_t begin = b * image; begin < (b + 1) * image; begin += kTilePixels) {
      const int64_t end = begin + kTilePixels < (b + 1) * image ? begin + kTilePixels : (b + 1) * image;
      while (task.runs && task.runs->begin[run + 1] <= begin) ++run;
      const bool pools = task.runs && !task.runs->ends_invalid(run, end);
      bool localizes = false;
      Pixels<T> pixels;
      if (task.softmax)
        inside(map, task.extents, begin, end, [&](int64_t, int64_t from, int64_t to) {
          pixels.add(from - begin, to - begin);
          has_pixels = localizes = true;
        });
      if (!pools && !localizes) continue;
      Rows<T> tiles[2];
      for (int side = 0; side < 1 + pair; ++side) {
        tiles[side] = read_rows(side ? task.teacher : map, begin, end, c0, channels, copies[side]);
        for (int64_t c = 0; c < channels; ++c) tiles[side].template prefetch_next<false>(c);
        if (pools) pool_tile(*task.runs, run, begin, end, tiles[side], channels, width, sums[side]);
      }
      for (int64_t c = 0; localizes && c < channels; ++c)
        add_softmax(states[c], pixels, task.inverse_temperature, tiles[0][c], tiles[1][c]);
    }
    for (int64_t c = 0; has_pixels && c < channels; ++c) {
      const Softmax<T>& s = states[c];
      const T student_sum = sum_lanes<T>(s.student_sum), teacher_sum = sum_lanes<T>(s.teacher_sum);
      // No logsumexp, which is rounded at the size of the maximum, however small the differences are.
      T* out = task.softmax + b * map.channels + c0 + c;
      out[0] = s.student_max;
      out[rows] = 1 / student_sum;
      out[2 * rows] = s.teacher_max;
      out[3 * rows] = 1 / teacher_sum;
      task.divergence[c0 + c] +=
          (sum_lanes<T>(s.difference) / teacher_sum + (s.student_max - s.teacher_max)) * task.inverse_temperature +
          std::log(student_sum / teacher_sum);
    }
  }
  if (task.runs) {
    write_means(task, sums[0], width, c0, channels, task.student_anchors);
    // Not `pair`: maps without images have no memory, but they have anchors.
    if (task.teacher_anchors) write_means(task, sums[1], width, c0, channels, task.teacher_anchors);
  }
}

}  // namespace SEA_ISA
}  // namespace sea
