// The masks of one level, run-length encoded: a run is a stretch of pixels that lie in the same masks. A row of pixels
// is a handful of runs, so what is done once per run is nearly free beside what is done once per pixel.
#pragma once
#include <cstdint>

namespace sea {

// Code of every instruction set includes this file. All functions are always inlined, so that none is compiled for one
// instruction set and then linked for all.
struct Runs {
  int64_t size;
  const int64_t* begin;  // [size + 1] first pixel, counted over batch and rows; the last entry ends the level
  const int64_t* first;  // [size + 1] into masks
  const int32_t* masks;  // the masks of each run, one run after the other; a run without any has no valid pixels

  __attribute__((always_inline)) bool is_valid(int64_t run) const { return first[run] < first[run + 1]; }

  // The run that holds a pixel.
  __attribute__((always_inline)) int64_t find(int64_t pixel) const {
    int64_t low = 0, high = size;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begin[middle] <= pixel ? low : high) = middle;
    }
    return low;
  }

  // Whether none of the pixels [from, to) is valid. It looks at one run only, so it may return false even if none is.
  __attribute__((always_inline)) bool skips(int64_t from, int64_t to) const { return ends_invalid(find(from), to); }
  // The same, where the run that holds the first pixel is known.
  __attribute__((always_inline)) bool ends_invalid(int64_t run, int64_t to) const {
    return !is_valid(run) && begin[run + 1] >= to;
  }

  // Calls f(run, begin, end) for the runs that meet [from, to), cut to it.
  template <class F>
  __attribute__((always_inline)) void each(int64_t from, int64_t to, F f) const {
    each(find(from), from, to, f);
  }
  // The same, where the run that holds the first pixel is known.
  template <class F>
  __attribute__((always_inline)) void each(int64_t run, int64_t from, int64_t to, F f) const {
    for (; run < size && begin[run] < to; ++run)
      f(run, begin[run] > from ? begin[run] : from, begin[run + 1] < to ? begin[run + 1] : to);
  }
};

}  // namespace sea
