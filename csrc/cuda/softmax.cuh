// Localization: the softmax of each channel over the positions of its image.
//
// It needs no extra pass over memory. pool() updates an online softmax of each channel while it has the tile in shared
// memory. As in FlashAttention, the sums so far are rescaled when a larger maximum is found. pool() also keeps the
// teacher's weighted sum of differences, which gives the divergence. Each slice stores its state, merge_softmax()
// combines the slices, and backward computes the gradient from the maximum and the sum.
#pragma once
#include "reduce.cuh"
#include "runs.cuh"
#include "tile.cuh"

namespace sea {

// The elementwise maximum of 16 bytes of elements; a number rather than NaN.
template <class X>
__device__ inline void raise(Packed<X>& most, const Packed<X>& x) {
  if constexpr (sizeof(X) == 2) {
    using Pair = std::conditional_t<std::is_same_v<X, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; k += 2) {
      Pair& pair = reinterpret_cast<Pair&>(most.x[k]);
      pair = __hmax2(pair, reinterpret_cast<const Pair&>(x.x[k]));
    }
  } else {
#pragma unroll
    for (int k = 0; k < Packed<X>::kSize; ++k) most.x[k] = max(most.x[k], x.x[k]);
  }
}

// The sum of exponentials of student and teacher over a common shift, and the teacher's weighted sum of differences.
// The shift is the maximum over the temperature, in the units of the exponentials. It is rounded, but the same for all
// that it is subtracted from, so this changes nothing. Differences are those of the maps.
template <class X>
struct OnlineSoftmax {
  using T = Compute<X>;
  using Exp = Exponential<X>;
  static constexpr int kSize = 5;
  T student_shift = -INFINITY, student_sum = 0, teacher_shift = -INFINITY, teacher_sum = 0, difference = 0;

  // Raises the shifts to these.
  __device__ void rescale(T student, T teacher) {
    student = max(student, student_shift);
    teacher = max(teacher, teacher_shift);
    if (student_sum != 0) student_sum *= Exp::of(student_shift - student, T(1));
    if (teacher_sum != 0) {
      const T factor = Exp::of(teacher_shift - teacher, T(1));
      teacher_sum *= factor;
      difference *= factor;
    }
    student_shift = student;
    teacher_shift = teacher;
  }

  // Neither times the scale is larger than its shift. scale, here and below: Exp::scale(temperature). Returns the
  // exponentials that it has added.
  struct Terms {
    T student, teacher;
  };
  __device__ Terms add(T student, T teacher, T scale) {
    const Terms terms{Exp::of(fma(student, scale, -student_shift), T(1)),
                      Exp::of(fma(teacher, scale, -teacher_shift), T(1))};
    student_sum += terms.student;
    teacher_sum += terms.teacher;
    difference += terms.teacher * (teacher - student);
    return terms;
  }

  // The sums of kLanes neighboring lanes, which have the same shifts.
  template <int kLanes>
  __device__ void add_lanes() {
    student_sum = sum_over_lanes<kLanes>(student_sum);
    teacher_sum = sum_over_lanes<kLanes>(teacher_sum);
    difference = sum_over_lanes<kLanes>(difference);
  }

  // Raises the shifts to the maxima of the pixels from .. to - 1 of one channel, without those beyond the image.
  __device__ void rescale(const Tile<X>& student, const Tile<X>& teacher, const TileMasks& masks, int from, int to,
                          int channel, T scale) {
    constexpr int kStep = Packed<X>::kSize;
    constexpr uint32_t kAll = (1u << kStep) - 1;
    Packed<X> most[2];
#pragma unroll
    for (int k = 0; k < kStep; ++k) most[0].x[k] = most[1].x[k] = narrow<X>(-INFINITY);
    uint32_t any = 0;
    for (int u = from; u < to; u += kStep) {
      const uint32_t inside = masks.inside<kStep>(u);
      Packed<X> x[2] = {read_packed(student, channel, u), read_packed(teacher, channel, u)};
      if (inside != kAll)
#pragma unroll
        for (int k = 0; k < kStep; ++k)
          if (!(inside >> k & 1)) x[0].x[k] = x[1].x[k] = narrow<X>(-INFINITY);
      raise(most[0], x[0]);
      raise(most[1], x[1]);
      any |= inside;
    }
    T largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int k = 0; k < kStep; ++k)
      for (int side = 0; side < 2; ++side) largest[side] = max(largest[side], static_cast<T>(widen(most[side].x[k])));
    if (any != 0) rescale(largest[0] * scale, largest[1] * scale);
  }

  __device__ bool empty() const { return student_sum == 0; }

  __device__ void merge(OnlineSoftmax other) {
    if (other.empty()) return;
    rescale(other.student_shift, other.teacher_shift);
    other.rescale(student_shift, teacher_shift);
    student_sum += other.student_sum;
    teacher_sum += other.teacher_sum;
    difference += other.difference;
  }

  // KL(teacher || student)
  __device__ T divergence(T scale) const {
    // The terms may cancel, so all stay in the units of the exponentials: changing units would round once more.
    return (difference / teacher_sum * scale + (student_shift - teacher_shift) + Exp::log(student_sum / teacher_sum)) *
           static_cast<T>(Exp::kNatural);
  }

  __device__ void write(T* out, int64_t stride) const {  // out: [kSize], elements `stride` apart
    const T all[kSize] = {student_shift, student_sum, teacher_shift, teacher_sum, difference};
    for (int i = 0; i < kSize; ++i) out[i * stride] = all[i];
  }

  __device__ void read(const T* in, int64_t stride) {  // in: [kSize], elements `stride` apart
    student_shift = in[0];
    student_sum = in[stride];
    teacher_shift = in[2 * stride];
    teacher_sum = in[3 * stride];
    difference = in[4 * stride];
  }
};

// The softmax of a channel of an image as it is saved for backward: exp(x * scale - shift) * factor.
template <class X>
struct SavedSoftmax {
  using T = Compute<X>;
  using Exp = Exponential<X>;
  T student_shift, student_factor, teacher_shift, teacher_factor;

  // i: image * channels + channel; count: batch * channels
  __device__ void write(T* softmax, int64_t count, int64_t i) const {  // softmax: [4, batch, channels]
    softmax[i] = student_shift;
    softmax[count + i] = student_factor;
    softmax[2 * count + i] = teacher_shift;
    softmax[3 * count + i] = teacher_factor;
  }

  // For 16-bit maps the factors become part of the shifts, which is accurate enough for them.
  __device__ void read(const T* softmax, int64_t count, int64_t i) {  // softmax: [4, batch, channels]
    student_shift = softmax[i];
    student_factor = softmax[count + i];
    teacher_shift = softmax[2 * count + i];
    teacher_factor = softmax[3 * count + i];
    if constexpr (Exp::kFast) {
      student_shift -= Exp::log(student_factor);
      teacher_shift -= Exp::log(teacher_factor);
    }
  }

  // softmax of the student - softmax of the teacher
  __device__ T operator()(T student, T teacher, T scale) const {
    T x = Exp::of(fma(student, scale, -student_shift), T(1)), y = Exp::of(fma(teacher, scale, -teacher_shift), T(1));
    if constexpr (!Exp::kFast) {
      x *= student_factor;
      y *= teacher_factor;
    }
    return x - y;
  }
};

// For a block's share of the channels of one image of entry `i`: merges what the slices stored for the image's strips,
// saves it, and adds up its terms of the localization loss. E has first_softmax, as SumsEntry, and softmax and
// localization_terms, as Pair. All threads call it.
template <class X, class E>
__device__ inline void merge_softmax(const Pyramid<E>& pyramid, int64_t i,
                                     const Compute<X>* slices,  // [softmaxes, 5, max_channels]
                                     Compute<X> scale, int tile_pixels, int64_t image, int64_t block,
                                     double* scratch) {  // [32] in shared memory
  using T = Compute<X>;
  const E& entry = pyramid.entries[i];
  const int64_t channel = block * blockDim.x + threadIdx.x, count = entry.batch * entry.channels;
  double term = 0;
  if (channel < entry.channels) {
    OnlineSoftmax<X> all;
    const int64_t whole = (int64_t{1} << entry.strip_bits) / tile_pixels;  // tiles of all strips but the last one
    // left: the image's tiles to come; row: the first tile of a row, which is one strip of every image
    int64_t left = divide_up(entry.image(), tile_pixels), row = entry.first_tile;
    for (int64_t strip = image; left > 0; strip += entry.batch) {
      const int64_t tiles = left < whole ? left : whole, tile = row + image * tiles;
      const SliceRange range = slices_of(pyramid, i, tile, tile + tiles);
      for (int64_t s = range.first; s <= range.last; ++s) {
        OnlineSoftmax<X> one;
        one.read(slices + (entry.first_softmax + s + strip) * OnlineSoftmax<X>::kSize * pyramid.max_channels + channel,
                 pyramid.max_channels);
        all.merge(one);
      }
      left -= tiles;
      row += tiles * entry.batch;
    }
    SavedSoftmax<X>{all.student_shift, 1 / all.student_sum, all.teacher_shift, 1 / all.teacher_sum}.write(
        static_cast<T*>(entry.softmax), count, image * entry.channels + channel);
    const double temperature = 1 / (Exponential<X>::kNatural * scale);
    if (!all.empty()) term = all.divergence(scale) * temperature * temperature / static_cast<double>(count);
  }
  term = sum_over_block(term, scratch);
  if (threadIdx.x == 0 && block * blockDim.x < entry.channels)
    entry.localization_terms[image * divide_up(entry.channels, blockDim.x) + block] = term;
}

}  // namespace sea
