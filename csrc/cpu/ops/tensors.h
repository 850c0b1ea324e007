// What the glue of the CPU's loops shares: memory, torch's thread pool, regions.
#pragma once
#include <atomic>
#include <vector>

#include <tensors.h>
#include <cpu/loops.h>

namespace sea {

inline Tensor make(std::vector<int64_t> sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

// Memory for the time of a call. It comes from torch's allocator, so that torch's tools see it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : tensor_(make({size}, kScalarType<T>)) {}
  T* get() const { return data<T>(tensor_); }

 private:
  Tensor tensor_;
};

// Calls f(task, scratch) for every task, with scratch of the given size. Which thread takes which task is left to
// chance; what a task computes must not depend on it.
template <class T, class F>
void parallel(int64_t tasks, int64_t scratch_size, F f) {
  const int64_t workers = torch::stable::get_num_threads();
  const Buffer<T> scratch(workers * scratch_size);
  T* const first = scratch.get();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      f(task, scratch_size > 0 ? first + worker * scratch_size : nullptr);
  });
}

template <class F>
void parallel(int64_t tasks, F f) {
  parallel<float>(tasks, 0, [&](int64_t task, float*) { f(task); });
}

// The regions as the operators are handed them.
class Regions {
 public:
  // tensors: classes [K], area [L, P], counted [L], extent [L, B, 2], bits [words * pixels]; or none
  Regions(const std::vector<Tensor>& tensors, const std::vector<Map>& levels);

  bool given() const { return area_ != nullptr; }
  int64_t masks() const { return masks_; }
  const float* area(int64_t level) const { return area_ + level * masks_; }
  float counted(int64_t level) const { return counted_[level]; }
  const Extent* extents(int64_t level) const { return given() ? extents_ + level * batch_ : nullptr; }
  const Runs* runs(int64_t level) const { return given() ? &runs_[level] : nullptr; }
  // Which masks of a level are not empty.
  const std::vector<int32_t>& present(int64_t level) const { return present_[level]; }

 private:
  struct Storage {
    std::vector<int64_t> begin, first;
    std::vector<int32_t> masks;
  };
  int64_t masks_ = 0, batch_ = 0;
  const float *area_ = nullptr, *counted_ = nullptr;
  const Extent* extents_ = nullptr;
  std::vector<Storage> storage_;
  std::vector<Runs> runs_;
  std::vector<std::vector<int32_t>> present_;
};

// The maps of one level of one set, cut into tasks of whole tiles.
struct Block {
  int64_t level, begin, end;
};
std::vector<Block> make_blocks(const std::vector<Map>& levels, int64_t tiles);
// [levels + 1] where the blocks of each level begin.
std::vector<int64_t> first_blocks(const std::vector<Block>& blocks, int64_t levels);

// Pools all channels of some levels.
template <class T>
void run(const std::vector<Pool<T>>& pools) {
  std::vector<std::pair<int64_t, int64_t>> tasks;  // level, block of channels
  for (size_t l = 0; l < pools.size(); ++l)
    for (int64_t block = 0; block < loops<T>().pool_blocks(pools[l].student); ++block) tasks.emplace_back(l, block);
  parallel<T>(tasks.size(), pools[0].scratch(), [&](int64_t task, T* scratch) {
    loops<T>().pool(pools[tasks[task].first], tasks[task].second, scratch);
  });
}

// The anchors [L, P, C] of one side of a set, prepared for the distances.
template <class T>
class PreparedAnchors {
 public:
  PreparedAnchors(const T* anchors, const std::vector<Map>& levels, const Regions& regions)
      : regions_(regions),
        anchors_(anchors),
        channels_(levels[0].channels),
        rows_(padded(regions.masks() + kMostBlockRows)),
        buffer_(static_cast<int64_t>(levels.size()) * rows_ * (channels_ + 1)) {
    parallel(levels.size(), [&](int64_t l) { loops<T>().prepare((*this)[l]); });
  }

  Anchors<T> operator[](int64_t level) const {
    const auto& present = regions_.present(level);
    T* base = buffer_.get() + level * rows_ * (channels_ + 1);
    return {static_cast<int64_t>(present.size()),
            channels_,
            present.data(),
            anchors_ + level * regions_.masks() * channels_,
            base,
            base + rows_};
  }

 private:
  const Regions& regions_;
  const T* anchors_;
  int64_t channels_, rows_;
  Buffer<T> buffer_;
};

// A gradient for a map: its strides where it is dense, else contiguous.
Tensor make_gradient(const Tensor& like);

}  // namespace sea
