// Anchors: masked means of features. The same pass over the maps feeds the online softmax of the localization loss, so
// box maps are read once for both. One task is a block of channels of one level.
#pragma once
#include "kernels.h"
#include "softmax.h"
#include "tile.h"

namespace sea {
namespace SEA_ISA {

// A tile of both sides, and the softmax of an image, where the pixels of a channel lie side by side.
template <class T>
struct PixelLanes {
  static constexpr int64_t kChannels = 16;
  Rows<T> tiles[2];
  Softmax<T, T> states[kChannels];

  void read(int side, const Map& map, int64_t begin, int64_t end, int64_t c0, int64_t channels, T* copy) {
    tiles[side] = read_rows(map, begin, end, c0, channels, copy);
    for (int64_t c = 0; c < channels; ++c) tiles[side].template prefetch_next<false>(c);
  }
  // Sums over the pixels [from, to) of the channels from c on, one in each lane. Lanes beyond the last channel are
  // undefined.
  Vec<T> sum(int side, int64_t c, int64_t channels, int64_t from, int64_t to) const {
    constexpr int n = kLanes<T>;
    const int64_t first = from / n, last = (to - 1) / n;  // vectors
    const Mask<T> after = ~first_lanes<T>(from - first * n), before = first_lanes<T>(to - last * n);
    Vec<T> partial[n];
    for (int i = 0; i < n; ++i) {
      const T* row = tiles[side][c + i < channels ? c + i : c];
      partial[i] = keep<T>(load(row + first * n), first == last ? after & before : after);
      for (int64_t v = first + 1; v < last; ++v) partial[i] += load(row + v * n);
      if (first < last) partial[i] += keep<T>(load(row + last * n), before);
    }
    return sum_rows<T>(partial);
  }
  void add(int64_t channels, int64_t from, int64_t to, T inverse_temperature) {
    Pixels<T> pixels{};
    pixels.add(from, to);
    for (int64_t c = 0; c < channels; ++c)
      add_softmax(states[c], pixels, from / kLanes<T>, (to - 1) / kLanes<T>, inverse_temperature, tiles[0][c],
                  tiles[1][c]);
  }
  SoftmaxSums<T> total(int64_t c) const {
    const Softmax<T, T>& s = states[c];
    return {s.student_max, s.teacher_max, sum_lanes<T>(s.student_sum), sum_lanes<T>(s.teacher_sum),
            sum_lanes<T>(s.difference)};
  }
};

// The same where the channels of a pixel lie side by side: whole cache lines of them.
template <class T>
struct ChannelLanes {
  static constexpr int64_t kChannels = 4 * kLanes<T>;
  const T* tiles[2];  // [kTilePixels, kChannels]
  Softmax<T, Vec<T>> states[4];

  void read(int side, const Map& map, int64_t begin, int64_t end, int64_t c0, int64_t channels, T* copy) {
    read_pixels(map, begin, end, c0, channels, copy, kChannels);
    tiles[side] = copy;
  }
  Vec<T> sum(int side, int64_t c, int64_t, int64_t from, int64_t to) const {
    Vec<T> sum{};
    for (int64_t n = from; n < to; ++n) sum += load(tiles[side] + n * kChannels + c);
    return sum;
  }
  void add(int64_t channels, int64_t from, int64_t to, T inverse_temperature) {
    for (int64_t c = 0; c < channels; c += kLanes<T>)
      add_softmax(states[c / kLanes<T>], to - from, inverse_temperature, tiles[0] + from * kChannels + c,
                  tiles[1] + from * kChannels + c, kChannels);
  }
  SoftmaxSums<T> total(int64_t c) const {
    const Softmax<T, Vec<T>>& s = states[c / kLanes<T>];
    const int64_t i = c % kLanes<T>;
    return {s.student_max[i], s.teacher_max[i], s.student_sum[i], s.teacher_sum[i], s.difference[i]};
  }
};

template <class T>
int64_t pool_blocks(const Map& map) {
  const int64_t channels = map.stride[1] == 1 ? ChannelLanes<T>::kChannels : PixelLanes<T>::kChannels;
  return (map.channels + channels - 1) / channels;
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

template <class T, class Tiles>
inline void pool_block(const Pool<T>& task, int64_t block, T* scratch) {
  constexpr int64_t width = Tiles::kChannels;
  static_assert(width <= kMaxPoolChannels);
  const Map& map = task.student;
  const bool pair = task.teacher.data != nullptr;
  const int64_t c0 = block * width, image = map.height * map.width, rows = map.batch * map.channels;
  const int64_t channels = c0 + width > map.channels ? map.channels - c0 : width;
  T* copies[2] = {scratch, scratch + width * kTilePixels};
  T* sums[2] = {copies[1] + width * kTilePixels, copies[1] + width * (kTilePixels + task.masks)};  // [masks, width]
  for (T* p = scratch; p < sums[1] + task.masks * width; ++p) *p = 0;  // copies too: the last block is narrower

  int64_t run = 0;  // the run that holds the tile's first pixel
  for (int64_t b = 0; b < map.batch; ++b) {
    Tiles tiles;
    bool localizes = false;
    for (int64_t begin = b * image; begin < (b + 1) * image; begin += kTilePixels) {
      const int64_t end = begin + kTilePixels < (b + 1) * image ? begin + kTilePixels : (b + 1) * image;
      while (task.runs && task.runs->begin[run + 1] <= begin) ++run;
      const bool pools = task.runs && !task.runs->ends_invalid(run, end);
      if (!pools && !task.softmax) continue;
      for (int side = 0; side < 1 + pair; ++side)
        tiles.read(side, side ? task.teacher : map, begin, end, c0, channels, copies[side]);
      // Sums of a run first, then one addition for each of its masks. The partial sums stay short, which keeps the
      // rounding small.
      if (pools)
        task.runs->each(run, begin, end, [&](int64_t k, int64_t from, int64_t to) {
          for (int side = 0; task.runs->is_valid(k) && side < 1 + pair; ++side)
            for (int64_t c = 0; c < channels; c += kLanes<T>) {
              const Vec<T> sum = tiles.sum(side, c, channels, from - begin, to - begin);
              for (int64_t i = task.runs->first[k]; i < task.runs->first[k + 1]; ++i) {
                T* out = sums[side] + task.runs->masks[i] * width + c;
                store(out, load(out) + sum);
              }
            }
        });
      if (task.softmax)
        inside(map, task.extents, begin, end, [&](int64_t, int64_t from, int64_t to) {
          localizes = true;
          tiles.add(channels, from - begin, to - begin, task.inverse_temperature);
        });
    }
    for (int64_t c = 0; localizes && c < channels; ++c) {
      const SoftmaxSums<T> s = tiles.total(c);
      // No logsumexp, which is rounded at the size of the maximum, however small the differences are.
      T* out = task.softmax + b * map.channels + c0 + c;
      out[0] = s.student_max;
      out[rows] = 1 / s.student_sum;
      out[2 * rows] = s.teacher_max;
      out[3 * rows] = 1 / s.teacher_sum;
      task.divergence[c0 + c] +=
          (s.difference / s.teacher_sum + (s.student_max - s.teacher_max)) * task.inverse_temperature +
          std::log(s.student_sum / s.teacher_sum);
    }
  }
  if (task.runs) {
    write_means(task, sums[0], width, c0, channels, task.student_anchors);
    // Not `pair`: maps without images have no memory, but they have anchors.
    if (task.teacher_anchors) write_means(task, sums[1], width, c0, channels, task.teacher_anchors);
  }
}

template <class T>
void pool(const Pool<T>& task, int64_t block, T* scratch) {
  task.student.stride[1] == 1 ? pool_block<T, ChannelLanes<T>>(task, block, scratch)
                              : pool_block<T, PixelLanes<T>>(task, block, scratch);
}

}  // namespace SEA_ISA
}  // namespace sea
