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

// The maximum and the sum of exponentials of student and teacher, and the teacher's weighted sum of differences. Maxima
// and differences are those of the maps, before the temperature is applied, so that subtracting them is exact.
template <class X>
struct OnlineSoftmax {
  using T = Compute<X>;
  using Exp = Exponential<X>;
  static constexpr int kSize = 5;
  T student_max = -INFINITY, student_sum = 0, teacher_max = -INFINITY, teacher_sum = 0, difference = 0;

  // Raises the maxima to include these. scale, here and below: Exp::scale(temperature)
  __device__ void rescale(T student, T teacher, T scale) {
    student = max(student, student_max);
    teacher = max(teacher, teacher_max);
    if (student_sum != 0) student_sum *= Exp::of(student_max - student, scale);
    if (teacher_sum != 0) {
      const T factor = Exp::of(teacher_max - teacher, scale);
      teacher_sum *= factor;
      difference *= factor;
    }
    student_max = student;
    teacher_max = teacher;
  }

  __device__ void add(T student, T teacher, T scale) {  // neither is larger than its maximum
    const T weight = Exp::of(teacher - teacher_max, scale);
    student_sum += Exp::of(student - student_max, scale);
    teacher_sum += weight;
    difference += weight * (teacher - student);
  }

  // Adds one channel of a tile, without the pixels beyond the image.
  __device__ void add_tile(const Tile<X>& student, const Tile<X>& teacher, const TileMasks& masks, int channel,
                           T scale) {
    constexpr int kStep = Packed<X>::kSize;
    T new_student = -INFINITY, new_teacher = -INFINITY, x[kStep], y[kStep];
    bool any = false;
    for (int u = 0; u < masks.pixels; u += kStep) {
      read_pixels(student, channel, u, x);
      read_pixels(teacher, channel, u, y);
      for (int k = 0; k < kStep; ++k)
        if (masks.inside_at(u + k)) {
          new_student = max(new_student, x[k]);
          new_teacher = max(new_teacher, y[k]);
          any = true;
        }
    }
    if (any) rescale(new_student, new_teacher, scale);
    for (int u = 0; any && u < masks.pixels; u += kStep) {
      read_pixels(student, channel, u, x);
      read_pixels(teacher, channel, u, y);
      for (int k = 0; k < kStep; ++k)
        if (masks.inside_at(u + k)) add(x[k], y[k], scale);
    }
  }

  __device__ bool empty() const { return student_sum == 0; }

  __device__ void merge(OnlineSoftmax other, T scale) {
    if (other.empty()) return;
    rescale(other.student_max, other.teacher_max, scale);
    other.rescale(student_max, teacher_max, scale);
    student_sum += other.student_sum;
    teacher_sum += other.teacher_sum;
    difference += other.difference;
  }

  // KL(teacher || student)
  __device__ T divergence(T scale) const {
    // The two terms may cancel, so both stay in the units of the exponentials: changing units would round once more.
    return ((difference / teacher_sum + (student_max - teacher_max)) * scale + Exp::log(student_sum / teacher_sum)) *
           static_cast<T>(Exp::kNatural);
  }

  __device__ void write(T* out, int64_t stride) const {  // out: [kSize], elements `stride` apart
    const T all[kSize] = {student_max, student_sum, teacher_max, teacher_sum, difference};
    for (int i = 0; i < kSize; ++i) out[i * stride] = all[i];
  }

  __device__ void read(const T* in, int64_t stride) {  // in: [kSize], elements `stride` apart
    student_max = in[0];
    student_sum = in[stride];
    teacher_max = in[2 * stride];
    teacher_sum = in[3 * stride];
    difference = in[4 * stride];
  }
};

// The softmax of a channel of an image as it is saved for backward.
template <class X>
struct SavedSoftmax {
  using T = Compute<X>;
  T student_max, student_scale, teacher_max, teacher_scale;

  // i: image * channels + channel; count: batch * channels
  __device__ void write(T* softmax, int64_t count, int64_t i) const {  // softmax: [4, batch, channels]
    softmax[i] = student_max;
    softmax[count + i] = student_scale;
    softmax[2 * count + i] = teacher_max;
    softmax[3 * count + i] = teacher_scale;
  }

  __device__ void read(const T* softmax, int64_t count, int64_t i) {  // softmax: [4, batch, channels]
    student_max = softmax[i];
    student_scale = softmax[count + i];
    teacher_max = softmax[2 * count + i];
    teacher_scale = softmax[3 * count + i];
  }

  // softmax of the student - softmax of the teacher
  __device__ T operator()(T student, T teacher, T scale) const {
    return Exponential<X>::of(student - student_max, scale) * student_scale -
           Exponential<X>::of(teacher - teacher_max, scale) * teacher_scale;
  }
};

// For a block's share of the channels of one image of entry `i`: the softmax of all its slices, to be saved, and the
// sum of its terms of the localization loss. E has softmax and localization_terms, as in Pair. All threads call it.
template <class X, class E>
__device__ inline void merge_softmax(const Pyramid<E>& pyramid, int64_t i,
                                     const Compute<X>* slices,  // [slices + entries * batch, 5, max_channels]
                                     Compute<X> scale, int tile_pixels, int64_t image, int64_t block,
                                     double* scratch) {  // [32] in shared memory
  using T = Compute<X>;
  const E& entry = pyramid.entries[i];
  const int64_t channel = block * blockDim.x + threadIdx.x, count = entry.batch * entry.channels;
  double term = 0;
  if (channel < entry.channels) {
    OnlineSoftmax<X> all;
    const int64_t tiles = divide_up(entry.image(), tile_pixels), tile = entry.first_tile + image * tiles;
    const SliceRange range = slices_of(pyramid, i, tile, tile + tiles);
    for (int64_t s = range.first; s <= range.last; ++s) {
      OnlineSoftmax<X> one;
      one.read(slices + (s + i * pyramid.batch + image) * OnlineSoftmax<X>::kSize * pyramid.max_channels + channel,
               pyramid.max_channels);
      all.merge(one, scale);
    }
    SavedSoftmax<X>{all.student_max, 1 / all.student_sum, all.teacher_max, 1 / all.teacher_sum}.write(
        static_cast<T*>(entry.softmax), count, image * entry.channels + channel);
    const double temperature = 1 / (Exponential<X>::kNatural * scale);
    if (!all.empty()) term = all.divergence(scale) * temperature * temperature / static_cast<double>(count);
  }
  term = sum_over_block(term, scratch);
  if (threadIdx.x == 0) entry.localization_terms[image * divide_up(pyramid.max_channels, blockDim.x) + block] = term;
}

}  // namespace sea
