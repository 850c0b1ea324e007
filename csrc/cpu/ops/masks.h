// The regions as the CPU's kernels see them: masks as runs, and which of them are not empty.
#pragma once
#include <cpu/runs.h>
#include <tensors.h>

namespace sea {

class Masks {
 public:
  // tensors: classes [K], area [L, P], counted [L], extent [L, B, 2], bits [words * pixels]; or none
  Masks(const std::vector<Tensor>& tensors, const std::vector<Map>& levels);

  int64_t count() const { return count_; }                                   // P; 0: there are no regions
  const float* area(int64_t level) const { return area_ + level * count_; }  // [P] pixels of each mask
  float valid_pixels(int64_t level) const { return valid_pixels_[level]; }   // pixels in any mask
  const Extent* extents(int64_t level) const {                               // [B]; null: whole maps
    return extents_ ? extents_ + level * batch_ : nullptr;
  }
  const Runs* runs(int64_t level) const { return count_ > 0 ? &runs_[level] : nullptr; }
  // Which masks of a level are not empty, ascending.
  const std::vector<int32_t>& present(int64_t level) const { return present_[level]; }

 private:
  struct Storage {  // of the runs of one level
    std::vector<int64_t> begin, first;
    std::vector<int32_t> masks;
  };
  static Storage find_runs(const int32_t* bits, int64_t words, int64_t word_stride, int64_t pixels);

  int64_t count_ = 0, batch_ = 0;
  const float *area_ = nullptr, *valid_pixels_ = nullptr;  // [L, P], [L]
  const Extent* extents_ = nullptr;                        // [L, B]
  std::vector<Storage> storage_;
  std::vector<Runs> runs_;
  std::vector<std::vector<int32_t>> present_;
};

}  // namespace sea
