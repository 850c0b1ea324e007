// anchor_pool: masked means of one set of maps.
#include "tensors.h"

namespace sea {
namespace {

template <class T>
Tensor pool(const std::vector<Tensor>& features, const std::vector<Tensor>& regions_) {
  std::vector<Map> levels;
  for (const Tensor& map : features) levels.push_back(make_map(map));
  const Regions regions(regions_, levels);
  const int64_t count = static_cast<int64_t>(levels.size()), masks = regions.masks(), channels = levels[0].channels;
  Tensor anchors = make({count, masks, channels}, kScalarType<T>);
  std::vector<Pool<T>> pools(count);
  for (int64_t l = 0; l < count; ++l) {
    pools[l].student = levels[l];
    pools[l].runs = regions.runs(l);
    pools[l].area = regions.area(l);
    pools[l].masks = masks;
    pools[l].student_anchors = data<T>(anchors) + l * masks * channels;
  }
  run(pools);
  return anchors;
}

template <class T>
void pool_backward(const Tensor& anchors, const std::vector<Map>& levels, const Regions& regions) {
  const int64_t count = static_cast<int64_t>(levels.size()), masks = regions.masks(), channels = levels[0].channels;
  Buffer<T> spread(count * masks * channels);
  for (int64_t l = 0; l < count; ++l)
    for (const int32_t p : regions.present(l)) {
      const int64_t at = (l * masks + p) * channels;
      for (int64_t c = 0; c < channels; ++c)
        spread.get()[at + c] = data<T>(anchors)[at + c] / static_cast<T>(regions.area(l)[p]);
    }
  const std::vector<Block> blocks = make_blocks(levels, 4);
  parallel<T>(blocks.size(), padded(channels) + channels * kTilePixels, [&](int64_t task, T* scratch) {
    const auto [l, begin, end] = blocks[task];
    for (int64_t n = begin; n < end; n += kTilePixels)
      loops<T>().spread(levels[l], *regions.runs(l), spread.get() + l * masks * channels, n,
                        std::min(n + kTilePixels, end), scratch);
  });
}

Tensor anchor_pool(std::vector<Tensor> features, std::vector<Tensor> regions) {
  return any_double(features) ? pool<double>(features, regions) : pool<float>(features, regions);
}

// The maps lend their shapes, strides and dtype alone.
std::vector<Tensor> anchor_pool_backward(Tensor gradient, std::vector<Tensor> features, std::vector<Tensor> regions_) {
  std::vector<Tensor> out;
  std::vector<Map> levels;
  for (const Tensor& map : features) out.push_back(make_gradient(map));
  for (const Tensor& map : out) levels.push_back(make_map(map));
  const Regions regions(regions_, levels);
  any_double(features) ? pool_backward<double>(gradient, levels, regions)
                       : pool_backward<float>(gradient, levels, regions);
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) {
  library.impl("anchor_pool", TORCH_BOX(&sea::anchor_pool));
  library.impl("anchor_pool_backward", TORCH_BOX(&sea::anchor_pool_backward));
}
