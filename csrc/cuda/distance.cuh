// Cosines between pixels and anchors as matrix products, the divergence of their softmax, and its gradients.
//
// With f = F / |F|, h_p the unit anchors and e_p = qS_p - qT_p, a counted pixel receives
//   dF = w / temperature / |F| (sum_p e_p h_p - (sum_p e_p f . h_p) f),
// and D_p = w / temperature sum_u (e_p / |F|) F is what the anchors' gradient is made of:
//   da_p = (D_p - (D_p . h_p) h_p) / |a_p|.
//
// A block takes an equal share of all tiles. The unit anchors of a pair stay in shared memory, `rows` of them and
// `width` channels at once; tiles of pixels pass by, the next one loading while one is worked on. Where the anchors are
// more (chunks), or the channels (groups), both are loaded piece by piece. With several groups a block writes the
// gradients of one of them, its own, which it visits last.
#pragma once
#include <cuda/launch.h>

#include "mma.cuh"
#include "pool.cuh"

namespace sea {

constexpr int kDistanceThreads = 256, kMostRows = 64, kMostWidth = 256;
template <class X>
constexpr int kDistancePixels = sizeof(X) == 2 ? 32 : 16;

// How much of the anchors is in shared memory at once.
struct Panel {
  int rows, width;
};

template <class X>
struct DistanceMemory {
  using T = Compute<X>;
  static constexpr int kPixels = kDistancePixels<X>, kOutPitch = kPixels + 1;
  X* units;         // [2 sides, parts, rows, width]
  X* tiles;         // [2 stages, 2 sides, width, kPixels]
  T* cosines;       // [2 sides, kPixels, rows + 8]
  X* coefficients;  // [parts, kPixels, kMostRows], after the cosines
  T* squares;       // [2 sides, kDistanceThreads], in place of the coefficients
  T* out;           // [width, kOutPitch], in place of all three
  T* inverse_norm;  // [2 sides, kPixels]
  T* along;         // [kPixels]
  uint8_t* valid;   // [kMostRows]
  double* scratch;  // [32]
  unsigned char* masks;

  static __host__ __device__ int64_t cosines_bytes(Panel panel) { return 2 * kPixels * (panel.rows + 8) * sizeof(T); }
  static __host__ __device__ int64_t middle_bytes(Panel panel) {
    const int64_t a = cosines_bytes(panel) + static_cast<int64_t>(kParts<X> * kPixels * kMostRows * sizeof(X)),
                  b = round_up(panel.width * kOutPitch * sizeof(T), 16),
                  c = cosines_bytes(panel) + static_cast<int64_t>(2 * kDistanceThreads * sizeof(T));
    return a > b ? (a > c ? a : c) : (b > c ? b : c);
  }
  static __host__ __device__ int64_t units_bytes(Panel panel) {
    return 2 * kParts<X> * panel.rows * panel.width * static_cast<int64_t>(sizeof(X));
  }
  static __host__ __device__ int64_t tile_bytes(Panel panel) {
    return panel.width * kPixels * static_cast<int64_t>(sizeof(X));
  }
  static __host__ __device__ int64_t bytes(Panel panel) {
    return units_bytes(panel) + 4 * tile_bytes(panel) + middle_bytes(panel) + 3 * kPixels * sizeof(T) + kMostRows +
           32 * sizeof(double) + TileMasks::bytes(0, kPixels);
  }
  __device__ explicit DistanceMemory(Panel panel) {
    unsigned char* memory = shared_memory();
    units = reinterpret_cast<X*>(memory);
    tiles = reinterpret_cast<X*>(memory += units_bytes(panel));
    cosines = out = reinterpret_cast<T*>(memory += 4 * tile_bytes(panel));
    coefficients = reinterpret_cast<X*>(memory + cosines_bytes(panel));
    squares = reinterpret_cast<T*>(coefficients);
    scratch = reinterpret_cast<double*>(memory += middle_bytes(panel));
    inverse_norm = reinterpret_cast<T*>(scratch + 32);
    along = inverse_norm + 2 * kPixels;
    valid = reinterpret_cast<uint8_t*>(along + kPixels);
    masks = valid + kMostRows;
  }
};

// The largest panel that leaves room for the rest.
template <class X>
Panel choose_panel(int64_t masks, int64_t channels, int64_t limit) {
  for (int width = kMostWidth; width >= 64; width /= 2)
    for (int rows = kMostRows; rows >= 16; rows /= 2) {
      const bool more = width > 64 && width / 2 >= channels, taller = rows > 16 && rows / 2 >= masks;
      if (!more && !taller && DistanceMemory<X>::bytes({rows, width}) <= limit) return {rows, width};
    }
  throw std::runtime_error("sea_kernels: this GPU has too little shared memory for the distances");
}

// The softmax of one pixel as backward uses it: q = exp(cosine - shift) * scale, of student and teacher. Of 16-bit maps
// the logarithm of the sum is in the shift, which is exact enough for them.
template <class X>
struct PixelSoftmax {
  using T = Compute<X>;
  static constexpr int kSize = sizeof(X) == 2 ? 2 : 4;
  T student_shift = 0, student_scale = 0, teacher_shift = 0, teacher_scale = 0;

  PixelSoftmax() = default;
  __device__ explicit PixelSoftmax(const Softmax<X>& all) {
    if constexpr (kSize == 2) {
      student_shift = all.student_max + log2(all.student_sum);
      teacher_shift = all.teacher_max + log2(all.teacher_sum);
      student_scale = teacher_scale = 1;
    } else {
      student_shift = all.student_max;
      teacher_shift = all.teacher_max;
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

// What the coefficients of the moments are in: their size has no bounds, that of float16 has.
template <class X>
using Wide = std::conditional_t<std::is_same_v<X, __half>, __nv_bfloat16, X>;

// What the kernels of this file do in common. All methods are called by all threads.
template <class X>
class Distances {
 public:
  using T = Compute<X>;
  static constexpr int kPixels = kDistancePixels<X>, kRowTiles = kPixels / 16, kLanes = kDistanceThreads / kPixels;
  // In what is done pixel by pixel, kLanes neighbouring threads share one.
  const int pixel = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / 32;

  const Pyramid& pyramid;
  const Masks& masks;
  const Panel panel;
  const int sides;
  const bool everywhere;  // every pixel counts, and every anchor, not just those that are present
  const DistanceMemory<X> memory;
  TileMasks tile_masks;
  int count, chunks, groups, own;
  int64_t begin, end;
  Cursor at{};
  Tile<X> tile[2];  // student, teacher

  __device__ Distances(const Pyramid& pyramid_, const Masks& masks_, Panel panel_, int sides_, bool everywhere_)
      : pyramid(pyramid_),
        masks(masks_),
        panel(panel_),
        sides(sides_),
        everywhere(everywhere_),
        memory(panel),
        tile_masks(memory.masks, 0, kPixels, false) {
    const int present = present_masks(masks);
    count = everywhere ? masks.masks : present;
    tile_masks.count = (present + 31) / 32;
    chunks = (count + panel.rows - 1) / panel.rows;
    groups = static_cast<int>(divide_up(pyramid.most_channels, panel.width));
    own = blockIdx.y;
    begin = first_tile(pyramid, blockIdx.x);
    end = first_tile(pyramid, blockIdx.x + 1);
  }

  __device__ const Pair& pair() const { return pyramid.pairs[at.pair]; }
  __device__ int64_t own_channel() const { return static_cast<int64_t>(own) * panel.width; }
  __device__ int own_channels() const { return channels_of(pair(), own); }
  __device__ bool counts(int u) const { return everywhere ? u < at.count : tile_masks.counts_at(u); }
  // What is saved of the softmax of this thread's pixel.
  __device__ T* statistics() const {  // [PixelSoftmax<X>::kSize]
    const int64_t of_level = at.image * pair().image() + at.first + pixel;
    return static_cast<T*>(pair().statistics) + of_level * PixelSoftmax<X>::kSize;
  }
  // The gradient of this thread's pixel's cosine with a mask, where the teacher stands for it.
  __device__ T cosine_gradient(int64_t mask) const {
    const Map& gradient = pair().teacher;
    return load_as<T>(gradient.data, gradient.dtype, offset_of(gradient, at.image, mask, at.first + pixel));
  }

  // Calls work(tile) for the tiles of this block, and leave() after the last one of each pair. work calls each_chunk()
  // exactly once.
  template <class Work, class Leave>
  __device__ void each_tile(Work work, Leave leave) {
    step_ = 0;
    if (begin < end) load(0, begin, group_at(0));
    for (int64_t t = begin; t < end; ++t) {
      Cursor next = at;
      next.seek(pyramid, t, kPixels);
      if (t > begin && next.pair != at.pair) leave();
      at = next;
      tile_masks.load(masks, pair(), at);
      work(t);
      __syncthreads();
    }
    if (begin < end) leave();
  }

  // Calls work(first mask, masks rounded up to 16) for chunks first, first + 1 .. last - 1, with the cosines times
  // `scale` in memory.cosines; ready() is called before, as soon as the tile is there. The tile of the block's own
  // group stays.
  template <class Ready, class Work>
  __device__ void each_chunk(int64_t t, int first, int last, T scale, Ready ready, Work work) {
    for (int chunk = first; chunk < last; ++chunk) {
      const int p0 = chunk * panel.rows, rows = static_cast<int>(round_up(part_of(count - p0, panel.rows), 16));
      T products[kRowTiles][1][2][4] = {};
      T square[2] = {0, 0};
      for (int i = 0; i < groups; ++i) {
        const int group = group_at(i);
        if (groups > 1 || chunk == first) arrive(t, chunk + 1 < last, i);
        bring_units(chunk, group, rows);
        if (chunk == first && i + 1 == groups) ready();
        add_squares(square, group);
        multiply_units(products, rows);
      }
      if (groups > 1 || chunk == first) write_norms(square);
      __syncthreads();
      write_cosines(products, rows, scale);
      __syncthreads();
      work(p0, rows);
      __syncthreads();
    }
  }

  __device__ T* cosine(int side, int u, int row) const {
    return memory.cosines + (side * kPixels + u) * (panel.rows + 8) + row;
  }

  // The coefficients in memory, in parts where the type asks for them: f(row) for every row of this thread's pixel.
  template <class C, class F>
  __device__ void write_coefficients(int rows, F f) {
    static_assert(sizeof(C) == sizeof(X));
    for (int row = lane; row < rows; row += kLanes) {
      T value = f(row);
#pragma unroll
      for (int part = 0; part < kParts<X>; ++part) {
        const C rounded = narrow<C>(value);
        *coefficients<C>(part).at(pixel, row) = rounded;
        value -= widen(rounded);
      }
    }
  }

  template <class C>
  __device__ Matrix<C> coefficients(int part) const {
    return {reinterpret_cast<C*>(memory.coefficients) + part * kPixels * kMostRows, kMostRows};
  }

  // moments[m][n] += coefficients (rows 16 m .. + 15) times the student's tile (channels 16 (warp + 8 n) .. + 15)
  using Moments = T[kMostRows / 16][2][2][4];
  __device__ void add_moments(Moments& moments, int rows) {
    Factor<Wide<X>, kParts<X>, true> left;
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) left.parts[part] = coefficients<Wide<X>>(part);
    if (tile[0].pixel_rows)
      multiply(moments, left, 0, rows, Factor<X, 1, true>{{tile[0].matrix}}, 16 * warp, 128, panel.width, kPixels);
    else
      multiply(moments, left, 0, rows, Factor<X, 1, false>{{tile[0].matrix}}, 16 * warp, 128, panel.width, kPixels);
  }

  __device__ void write_moments(Moments& moments, T* out, int64_t p0) {  // out: [masks, most_channels]
    const int channels = own_channels();
#pragma unroll
    for (int m = 0; m < kMostRows / 16; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        each(moments[m][n], [&](int row, int column, T& value) {
          const int64_t p = p0 + 16 * m + row;
          const int c = 16 * (warp + 8 * n) + column;
          if (16 * m + row < panel.rows && p < count && c < channels)
            out[p * pyramid.most_channels + own_channel() + c] = value;
          value = 0;
        });
  }

  // Pixels that do not count become zero in the student's tile: what is multiplied by zero must be finite.
  __device__ void clear_uncounted() {
    bool any = false;
    for (int u = threadIdx.x % kPixels; !any && u < at.count; u += kPixels) any = !counts(u);
    if (!__syncthreads_or(any)) return;
    for (int i = threadIdx.x; i < panel.width * kPixels; i += kDistanceThreads)
      if (!counts(i % kPixels)) *tile[0].at(i / kPixels, i % kPixels) = narrow<X>(0.f);
    __syncthreads();
  }

  // directions[m][n] += coefficients (pixels 16 m .. + 15) times the student's unit anchors (channels as in moments)
  using Directions = T[kRowTiles][2][2][4];
  __device__ void add_directions(Directions& directions, int rows) {
    Factor<X, kParts<X>, false> left;
    Factor<X, kParts<X>, true> right;
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) {
      left.parts[part] = coefficients<X>(part);
      right.parts[part] = units(0, part);
    }
    multiply(directions, left, 0, kPixels, right, 16 * warp, 128, panel.width, rows);
  }

  __device__ void write_directions(Directions& directions) {  // to memory.out
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (16 * (warp + 8 * n) < panel.width)
          each(directions[m][n], [&](int row, int column, T& value) {
            memory.out[(16 * (warp + 8 * n) + column) * DistanceMemory<X>::kOutPitch + 16 * m + row] = value;
            value = 0;
          });
  }

 private:
  int step_;                                           // loads that have arrived
  int stage_;                                          // where the last one lies
  int unit_pair_ = -1, unit_chunk_ = -1, unit_group_;  // which anchors are in memory.units
  Cursor next_{};

  __device__ int channels_of(const Pair& p, int group) const {
    return part_of(p.student.channels - static_cast<int64_t>(group) * panel.width, panel.width);
  }
  __device__ int group_at(int i) const { return (own + 1 + i) % groups; }

  __device__ X* tile_data(int stage, int side) const {
    return memory.tiles + (2 * stage + side) * panel.width * kPixels;
  }

  __device__ void load(int stage, int64_t t, int group) {
    next_.seek(pyramid, t, kPixels);
    const Pair& p = pyramid.pairs[next_.pair];
    for (int side = 0; side < sides; ++side)
      load_tile(tile_data(stage, side), side ? p.teacher : p.student, next_.image, next_.first, next_.count, kPixels,
                static_cast<int64_t>(group) * panel.width, channels_of(p, group), panel.width);
    copy_async_commit();
  }

  // Waits for the tile of tile t and the i-th group, and starts to load the one after it.
  __device__ void arrive(int64_t t, bool more_chunks, int i) {
    const int stage = stage_ = step_++ % 2;
    if (groups > 1) __syncthreads();  // the group before is done with what is overwritten
    const bool same = groups > 1 && (i + 1 < groups || more_chunks);
    if (same || t + 1 < end) {
      load(1 - stage, same ? t : t + 1, group_at(i + 1 < groups ? i + 1 : 0));
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    tile[0] = make_tile(tile_data(stage, 0), pair().student, kPixels, panel.width);
    if (sides == 2) tile[1] = make_tile(tile_data(stage, 1), pair().teacher, kPixels, panel.width);
    __syncthreads();
  }

  __device__ Matrix<X> units(int side, int part) const {
    return {memory.units + (side * kParts<X> + part) * panel.rows * panel.width, panel.width};
  }

  __device__ void bring_units(int chunk, int group, int rows) {
    if (unit_pair_ == at.pair && unit_chunk_ == chunk && unit_group_ == group) return;
    unit_pair_ = at.pair;
    unit_chunk_ = chunk;
    unit_group_ = group;
    __syncthreads();
    const Pair& p = pair();
    const int64_t pitch = p.pitch(), c0 = static_cast<int64_t>(group) * panel.width;
    const int64_t p0 = static_cast<int64_t>(chunk) * panel.rows;
    if (threadIdx.x < kMostRows) {
      const int64_t mask = p0 + threadIdx.x;
      memory.valid[threadIdx.x] = mask < count && masks.area[p.level * masks.masks + mask] > 0;
    }
    for (int i = 0; i < sides * kParts<X>; ++i) {
      const X* source = static_cast<const X*>(p.units) + (i * masks.masks + p0) * pitch + c0;
      copy_rows<16>(units(i / kParts<X>, i % kParts<X>), rows, panel.width, source, pitch,
                    part_of(masks.masks - p0, rows), part_of(pitch - c0, panel.width));
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  // Each thread adds up the squares of some channels of one pixel.
  __device__ void add_squares(T (&square)[2], int group) {
    const int u = threadIdx.x % kPixels, channels = channels_of(pair(), group);
#pragma unroll
    for (int side = 0; side < 2; ++side)
      for (int c = threadIdx.x / kPixels; side < sides && c < channels; c += kLanes) {
        const T x = widen(*tile[side].at(c, u));
        square[side] += x * x;
      }
  }

  __device__ void write_norms(const T (&square)[2]) {
#pragma unroll
    for (int side = 0; side < 2; ++side)
      if (side < sides) memory.squares[side * kDistanceThreads + threadIdx.x] = square[side];
    __syncthreads();
    for (int i = threadIdx.x; i < sides * kPixels; i += kDistanceThreads) {
      const int side = i / kPixels, u = i % kPixels;
      T sum = 0;
      for (int k = 0; k < kLanes; ++k) sum += memory.squares[side * kDistanceThreads + k * kPixels + u];
      memory.inverse_norm[i] = inverse_or_zero(sqrt(sum));
    }
  }

  // A warp has one side and 16 anchors.
  __device__ void multiply_units(T (&products)[kRowTiles][1][2][4], int rows) {
    const int side = warp / 4, column = warp % 4 * 16;
    if (side >= sides || column >= rows) return;
    Factor<X, kParts<X>, false> right;
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) right.parts[part] = units(side, part);
    const Matrix<X> left{tile_data(stage_, side), side ? tile[1].matrix.pitch : tile[0].matrix.pitch};
    if (side ? tile[1].pixel_rows : tile[0].pixel_rows)
      multiply(products, Factor<X, 1, false>{{left}}, 0, kPixels, right, column, 16, rows, panel.width);
    else
      multiply(products, Factor<X, 1, true>{{left}}, 0, kPixels, right, column, 16, rows, panel.width);
  }

  __device__ void write_cosines(T (&products)[kRowTiles][1][2][4], int rows, T scale) {
    const int side = warp / 4, first = warp % 4 * 16;
    if (side >= sides || first >= rows) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      each(products[m][0], [&](int u, int row, T& value) {
        *cosine(side, 16 * m + u, first + row) = value * memory.inverse_norm[side * kPixels + 16 * m + u] * scale;
      });
  }
};

template <class X>
struct DistanceParams {
  using T = Compute<X>;
  Pyramid pyramid;
  Masks masks;
  Panel panel;
  T scale;        // of the distances' Exponential
  T* moments;     // [slices + pairs, masks, most_channels]; null: none
  double* terms;  // [slices + pairs] of the distance loss
  bool save;      // whether the pixels' softmax is saved
};

// The divergence and, where all anchors are in one chunk, the moments. Grid: slices, groups.
template <class X>
__global__ void __launch_bounds__(kDistanceThreads, 1) distance(const __grid_constant__ DistanceParams<X> params) {
  using T = Compute<X>;
  Distances<X> d(params.pyramid, params.masks, params.panel, 2, false);
  if (d.own > 0 && d.chunks > 1) return;  // only the moments of the other groups would be left to do, by moments()
  typename Distances<X>::Moments moments{};
  double total = 0;
  const auto leave = [&] {
    const int64_t at = blockIdx.x + d.at.pair;
    const double sum = sum_over_block(total, d.memory.scratch);
    if (threadIdx.x == 0 && d.own == 0) params.terms[at] = sum;
    if (params.moments && d.chunks == 1)
      d.write_moments(moments, params.moments + at * params.masks.masks * params.pyramid.most_channels, 0);
    total = 0;
  };
  const auto work = [&](int64_t t) {
    Softmax<X> softmax;
    d.each_chunk(
        t, 0, d.chunks, params.scale,
        [&] {
          if (params.moments && d.chunks == 1) d.clear_uncounted();
        },
        [&](int, int rows) {
          T student_max = -INFINITY, teacher_max = -INFINITY;
          for (int row = d.lane; row < rows; row += d.kLanes)
            if (d.memory.valid[row]) {
              student_max = max(student_max, *d.cosine(0, d.pixel, row));
              teacher_max = max(teacher_max, *d.cosine(1, d.pixel, row));
            }
          softmax.raise(max_over_lanes<d.kLanes>(student_max), max_over_lanes<d.kLanes>(teacher_max), T(1));
          for (int row = d.lane; row < rows; row += d.kLanes)
            if (d.memory.valid[row]) softmax.add(*d.cosine(0, d.pixel, row), *d.cosine(1, d.pixel, row), T(1));
          if (!params.moments || d.chunks > 1) return;
          Softmax<X> all = softmax;
          all.student_sum = sum_over_lanes<d.kLanes>(all.student_sum);
          all.teacher_sum = sum_over_lanes<d.kLanes>(all.teacher_sum);
          const PixelSoftmax<X> q(all);
          const T inverse = d.memory.inverse_norm[d.pixel];
          d.template write_coefficients<Wide<X>>(rows, [&](int row) {
            return d.counts(d.pixel) && d.memory.valid[row]
                       ? q(*d.cosine(0, d.pixel, row), *d.cosine(1, d.pixel, row)) * inverse
                       : T(0);
          });
          __syncthreads();
          d.add_moments(moments, rows);
        });
    softmax.student_sum = sum_over_lanes<d.kLanes>(softmax.student_sum);
    softmax.teacher_sum = sum_over_lanes<d.kLanes>(softmax.teacher_sum);
    softmax.difference = sum_over_lanes<d.kLanes>(softmax.difference);
    if (d.own == 0 && d.lane == 0 && d.counts(d.pixel)) {
      total += softmax.divergence(T(1));
      if (params.save) PixelSoftmax<X>(softmax).write(d.statistics());
    }
  };
  d.each_tile(work, leave);
}

// Moments of one chunk, for more chunks than one, or from the gradient of cosines. Grid: slices, groups, chunks.
template <class X>
struct MomentsParams {
  using T = Compute<X>;
  Pyramid pyramid;  // of cosines, the teacher stands for their gradient
  Masks masks;
  Panel panel;
  T scale;     // of the distances' Exponential
  T* moments;  // as in DistanceParams
};

template <class X, bool kOfCosines>
__global__ void __launch_bounds__(kDistanceThreads, 1) moments(const __grid_constant__ MomentsParams<X> params) {
  using T = Compute<X>;
  Distances<X> d(params.pyramid, params.masks, params.panel, kOfCosines ? 1 : 2, kOfCosines);
  const int chunk = blockIdx.z;
  if (chunk >= d.chunks || (!kOfCosines && d.chunks == 1)) return;
  typename Distances<X>::Moments moments{};
  const auto leave = [&] {
    const int64_t at = blockIdx.x + d.at.pair;
    d.write_moments(moments, params.moments + at * params.masks.masks * params.pyramid.most_channels,
                    static_cast<int64_t>(chunk) * params.panel.rows);
  };
  const auto work = [&](int64_t t) {
    d.each_chunk(
        t, chunk, chunk + 1, params.scale, [&] { d.clear_uncounted(); },
        [&](int p0, int rows) {
          const bool counts = d.counts(d.pixel);
          const T inverse = d.memory.inverse_norm[d.pixel];
          if constexpr (kOfCosines) {
            d.template write_coefficients<Wide<X>>(rows, [&](int row) {
              return counts && d.memory.valid[row] ? d.cosine_gradient(p0 + row) * inverse : T(0);
            });
          } else {
            PixelSoftmax<X> q;
            if (counts) q = PixelSoftmax<X>(d.statistics());
            d.template write_coefficients<Wide<X>>(rows, [&](int row) {
              return counts && d.memory.valid[row] ? q(*d.cosine(0, d.pixel, row), *d.cosine(1, d.pixel, row)) * inverse
                                                   : T(0);
            });
          }
          __syncthreads();
          d.add_moments(moments, rows);
        });
  };
  d.each_tile(work, leave);
}

// The anchors' gradient from the moments: summed up, projected away from the anchor, over its norm. Grid: masks, pairs.
template <class X>
struct ProjectParams {
  using T = Compute<X>;
  Pyramid pyramid;  // the one that the moments were summed over
  Masks masks;
  const T* moments;       // as in DistanceParams
  T inverse_temperature;  // times it, and over the counted pixels where they are given
  T* gradient;            // [pairs, masks, channels]; null: to each pair's `through`
};

template <class X>
__global__ void __launch_bounds__(kFinishThreads) project(const __grid_constant__ ProjectParams<X> params) {
  using T = Compute<X>;
  const Pyramid& pyramid = params.pyramid;
  const Pair& pair = pyramid.pairs[blockIdx.y];
  const int64_t masks = params.masks.masks, mask = blockIdx.x, channels = pair.student.channels;
  const int64_t pitch = params.gradient ? channels : pair.pitch();
  T* out =
      (params.gradient ? params.gradient + blockIdx.y * masks * pitch : static_cast<T*>(pair.through)) + mask * pitch;
  const T inverse = static_cast<const T*>(pair.inverse_norm)[mask];
  const bool empty = !(params.masks.area[pair.level * masks + mask] > 0);
  const int64_t tiles = pair.student.batch * divide_up(pair.image(), kDistancePixels<X>);
  const int64_t first = slice_of(pyramid, pair.first_tile), last = slice_of(pyramid, pair.first_tile + tiles - 1);
  const X* unit = static_cast<const X*>(pair.units) + mask * pair.pitch();
  const auto unit_at = [&](int64_t c) {
    T value = widen(unit[c]);
    if constexpr (kParts<X> == 2) value += widen(unit[masks * pair.pitch() + c]);
    return value;
  };
  T along = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kFinishThreads) {
    T sum = 0;
    if (!empty && tiles > 0)
      for (int64_t s = first; s <= last; ++s)
        sum += params.moments[((s + blockIdx.y) * masks + mask) * pyramid.most_channels + c];
    out[c] = sum;
    if (!empty) along += sum * unit_at(c);
  }
  along = sum_over_block(along, reinterpret_cast<T*>(shared_memory()));
  T factor = inverse * params.inverse_temperature;
  if (!params.gradient) factor /= params.masks.counted[pair.level];
  for (int64_t c = threadIdx.x; c < channels; c += kFinishThreads)
    out[c] = empty ? T(0) : (out[c] - along * unit_at(c)) * factor;
}

}  // namespace sea
