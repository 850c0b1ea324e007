// The gradient of the student's maps from all losses at once. Each map is read once and its gradient written once; one
// kernel per loss would read and write the gradient three times.
#pragma once
#include "distance.h"

namespace sea {
namespace SEA_ISA {

// The gradients of one row of a tile: in registers, where there are enough.
template <class T>
struct Row {
  Vec<T> vectors[kVectors<T>] = {};

  void write(T* out, bool past_caches) const {
    past_caches &= reinterpret_cast<uintptr_t>(out) % SEA_VECTOR_BYTES == 0;
    for (int v = 0; v < kVectors<T>; ++v)
      past_caches ? stream(out + v * kLanes<T>, vectors[v]) : store(out + v * kLanes<T>, vectors[v]);
  }
  // += scale * x, in some pixels
  void add(const T* x, const T* scale, const Pixels<T>& pixels) {
    for (int v = 0; v < kVectors<T>; ++v)
      vectors[v] += keep<T>(load(scale + v * kLanes<T>) * load(x + v * kLanes<T>), pixels.vectors[v]);
  }
};

// What a tile's pixels receive from their masks: the same for all pixels of a run.
template <class T>
struct Spread {
  // A run and the pixels of one vector that are in it.
  struct Part {
    int64_t run;
    Mask<T> lanes;
  };
  int64_t first[kVectors<T> + 1];  // part of each vector
  Part parts[kVectors<T> + kTilePixels];

  void add_to(Row<T>& row, const T* sums, int64_t channels) const {
    for (int v = 0; v < kVectors<T>; ++v)
      for (int64_t i = first[v]; i < first[v + 1]; ++i)
        row.vectors[v] += keep<T>(splat(sums[parts[i].run * channels]), parts[i].lanes);
  }
};

// Fills `out`, and returns the valid pixels.
template <class T>
inline Pixels<T> spread_runs(const Backward<T>& task, int64_t begin, int64_t end, Spread<T>& out,
                             T* sums) {  // [kTilePixels runs, channels]
  const int64_t channels = task.student.channels;
  Pixels<T> valid{};
  int64_t count = 0, parts = 0;
  int next = 0;  // vector
  task.runs->each(begin, end, [&](int64_t run, int64_t from, int64_t to) {
    if (!task.runs->is_valid(run)) return;
    from -= begin;
    to -= begin;
    valid.add(from, to);
    if (!task.spread) return;
    for (int64_t v = from / kLanes<T>; v * kLanes<T> < to; ++v) {
      while (next <= v) out.first[next++] = parts;
      out.parts[parts++] = {count, lanes_between<T>(from - v * kLanes<T>, to - v * kLanes<T>)};
    }
    const int32_t* mask = task.runs->masks + task.runs->first[run];
    T* sum = sums + count++ * channels;
    std::memcpy(sum, task.spread + *mask * channels, channels * sizeof(T));
    while (++mask < task.runs->masks + task.runs->first[run + 1])
      for (int64_t c = 0; c < channels; ++c) sum[c] += task.spread[*mask * channels + c];
  });
  while (next <= kVectors<T>) out.first[next++] = parts;
  return valid;
}

// Adds to a row, one channel of an image, scale (softmax of the student - softmax of the teacher).
template <class T>
inline void add_localization(
    const Backward<T>& task,
    const T* softmax,  // of the student: maximum, 1 / sum; of the teacher likewise; batch * channels apart
    const T* student, const T* teacher, const Pixels<T>& inside, Row<T>& out) {
  const int64_t rows = task.student.batch * task.student.channels;
  const T student_scale = task.localization_scale * softmax[rows];
  const T teacher_scale = task.localization_scale * softmax[3 * rows];
  for (int v = 0; v < kVectors<T>; ++v) {
    const Vec<T> s = exp((load(student + v * kLanes<T>) - softmax[0]) * task.inverse_temperature);
    const Vec<T> t = exp((load(teacher + v * kLanes<T>) - softmax[2 * rows]) * task.inverse_temperature);
    out.vectors[v] += keep<T>(s * student_scale - t * teacher_scale, inside.vectors[v]);
  }
}

// The pixels [begin, end), at most a tile.
template <class T>
void backward(const Backward<T>& task, int64_t begin, int64_t end, T* scratch) {
  const int64_t channels = task.student.channels;
  const int64_t rows = task.with_distance ? task.distance.student_anchors.rows : 0;
  const bool valid = task.runs && !task.runs->skips(begin, end), distance = task.with_distance && valid;
  T* chunk = scratch;                                     // [kChunk, kTilePixels]
  T* student_copy = chunk + kChunk * kTilePixels;         // [kChunk, kTilePixels]
  T* teacher_copy = student_copy + kChunk * kTilePixels;  // [kChunk, kTilePixels]
  T* sums = teacher_copy + kChunk * kTilePixels;          // [kTilePixels, channels]
  T* last = sums + kTilePixels * channels;                // [kTilePixels]
  T* own = last + kTilePixels;                            // [rows + 1, kTilePixels]
  T* others = own + (rows + 1) * kTilePixels;             // [rows, kTilePixels]
  T* features = others + rows * kTilePixels;              // [channels, kTilePixels]

  const T* coefficients = task.coefficients ? task.coefficients + begin * (rows + 1) : own;
  if (distance) {
    T* inverse_norm = last;  // overwritten by `last` below
    if (!task.coefficients) compute_coefficients(task.distance, begin, end, features, inverse_norm, own, others);
    for (int64_t n = 0; n < kTilePixels; ++n) last[n] = task.distance_scale * coefficients[rows * kTilePixels + n];
  }
  Pixels<T> valid_pixels{}, inside_image[kTilePixels];
  Spread<T> spread;
  const T* softmax[kTilePixels];  // of the images that the tile meets
  int64_t images = 0;
  if (valid) valid_pixels = spread_runs(task, begin, end, spread, sums);
  if (task.softmax)
    inside(task.student, task.extents, begin, end, [&](int64_t b, int64_t from, int64_t to) {
      const T* own_softmax = task.softmax + b * channels;
      if (images == 0 || softmax[images - 1] != own_softmax) {
        softmax[images] = own_softmax;
        inside_image[images++] = {};
      }
      inside_image[images - 1].add(from - begin, to - begin);
    });

  const bool large = is_large(task.gradient);
  for (int64_t c0 = 0; c0 < channels; c0 += kChunk) {
    const int64_t count = c0 + kChunk < channels ? kChunk : channels - c0;
    Rows<T> student{}, teacher{}, out = map_rows<T>(task.gradient, begin, end, c0);
    const bool direct = out.data != nullptr;
    if (!direct) out = {chunk, kTilePixels, 0};
    if (distance || images > 0) student = read_rows(task.student, begin, end, c0, count, student_copy);
    if (images > 0) teacher = read_rows(task.teacher, begin, end, c0, count, teacher_copy);
    if (distance) multiply_directions(rows, c0, count, coefficients, task.direction, chunk);
    for (int64_t c = 0; c < count; ++c) {
      Row<T> row;
      if (distance)
        for (int v = 0; v < kVectors<T>; ++v) row.vectors[v] = load(chunk + c * kTilePixels + v * kLanes<T>);
      if (distance || images > 0) student.template prefetch_next<false>(c);
      if (distance) row.add(student[c], last, valid_pixels);
      if (valid && task.spread) spread.add_to(row, sums + c0 + c, channels);
      if (images > 0) teacher.template prefetch_next<false>(c);
      for (int64_t i = 0; i < images; ++i)
        add_localization(task, softmax[i] + c0 + c, student[c], teacher[c], inside_image[i], row);
      if (direct && !large) out.template prefetch_next<true>(c);
      row.write(out[c], direct && large);
    }
    if (!direct) write_channels(task.gradient, begin, end, c0, count, chunk, kTilePixels);
  }
}

}  // namespace SEA_ISA
}  // namespace sea
