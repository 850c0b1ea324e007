#include "masks.h"

#include "parallel.h"

namespace sea {

Masks::Storage Masks::find_runs(const int32_t* bits,  // [words, word_stride], moved to the level's first pixel
                                int64_t words, int64_t word_stride, int64_t pixels) {
  Storage out;
  for (int64_t n = 0; n < pixels; ++n) {
    bool same = n > 0;
    for (int64_t w = 0; same && w < words; ++w) same = bits[w * word_stride + n] == bits[w * word_stride + n - 1];
    if (same) continue;
    out.begin.push_back(n);
    out.first.push_back(static_cast<int64_t>(out.masks.size()));
    for (int64_t w = 0; w < words; ++w)
      for (uint32_t word = static_cast<uint32_t>(bits[w * word_stride + n]); word != 0; word &= word - 1)
        out.masks.push_back(static_cast<int32_t>(32 * w + __builtin_ctz(word)));
  }
  out.begin.push_back(pixels);
  out.first.push_back(static_cast<int64_t>(out.masks.size()));
  return out;
}

Masks::Masks(const std::vector<Tensor>& tensors, const std::vector<Map>& levels) {
  if (tensors.empty()) return;
  const Tensor &classes = tensors[0], &area = tensors[1], &extent = tensors[3], &bits = tensors[4];
  count_ = area.size(1);
  batch_ = extent.size(1);
  area_ = data<float>(area);
  valid_pixels_ = data<float>(tensors[2]);
  extents_ = data<Extent>(extent);
  // Words of categories that are not present are all zero.
  const int64_t* label = data<int64_t>(classes);
  const int64_t present = std::find_if(label, label + classes.size(0), [](int64_t k) { return k < 0; }) - label;
  const int64_t words = (1 + 2 * present + 31) / 32;
  const int64_t count = static_cast<int64_t>(levels.size());
  std::vector<int64_t> first(count + 1, 0);  // pixel of each level
  for (int64_t l = 0; l < count; ++l) first[l + 1] = first[l] + levels[l].pixels();
  storage_.resize(count);
  present_.resize(count);
  parallel(count, [&](int64_t l) {
    storage_[l] = find_runs(data<int32_t>(bits) + first[l], words, first[count], levels[l].pixels());
    for (int64_t p = 0; p < 1 + 2 * present; ++p)
      if (this->area(l)[p] > 0) present_[l].push_back(static_cast<int32_t>(p));
  });
  for (const Storage& level : storage_)
    runs_.push_back(
        {static_cast<int64_t>(level.begin.size()) - 1, level.begin.data(), level.first.data(), level.masks.data()});
}

}  // namespace sea
