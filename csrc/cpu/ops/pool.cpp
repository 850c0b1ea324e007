// anchor_pool: masked means of one set of maps.
#include "anchors.h"

namespace sea {
namespace {

template <class T>
Tensor pool(const std::vector<Map>& levels, const Masks& masks) {
  const int64_t count = static_cast<int64_t>(levels.size()), channels = levels[0].channels;
  Tensor anchors = make({count, masks.count(), channels}, kScalarType<T>);
  std::vector<Pool<T>> tasks(count);
  for (int64_t l = 0; l < count; ++l) {
    tasks[l].student = levels[l];
    tasks[l].runs = masks.runs(l);
    tasks[l].area = masks.area(l);
    tasks[l].masks = masks.count();
    tasks[l].student_anchors = data<T>(anchors) + l * masks.count() * channels;
  }
  run_pool(tasks);
  return anchors;
}

template <class T>
void pool_backward(const T* anchors,  // [L, P, C] their gradient
                   const std::vector<Map>& gradients, const Masks& masks) {
  const int64_t channels = gradients[0].channels, table = masks.count() * channels;
  Buffer<T> spread(static_cast<int64_t>(gradients.size()) * table);
  for (size_t l = 0; l < gradients.size(); ++l)
    for (const int32_t p : masks.present(l))
      for (int64_t i = l * table + p * channels; i < static_cast<int64_t>(l * table + (p + 1) * channels); ++i)
        spread.get()[i] = anchors[i] / static_cast<T>(masks.area(l)[p]);
  std::vector<Backward<T>> tasks(gradients.size());
  for (size_t l = 0; l < gradients.size(); ++l) {
    tasks[l].student = tasks[l].gradient = gradients[l];
    tasks[l].runs = masks.runs(l);
    tasks[l].spread = spread.get() + l * table;
  }
  const std::vector<Block> blocks = make_blocks(gradients, 4);
  parallel<T>(blocks.size(), tasks[0].scratch(), [&](int64_t task, T* scratch) {
    const auto [l, begin, end] = blocks[task];
    for (int64_t n = begin; n < end; n += kTilePixels)
      kernels<T>().backward(tasks[l], n, std::min(n + kTilePixels, end), scratch);
  });
}

Tensor anchor_pool(std::vector<Tensor> features, std::vector<Tensor> regions) {
  const std::vector<Map> levels = make_maps(features);
  const Masks masks(regions, levels);
  return with_compute_type(any_double(features), [&](auto zero) { return pool<decltype(zero)>(levels, masks); });
}

// Only the shapes, strides and dtype of the maps are used.
std::vector<Tensor> anchor_pool_backward(Tensor gradient, std::vector<Tensor> features, std::vector<Tensor> regions) {
  std::vector<Tensor> out;
  for (const Tensor& map : features) out.push_back(make_gradient(map));
  const std::vector<Map> maps = make_maps(out);
  const Masks masks(regions, maps);
  with_compute_type(any_double(features), [&](auto zero) {
    using T = decltype(zero);
    pool_backward(data<const T>(gradient), maps, masks);
  });
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) {
  library.impl("anchor_pool", TORCH_BOX(&sea::anchor_pool));
  library.impl("anchor_pool_backward", TORCH_BOX(&sea::anchor_pool_backward));
}
