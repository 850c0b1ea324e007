// The topological distance loss: the divergence between the student's and the teacher's softmax over anchors, for every
// valid pixel, and the moments, from which the gradient of the student's anchors follows.
//
// With f = F / |F| for a pixel, h_p a unit anchor, and e_p = qS_p - qT_p, a valid pixel's gradient is
//   dF = w / temperature / |F| (sum_p e_p h_p - (sum_p e_p f . h_p) f),
// and D_p = sum_u (e_p / |F|) F are the moments of
//   da_p = w / temperature (D_p - (D_p . h_p) h_p) / |a_p|.
//
// distance() reads the maps once for both: divergence and moments need the same cosines. If the anchors do not fit into
// one chunk, each chunk is loaded once for kBatch tiles. Those are read again for each chunk, we expect from the L2
// cache. After the last chunk their softmax is complete. Then the block reads its tiles again for the moments of each
// chunk.
#pragma once
#include "mainloop.cuh"
#include "softmax.cuh"

namespace sea {

// The softmax of one pixel as it is saved for backward: q = exp(cosine - shift) * scale, of student and teacher. For
// 16-bit maps the logarithm of the sum is part of the shift, which is accurate enough for them and takes half the
// memory.
template <class X>
struct PixelSoftmax {
  using T = Compute<X>;
  static constexpr int kSize = sizeof(X) == 2 ? 2 : 4;
  T student_shift = 0, student_scale = 0, teacher_shift = 0, teacher_scale = 0;

  PixelSoftmax() = default;
  __device__ explicit PixelSoftmax(const OnlineSoftmax<X>& all) {
    if constexpr (kSize == 2) {
      student_shift = all.student_shift + log2(all.student_sum);
      teacher_shift = all.teacher_shift + log2(all.teacher_sum);
      student_scale = teacher_scale = 1;
    } else {
      student_shift = all.student_shift;
      teacher_shift = all.teacher_shift;
      student_scale = 1 / all.student_sum;
      teacher_scale = 1 / all.teacher_sum;
    }
  }
  __device__ explicit PixelSoftmax(const T* in)  // [kSize]
      : student_shift(in[0]), student_scale(1), teacher_shift(in[1]), teacher_scale(1) {
    if constexpr (kSize == 4) {
      student_scale = in[2];
      teacher_scale = in[3];
    }
  }
  __device__ void write(T* out) const {  // [kSize]
    out[0] = student_shift;
    out[1] = teacher_shift;
    if constexpr (kSize == 4) {
      out[2] = student_scale;
      out[3] = teacher_scale;
    }
  }
  // qS - qT
  __device__ T operator()(T student, T teacher) const {
    return Exponential<X>::of(student - student_shift, T(1)) * student_scale -
           Exponential<X>::of(teacher - teacher_shift, T(1)) * teacher_scale;
  }
};

struct DistanceEntry : MainEntry {
  void* pixel_softmax;  // T [pixels, PixelSoftmax::kSize]

  DistanceEntry() = default;
  explicit DistanceEntry(const Pair& pair) : MainEntry(pair), pixel_softmax(pair.pixel_softmax) {}
};

// What the kernels of the distances do for the tiles of a pair.
template <class X>
TileWork distance_work(const Pair& pair) {
  const double moving = sizeof(X) == 2 ? moving_cost(pair.student, 1.4, 1.6) : 1;
  const double tile = static_cast<double>(pair.channels + 64) * moving;
  return {static_cast<int32_t>(tile), 256};
}

// Where the softmax of a pixel of a tile is saved.
template <class X>
__device__ inline Compute<X>* saved_softmax(const DistanceEntry& entry, const WorkTile& at,
                                            int pixel) {  // [PixelSoftmax<X>::kSize]
  const int64_t of_level = at.image * entry.image() + at.first + pixel;
  return static_cast<Compute<X>*>(entry.pixel_softmax) + of_level * PixelSoftmax<X>::kSize;
}
template <class X, class E>
__device__ inline Compute<X>* saved_softmax(const MainLoop<X, E>& loop, int pixel) {
  return saved_softmax<X>(loop.entry(), loop.at, pixel);
}

// Sums up the moments of a chunk. at_pixel(valid) returns, for this thread's pixel, a function of a row of the chunk
// and its mask that gives the coefficient e_p: 0 if the mask is empty.
template <class X, class E, class AtPixel>
__device__ inline void sum_moments(MainLoop<X, E>& loop, int chunk, Compute<X> scale,
                                   Compute<X>* out,  // [slices + entries, masks, max_channels]
                                   AtPixel at_pixel) {
  using T = Compute<X>;
  typename MainLoop<X, E>::Moments moments{};
  const auto leave = [&] {
    loop.write_moments(moments, out + loop.partial() * loop.masks.masks * loop.pyramid.max_channels,
                       static_cast<int64_t>(chunk) * loop.block.n);
  };
  const auto work = [&](int64_t t) {
    loop.each_chunk(
        t, chunk, chunk + 1, scale, [&] { loop.clear_invalid_pixels(); },
        [&](int p0, int rows) {
          const int pixel = loop.pixel();
          const bool valid = loop.valid(pixel);
          const T inverse = loop.memory.inverse_norm[pixel];
          const auto coefficient = at_pixel(valid);
          loop.template write_coefficients<Wide<X>>(rows, [&](int row, int) {
            Packed<T, 2> out;
#pragma unroll
            for (int i = 0; i < 2; ++i) out.x[i] = valid ? coefficient(row + i, p0 + row + i) * inverse : T(0);
            return out;
          });
          __syncthreads();
          loop.add_moments(moments, rows);
        });
  };
  loop.each_tile(work, leave);
}

template <class X>
struct DistanceParams {
  using T = Compute<X>;
  Pyramid<DistanceEntry> pyramid;
  Masks masks;
  BlockShape block;
  T scale;        // of the distances' Exponential
  T* moments;     // [slices + entries, masks, max_channels]; null: none
  double* terms;  // [slices + entries] of the distance loss, to be divided by the valid pixels of the level
  bool save;      // the pixels' softmax
  int few;        // distance_few() handles launches with up to this many anchors; -1: none
};

// The divergence and the moments. Grid: slices, groups.
template <class X>
__global__ void __launch_bounds__(kMainThreads, 1) distance(const __grid_constant__ DistanceParams<X> params) {
  using T = Compute<X>;
  MainLoop<X, DistanceEntry> loop(params.pyramid, params.masks, params.block, 2, false, false);
  if (loop.count <= params.few) return;
  if (loop.own > 0 && loop.chunks > 1) return;  // the first group's block does all, as it reads back its own softmax
  const bool with_moments = params.moments && loop.chunks == 1;
  typename MainLoop<X, DistanceEntry>::Moments moments{};
  double total = 0;
  int chunk = 0;
  int left = -1;  // the last entry that has its term, or a part of it
  const auto leave = [&] {
    if (chunk + 1 < loop.chunks) return;
    const double sum = sum_over_block(total, loop.memory.scratch);
    double* const term = params.terms + loop.partial();
    if (threadIdx.x == 0 && loop.own == 0) *term = left == loop.at.entry ? *term + sum : sum;
    left = loop.at.entry;
    if (with_moments)
      loop.write_moments(moments, params.moments + loop.partial() * params.masks.masks * params.pyramid.max_channels,
                         0);
    total = 0;
  };
  const auto work = [&](int64_t t) {
    OnlineSoftmax<X> softmax;
    T* const state = loop.memory.softmax + t % kBatch * OnlineSoftmax<X>::kSize * loop.kM;
    loop.each_chunk(
        t, chunk, chunk + 1, params.scale,
        [&] {
          if (with_moments) loop.clear_invalid_pixels();
        },
        [&](int, int rows) {
          using Loop = MainLoop<X, DistanceEntry>;
          const int pixel = loop.pixel();
          if (chunk > 0) softmax.read(state + pixel, loop.kM);
          if (loop.lane() > 0) softmax.student_sum = softmax.teacher_sum = softmax.difference = 0;
          Packed<T, 2> student[Loop::kOwnPairs], teacher[Loop::kOwnPairs];
          T student_max = -INFINITY, teacher_max = -INFINITY;
          loop.each_row_pair(rows, [&](int row, int k) {
            student[k] = loop.cosine_pair(0, pixel, row);
            teacher[k] = loop.cosine_pair(1, pixel, row);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              student_max = max(student_max, student[k].x[i]);
              teacher_max = max(teacher_max, teacher[k].x[i]);
            }
          });
          softmax.rescale(max_over_lanes<loop.kLanes>(student_max), max_over_lanes<loop.kLanes>(teacher_max));
          loop.each_row_pair(rows, [&](int, int k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {  // from here on, the exponentials are in the places of the cosines
              const auto terms = softmax.add(student[k].x[i], teacher[k].x[i], T(1));
              student[k].x[i] = terms.student;
              teacher[k].x[i] = terms.teacher;
            }
          });
          softmax.template add_lanes<loop.kLanes>();
          __syncwarp();  // all lanes of a pixel have read its state
          if (loop.lane() == 0) softmax.write(state + pixel, loop.kM);
          if (with_moments) {
            const T inverse = loop.valid(pixel) ? loop.memory.inverse_norm[pixel] : T(0);
            const T student_factor = inverse / softmax.student_sum, teacher_factor = inverse / softmax.teacher_sum;
            loop.template write_coefficients<Wide<X>>(rows, [&](int, int k) {
              Packed<T, 2> out;
#pragma unroll
              for (int i = 0; i < 2; ++i)
                out.x[i] =
                    loop.valid(pixel) ? student[k].x[i] * student_factor - teacher[k].x[i] * teacher_factor : T(0);
              return out;
            });
          }
          __syncthreads();
          if (with_moments) loop.add_moments(moments, rows);
        });
    // The warps take turns with what is left to do for the pixels.
    if (chunk + 1 < loop.chunks || loop.own > 0 || loop.warp() != t % loop.kWarps) return;
    const int u = thread_index() % 32;
    if (u >= loop.kM || !loop.valid(u)) return;
    softmax.read(state + u, loop.kM);
    total += softmax.divergence(T(1));
    if (params.save) PixelSoftmax<X>(softmax).write(saved_softmax(loop, u));
  };
  while (loop.begin < loop.slice_end()) {
    if (loop.chunks > 1) loop.end = min(loop.begin + kBatch, loop.slice_end());
    for (chunk = 0; chunk < loop.chunks; ++chunk) loop.each_tile(work, leave);
    loop.begin = loop.end;
  }

  if (!params.moments || loop.chunks == 1) return;
  const auto at_pixel = [&](bool valid) {
    const PixelSoftmax<X> q = valid ? PixelSoftmax<X>(saved_softmax(loop, loop.pixel())) : PixelSoftmax<X>();
    return [q, &loop, pixel = loop.pixel()](int row, int) {
      return q(*loop.cosine(0, pixel, row), *loop.cosine(1, pixel, row));
    };
  };
  loop.begin = loop.slice_begin();
  for (loop.own = 0; loop.own < loop.groups; ++loop.own)
    for (chunk = 0; chunk < loop.chunks; ++chunk) sum_moments(loop, chunk, params.scale, params.moments, at_pixel);
}

}  // namespace sea
