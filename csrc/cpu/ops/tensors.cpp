#include "tensors.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>

namespace sea {

namespace {

// bits: [words, stride], already moved to the level's first pixel.
template <class Storage>
void find_runs(const int32_t* bits, int64_t words, int64_t stride, int64_t pixels, Storage& out) {
  for (int64_t n = 0; n < pixels; ++n) {
    bool same = n > 0;
    for (int64_t w = 0; same && w < words; ++w) same = bits[w * stride + n] == bits[w * stride + n - 1];
    if (same) continue;
    out.begin.push_back(n);
    out.first.push_back(static_cast<int64_t>(out.masks.size()));
    for (int64_t w = 0; w < words; ++w)
      for (uint32_t word = static_cast<uint32_t>(bits[w * stride + n]); word != 0; word &= word - 1)
        out.masks.push_back(static_cast<int32_t>(32 * w + __builtin_ctz(word)));
  }
  out.begin.push_back(pixels);
  out.first.push_back(static_cast<int64_t>(out.masks.size()));
}

}  // namespace

Regions::Regions(const std::vector<Tensor>& tensors, const std::vector<Map>& levels) {
  if (tensors.empty()) return;
  const Tensor &classes = tensors[0], &area = tensors[1], &extent = tensors[3], &bits = tensors[4];
  masks_ = area.size(1);
  batch_ = extent.size(1);
  area_ = data<float>(area);
  counted_ = data<float>(tensors[2]);
  extents_ = data<Extent>(extent);
  // Words of categories that are not present are all zero.
  const int64_t* label = data<int64_t>(classes);
  const int64_t present = std::find_if(label, label + classes.size(0), [](int64_t k) { return k < 0; }) - label;
  const int64_t words = (1 + 2 * present + 31) / 32;
  const int64_t count = static_cast<int64_t>(levels.size());
  std::vector<int64_t> offset(count + 1, 0);
  for (int64_t l = 0; l < count; ++l) offset[l + 1] = offset[l] + levels[l].pixels();
  storage_.resize(count);
  present_.resize(count);
  parallel(count, [&](int64_t l) {
    find_runs(data<int32_t>(bits) + offset[l], words, offset[count], levels[l].pixels(), storage_[l]);
    for (int64_t p = 0; p < 1 + 2 * present; ++p)
      if (this->area(l)[p] > 0) present_[l].push_back(static_cast<int32_t>(p));
  });
  for (const Storage& level : storage_)
    runs_.push_back(
        {static_cast<int64_t>(level.begin.size()) - 1, level.begin.data(), level.first.data(), level.masks.data()});
}

std::vector<Block> make_blocks(const std::vector<Map>& levels, int64_t tiles) {
  std::vector<Block> blocks;
  for (size_t l = 0; l < levels.size(); ++l)
    for (int64_t begin = 0; begin < levels[l].pixels(); begin += tiles * kTilePixels)
      blocks.push_back({static_cast<int64_t>(l), begin, std::min(begin + tiles * kTilePixels, levels[l].pixels())});
  return blocks;
}

std::vector<int64_t> first_blocks(const std::vector<Block>& blocks, int64_t levels) {
  std::vector<int64_t> first(levels + 1, 0);
  for (const Block& block : blocks) ++first[block.level + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  return first;
}

Tensor make_gradient(const Tensor& like) {
  const auto sizes = like.sizes();
  Tensor out =
      is_dense(like) ? torch::stable::empty_like(like) : make({sizes.begin(), sizes.end()}, like.scalar_type());
#ifdef MADV_HUGEPAGE
  // Fresh memory of this size comes page by page from the kernel, which costs as much as computing what is written to
  // it: ask for large pages, and touch each once here, since two threads that meet at a fresh page both clear it. Where
  // the kernel has none to give nothing is lost.
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), end = begin + out.numel() * out.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0)
    parallel((last - first) / kPage,
             [&](int64_t page) { *reinterpret_cast<volatile char*>(first + page * kPage) = 0; });
#endif
  return out;
}

}  // namespace sea
