// Anchors: the mean of a map over each of its masks, and all computations on the means alone, one mask at a time.
//
// pool() leaves the sums of each slice; write_means() adds these up in a fixed order and divides by the area. Between
// the means and compare() a group of processes sums up the anchors of all ranks. compare() computes the terms of the
// anchor loss, the difference of the anchors (for backward), and the unit anchors (for the distances). project() goes
// the other way: it computes the gradient of the student's anchors from the moments of the distances.
//
// Tables have a row for each mask; rows of empty masks are zero.
#pragma once
#include <cuda/launch.h>

#include "reduce.cuh"
#include "tile.cuh"

namespace sea {

constexpr int kAnchorThreads = 256;
constexpr int64_t kReduceBytes = 32 * sizeof(double);  // of shared memory, for sum_over_block()

// Vectors no longer than this have no direction. Test with n <= kSmallest, so that NaN is not taken for zero.
constexpr double kSmallest = 1e-12;

template <class T>
__device__ inline T inverse_or_zero(T norm) {
  return norm <= static_cast<T>(kSmallest) ? T(0) : 1 / norm;
}

// How many masks of a level have pixels. All threads of the block call it.
__device__ inline int nonempty_masks(const Masks& masks, int level) {
  int found = 0;
  for (int p = 0; p < masks.masks; p += blockDim.x) {
    const int mine = p + threadIdx.x;
    found += __syncthreads_count(mine < masks.masks && masks.area[level * masks.masks + mine] > 0);
  }
  return found;
}

// ---------------------------------------------------------------------------------------------------- means from sums

// An entry of pool(): every slice adds up the pixels of each mask, in tables of its own, and stores a softmax for each
// strip of an image that it meets.
struct SumsEntry : Entry {
  int64_t first_sum;      // table first_sum + slice * sides is a slice's first one
  int64_t first_softmax;  // first_softmax + slice + strip is where a slice, and no other, stores that of a strip
  int32_t sides;          // its tables: student and teacher; or the student's alone, or the difference; or none

  explicit SumsEntry(const Pair& pair) : Entry(pair) {}
  SumsEntry() = default;
  __device__ int64_t table(int64_t slice) const { return first_sum + slice * sides; }
};

// pool() stores twice the sums of 16-bit maps, since a factor of 2 is cheaper there than 1. Sums above half of the
// largest float32 overflow; only bfloat16 maps can reach that.
template <class X>
constexpr int kSumScale = sizeof(X) == 2 ? 2 : 1;

// How many tables of sums there are, and how many softmaxes.
struct SumsSize {
  int64_t tables = 0, softmaxes = 0;
};

// Assigns their places to every entry. For each slice two tables (student, teacher); one if there are no teachers
// (student), or if the maps are of 16 bits and have no distance loss (student less teacher); none if nothing is pooled.
// With the localization loss, a softmax for each slice and each strip.
template <class X, class E>
SumsSize place_sums(Pyramid<E>& pyramid, bool teachers) {
  SumsSize out;
  for (int32_t i = 0; i < pyramid.count; ++i) {
    E& entry = pyramid.entries[i];
    const bool apart = teachers && (entry.losses & kDistance || sizeof(X) > 2);
    entry.sides = !(entry.losses & (kAnchor | kDistance)) ? 0 : apart ? 2 : 1;
    const SliceRange range = slices_of(pyramid, i);
    const int64_t slices = range.last - range.first + 1;
    entry.first_sum = out.tables - range.first * entry.sides;
    out.tables += slices * entry.sides;
    entry.first_softmax = out.softmaxes - range.first;
    if (entry.losses & kLocalization) out.softmaxes += slices + entry.strips();
  }
  return out;
}

// Writes the means of entry `i` over one mask to entry.anchors. Entries without anchors[1] get the student's minus the
// teacher's. All threads call it.
template <class X, class E>
__device__ inline void write_means(const Pyramid<E>& pyramid, int64_t i, const Masks& masks,
                                   const Compute<X>* sums,  // [tables, masks, max_channels], times kSumScale
                                   int64_t mask) {
  using T = Compute<X>;
  const E& entry = pyramid.entries[i];
  const float area = masks.area[entry.level * masks.masks + mask];
  const SliceRange range = area > 0 ? slices_of(pyramid, i) : SliceRange{0, -1};
  const int64_t side_step = masks.masks * pyramid.max_channels, step = entry.sides * side_step;
  const T* first = sums + entry.table(range.first) * side_step + mask * pyramid.max_channels;  // [slices, channels]
  const auto mean = [&](int side, int64_t channel) {
    T sum = 0;
#pragma unroll 8  // for so many loads under way at once
    for (int64_t s = 0; s <= range.last - range.first; ++s) sum += first[s * step + side * side_step + channel];
    return sum / (kSumScale<X> * max(static_cast<T>(area), T(1)));
  };
  T* out[2] = {static_cast<T*>(entry.anchors[0]), static_cast<T*>(entry.anchors[1])};  // [masks, anchor_pitch]
  for (int64_t c = threadIdx.x; c < entry.channels; c += blockDim.x) {
    const T student = mean(0, c), teacher = entry.sides == 2 ? mean(1, c) : T(0);
    out[0][mask * entry.anchor_pitch + c] = out[1] ? student : student - teacher;
    if (out[1]) out[1][mask * entry.anchor_pitch + c] = teacher;
  }
}

// ------------------------------------------------------------------------------------------------------- unit anchors

// Writes one anchor at length 1, in parts if the type requires them. Returns 1 / length, or 0 if the anchor has no
// direction. All threads of the block call it.
template <class X, class T>
__device__ inline T write_unit(const T* anchor,  // [channels]; null: zero
                               int64_t channels, int64_t masks, int64_t pitch, int64_t mask,
                               X* units,           // [parts, masks, pitch]
                               double* scratch) {  // [32] in shared memory
  double square = 0;
  for (int64_t c = threadIdx.x; anchor && c < channels; c += blockDim.x)
    square += static_cast<double>(anchor[c]) * anchor[c];
  const T inverse = inverse_or_zero(static_cast<T>(sqrt(sum_over_block(square, scratch))));
  for (int64_t c = threadIdx.x; c < pitch; c += blockDim.x) {
    const T value = anchor && c < channels ? anchor[c] * inverse : T(0);
    X* out = units + mask * pitch + c;
    *out = narrow<X>(value);
    if constexpr (kParts<X> == 2) out[masks * pitch] = narrow<X>(value - widen(*out));
  }
  return inverse;
}

// ------------------------------------------------------------------------------------------- what follows from anchors

struct CompareEntry : Entry {
  const void* anchors[2];  // T [masks, anchor_pitch]; or the difference, and null
  int64_t anchor_pitch;
  double* anchor_terms;  // [masks]
  void* units;           // X [2 sides, parts, masks, pitch]
  void* inverse_norm;    // T [masks]
  void* difference;      // T [masks, pitch], as in Pair

  CompareEntry() = default;
  explicit CompareEntry(const Pair& pair)
      : Entry(pair),
        anchors{pair.anchors[0], pair.anchors[1]},
        anchor_pitch(pair.anchor_pitch),
        anchor_terms(pair.anchor_terms),
        units(pair.units),
        inverse_norm(pair.inverse_norm),
        difference(pair.difference) {}
};

struct CompareParams {
  Pyramid<CompareEntry> pyramid;
  Masks masks;
};

// Grid: masks, entries.
template <class X>
__global__ void __launch_bounds__(kAnchorThreads) compare(const __grid_constant__ CompareParams params) {
  using T = Compute<X>;
  const CompareEntry& entry = params.pyramid.entries[blockIdx.y];
  const int64_t masks = params.masks.masks, mask = blockIdx.x, pitch = entry.pitch();
  const float area = params.masks.area[entry.level * masks + mask];
  const bool empty = !(area > 0);
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const T* anchors[2];  // [channels]; null: zero
  for (int side = 0; side < 2; ++side)
    anchors[side] = !empty && entry.anchors[side]
                        ? static_cast<const T*>(entry.anchors[side]) + mask * entry.anchor_pitch
                        : nullptr;
  if (entry.losses & kAnchor) {
    const double count = static_cast<double>(nonempty_masks(params.masks, entry.level)) * entry.channels;
    const T factor = empty ? T(0) : static_cast<T>(2 / (count * area));
    double error = 0;
    T* out = static_cast<T*>(entry.difference) + mask * pitch;
    for (int64_t c = threadIdx.x; c < entry.channels; c += kAnchorThreads) {
      const T difference = (anchors[0] ? anchors[0][c] : T(0)) - (anchors[1] ? anchors[1][c] : T(0));
      out[c] = difference * factor;
      error += static_cast<double>(difference) * difference;
    }
    error = sum_over_block(error, scratch);
    if (threadIdx.x == 0) entry.anchor_terms[mask] = !empty && count > 0 ? error / count : 0;
  }
  if (entry.losses & kDistance)
    for (int side = 0; side < 2; ++side) {
      X* units = static_cast<X*>(entry.units) + side * kParts<X> * masks * pitch;
      const T inverse = write_unit(anchors[side], entry.channels, masks, pitch, mask, units, scratch);
      if (side == 0 && threadIdx.x == 0) static_cast<T*>(entry.inverse_norm)[mask] = inverse;
    }
}

// ------------------------------------------------------------------------------------------------ gradient of anchors

struct ProjectEntry : Entry {
  const void* units;         // X [parts, masks, pitch] of the student
  const void* inverse_norm;  // T [masks]
  void* anchor_gradient;     // T [masks, table_pitch]
  int64_t table_pitch;

  ProjectEntry() = default;
  explicit ProjectEntry(const Pair& pair)
      : Entry(pair),
        units(pair.units),
        inverse_norm(pair.inverse_norm),
        anchor_gradient(pair.anchor_gradient),
        table_pitch(pair.table_pitch) {}
};

// One anchor's gradient from the moments D = sum_u (e / |F|) F of its cosines: (D - (D . h) h) / |a|, where h is the
// unit anchor, times scale / divisor. All threads of the block call it.
template <class X>
__device__ inline void project(const Pyramid<ProjectEntry>& pyramid,  // the one that the moments were summed over
                               int64_t i, const Masks& masks, int64_t mask,
                               const Compute<X>* moments,  // [slices + entries, masks, max_channels]
                               Compute<X> scale, Compute<X> divisor,
                               Compute<X>* scratch) {  // [32] in shared memory
  using T = Compute<X>;
  const ProjectEntry& entry = pyramid.entries[i];
  const int64_t pitch = entry.pitch();
  const bool empty = !(masks.area[entry.level * masks.masks + mask] > 0);
  const SliceRange range = empty ? SliceRange{0, -1} : slices_of(pyramid, i);
  T* out = static_cast<T*>(entry.anchor_gradient) + mask * entry.table_pitch;  // [channels]
  const X* unit = static_cast<const X*>(entry.units) + mask * pitch;           // [channels]
  const auto unit_at = [&](int64_t c) {
    T value = widen(unit[c]);
    if constexpr (kParts<X> == 2) value += widen(unit[masks.masks * pitch + c]);
    return value;
  };
  T along = 0;
  for (int64_t c = threadIdx.x; c < entry.channels; c += blockDim.x) {
    T sum = 0;
#pragma unroll 8
    for (int64_t s = range.first; s <= range.last; ++s)
      sum += moments[((s + i) * masks.masks + mask) * pyramid.max_channels + c];
    out[c] = sum;
    if (!empty) along += sum * unit_at(c);
  }
  along = sum_over_block(along, scratch);
  const T factor = static_cast<const T*>(entry.inverse_norm)[mask] * scale / divisor;
  for (int64_t c = threadIdx.x; c < entry.channels; c += blockDim.x)
    out[c] = empty ? T(0) : (out[c] - along * unit_at(c)) * factor;
}

}  // namespace sea
