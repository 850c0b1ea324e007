// The vectorized kernels: their arguments, and the table of them. This is the border between the operators, which know
// torch, and the kernels, which are compiled once for each instruction set. T is the type computed in: float or double.
#pragma once
#include <map.h>

#include "runs.h"

namespace sea {

// Pixels of a tile: with 256 float32 channels a tile is 64 KiB.
constexpr int64_t kTilePixels = 64;
// Channels of which a gradient is computed at a time: whole register blocks and whole vectors, and few enough that it
// stays in the L1 cache.
constexpr int64_t kChunk = 48;
// Channels that are pooled at a time: at most this many.
constexpr int64_t kMaxPoolChannels = 64;
// The matrix product reads anchors in whole blocks of rows: at most this many.
constexpr int64_t kMaxBlockRows = 12;

// Length of a row of moments: anchors rounded up to whole vectors.
__attribute__((always_inline)) inline int64_t padded_rows(int64_t n) { return (n + 15) / 16 * 16; }

// Pooling of one level of one set of maps, and in the same pass the softmax over positions.
template <class T>
struct Pool {
  Map student, teacher;  // teacher.data is null where there is only one
  const Runs* runs;      // null: no anchors
  const float* area;     // [masks]
  int64_t masks;
  T* student_anchors;     // [masks, channels]
  T* teacher_anchors;     // [masks, channels]; null where there is no teacher
  const Extent* extents;  // [batch]; null: whole maps
  T* softmax;             // [4, batch, channels] student: maximum, 1 / sum; teacher likewise; null: no localization
  double* divergence;     // [channels] KL(teacher || student) of every image is added
  T inverse_temperature;

  int64_t scratch() const { return (2 * kTilePixels + 2 * masks) * kMaxPoolChannels; }
};

// The non-empty anchors of one level of one map, prepared for products with pixels.
template <class T>
struct Anchors {
  int64_t rows, channels;
  const int32_t* masks;  // [rows] which mask each is of
  const T* anchors;      // [masks, channels]
  T* inverse_norm;       // [rows] 0 where the norm is
  T* blocks;             // [rows / block rows, channels, block rows] unit anchors, as the matrix product reads them
};

// KL divergence of the distances of student and teacher on one level, and its gradients.
template <class T>
struct Distance {
  Map student, teacher;
  const Runs* runs;
  Anchors<T> student_anchors, teacher_anchors;
  T weight;  // 1 / valid pixels
  T inverse_temperature;

  int64_t scratch() const {
    return (student.channels + 2 * (student_anchors.rows + 1) + 2) * kTilePixels +
           kTilePixels * padded_rows(student_anchors.rows);
  }
};

// Gradient of the maps of one level, from all losses.
template <class T>
struct Backward {
  Map student, teacher, gradient;
  const Runs* runs;       // null: no regions
  const T* spread;        // [masks, channels] what every pixel of a mask receives; null: nothing
  Distance<T> distance;   // read where with_distance
  const T* direction;     // [channels / block rows, rows, block rows] the student's unit anchors, times the upstream
                          // gradient
  const T* coefficients;  // [tiles, rows + 1, kTilePixels] what distance() saved; null: computed again
  bool with_distance;
  T distance_scale;       // upstream gradient
  const Extent* extents;  // [batch]; null: whole maps
  const T* softmax;       // [4, batch, channels] as pool() wrote it; null: no localization
  T localization_scale, inverse_temperature;

  int64_t scratch() const {
    const int64_t rows = with_distance ? distance.student_anchors.rows : 0;
    return (3 * kChunk + 2 * student.channels + 2 * (rows + 1)) * kTilePixels;
  }
};

// Cosines of one level, for anchor_cosine.
template <class T>
struct Cosine {
  Map features;
  Map cosines;   // T [batch, masks, height, width]; in backward their gradient
  Map gradient;  // backward only
  Anchors<T> anchors;
  const T* direction;  // [channels / block rows, rows, block rows] the unit anchors; backward only

  int64_t scratch() const {
    return (features.channels + kChunk + anchors.rows + cosines.channels + 2) * kTilePixels +
           kTilePixels * padded_rows(anchors.rows);
  }
};

// begin, end: pixels of a level, counted over batch and rows; begin is the first of a tile. The file named above each
// group says what its kernels compute.
template <class T>
struct Kernels {
  // pool.h
  int64_t (*pool_blocks)(const Map&);
  void (*pool)(const Pool<T>&, int64_t block, T* scratch);
  // anchors.h
  void (*prepare)(const Anchors<T>&);
  void (*directions)(const Anchors<T>&, T scale, T* out);
  void (*project)(const Anchors<T>&, T* moments, int64_t blocks, int64_t block_stride, T* gradient);
  // distance.h
  double (*distance)(const Distance<T>&, int64_t begin, int64_t end, T* coefficients, T* moments, T* scratch);
  // backward.h
  void (*backward)(const Backward<T>&, int64_t begin, int64_t end, T* scratch);
  // cosine.h
  void (*cosine)(const Cosine<T>&, int64_t begin, int64_t end, T* scratch);
  void (*cosine_backward)(const Cosine<T>&, int64_t begin, int64_t end, T* moments, T* scratch);
};

// The kernels of the best instruction set that the processor has, or of the one that SEA_KERNELS_CPU names.
template <class T>
const Kernels<T>& kernels();

}  // namespace sea
