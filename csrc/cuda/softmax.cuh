// Softmax over the positions of each channel: a running one while a map is pooled, its pieces put together, and the
// gradient.
#pragma once
#include "reduce.cuh"
#include "tile.cuh"

namespace sea {

// Of student and teacher the maximum and the sum of exponentials, and the teacher's weighted sum of differences. Maxima
// and differences are those of the maps, before the temperature: subtracted first they are exact.
template <class X>
struct Softmax {
  using T = Compute<X>;
  using Exp = Exponential<X>;
  static constexpr int kSize = 5;
  T student_max = -INFINITY, student_sum = 0, teacher_max = -INFINITY, teacher_sum = 0, difference = 0;

  // scale: that of Exp
  __device__ void raise(T student, T teacher, T scale) {
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

  __device__ void add(T student, T teacher, T scale) {
    const T weight = Exp::of(teacher - teacher_max, scale);
    student_sum += Exp::of(student - student_max, scale);
    teacher_sum += weight;
    difference += weight * (teacher - student);
  }

  __device__ bool empty() const { return student_sum == 0; }

  __device__ void merge(Softmax other, T scale) {
    if (other.empty()) return;
    raise(other.student_max, other.teacher_max, scale);
    other.raise(student_max, teacher_max, scale);
    student_sum += other.student_sum;
    teacher_sum += other.teacher_sum;
    difference += other.difference;
  }

  // KL(teacher || student)
  __device__ T divergence(T scale) const {
    // Both terms in the units of the exponentials: in others the scale would be rounded once more, and they may cancel.
    return ((difference / teacher_sum + (student_max - teacher_max)) * scale + Exp::log(student_sum / teacher_sum)) *
           static_cast<T>(Exp::kNatural);
  }

  __device__ void write(T* out, int64_t stride) const {  // out: [5] with that stride
    const T all[kSize] = {student_max, student_sum, teacher_max, teacher_sum, difference};
    for (int i = 0; i < kSize; ++i) out[i * stride] = all[i];
  }

  __device__ void read(const T* in, int64_t stride) {
    student_max = in[0];
    student_sum = in[stride];
    teacher_max = in[2 * stride];
    teacher_sum = in[3 * stride];
    difference = in[4 * stride];
  }
};

// A channel's softmax as backward uses it.
template <class X>
struct Normalizer {
  using T = Compute<X>;
  T student_max, student_scale, teacher_max, teacher_scale;

  __device__ void read(const T* softmax,  // [4, rows]: batch and channels
                       int64_t rows, int64_t row) {
    student_max = softmax[row];
    student_scale = softmax[rows + row];
    teacher_max = softmax[2 * rows + row];
    teacher_scale = softmax[3 * rows + row];
  }

  // softmax of the student - softmax of the teacher
  __device__ T operator()(T student, T teacher, T scale) const {
    return Exponential<X>::of(student - student_max, scale) * student_scale -
           Exponential<X>::of(teacher - teacher_max, scale) * teacher_scale;
  }
};

// Whether a pixel lies inside the image.
__device__ inline bool inside(const Masks& masks, const Pair& pair, int image, int pixel) {
  if (masks.extents == nullptr) return true;
  const Extent extent = masks.extents[pair.level * pair.student.batch + image];
  const int width = static_cast<int>(pair.student.width);
  return pixel / width < extent.rows && pixel % width < extent.columns;
}

}  // namespace sea
