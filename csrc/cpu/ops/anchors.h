// Anchors [L, P, C] of one set of maps: pooled, prepared for products with pixels, and compared (the anchor loss).
#pragma once
#include <cpu/kernels.h>

#include "masks.h"
#include "parallel.h"

namespace sea {

// Pools all channels of some levels.
template <class T>
void run_pool(const std::vector<Pool<T>>& levels) {
  std::vector<std::pair<int64_t, int64_t>> tasks;  // level, block of channels
  for (size_t l = 0; l < levels.size(); ++l)
    for (int64_t block = 0; block < kernels<T>().pool_blocks(levels[l].student); ++block) tasks.emplace_back(l, block);
  parallel<T>(tasks.size(), levels[0].scratch(), [&](int64_t task, T* scratch) {
    kernels<T>().pool(levels[tasks[task].first], tasks[task].second, scratch);
  });
}

// Some levels of a pyramid: [first, last).
struct Levels {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// The anchors of one side of a set as unit vectors, on some levels.
template <class T>
class PreparedAnchors {
 public:
  PreparedAnchors(const T* anchors,  // [levels, P, C]
                  int64_t channels, const Masks& masks, Levels levels)
      : masks_(masks),
        anchors_(anchors),
        first_(levels.first),
        channels_(channels),
        rows_(masks.count() + kMaxBlockRows),
        buffer_(levels.count() * rows_ * (channels_ + 1)) {
    parallel(levels.count(), [&](int64_t l) { kernels<T>().prepare((*this)[first_ + l]); });
  }

  Anchors<T> operator[](int64_t level) const {
    const auto& present = masks_.present(level);
    T* const own = buffer_.get() + (level - first_) * rows_ * (channels_ + 1);
    return {static_cast<int64_t>(present.size()),
            channels_,
            present.data(),
            anchors_ + (level - first_) * masks_.count() * channels_,
            own,
            own + rows_};
  }

 private:
  const Masks& masks_;
  const T* anchors_;
  int64_t first_, channels_, rows_;
  Buffer<T> buffer_;  // [levels, rows + rows * channels] inverse norms, then blocks
};

// The anchor loss of one level: mean_{p: area > 0} mean_c (aS - aT)^2.
template <class T>
double anchor_loss(const std::vector<int32_t>& present, int64_t channels,
                   const T* student,    // [P, C]
                   const T* teacher) {  // [P, C]; null: the student's are the differences
  double sum = 0;
  for (const int32_t p : present)
    for (int64_t c = p * channels; c < (p + 1) * channels; ++c) {
      const double difference = static_cast<double>(student[c]) - (teacher ? teacher[c] : 0);
      sum += difference * difference;
    }
  return present.empty() || channels == 0 ? 0 : sum / static_cast<double>(present.size() * channels);
}

// The gradient that a pixel receives from each mask it is in: the gradient of the mask's anchor divided by the mask's
// area. It comes from the anchor loss, and from the distance loss through the anchors.
template <class T>
void anchor_gradients(const std::vector<int32_t>& present, int64_t channels,
                      const float* area,       // [P]
                      const T* student,        // [P, C]; null: no anchor loss
                      const T* teacher,        // [P, C]; null: the student's are the differences
                      const T* from_distance,  // [P, C]; null: none
                      T anchor_upstream, T distance_upstream,
                      T* out) {  // [P, C] written where the mask is not empty
  const double count = static_cast<double>(present.size() * channels);
  const T scale = student && count > 0 ? static_cast<T>(2 * static_cast<double>(anchor_upstream) / count) : 0;
  for (const int32_t p : present)
    for (int64_t i = p * channels; i < (p + 1) * channels; ++i) {
      T value = student ? scale * (student[i] - (teacher ? teacher[i] : 0)) : 0;
      if (from_distance) value += distance_upstream * from_distance[i];
      out[i] = value / static_cast<T>(area[p]);
    }
}

}  // namespace sea
