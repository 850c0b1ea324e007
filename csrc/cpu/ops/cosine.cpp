// anchor_cosine: cosines between every pixel and every anchor.
#include "anchors.h"

namespace sea {
namespace {

template <class T>
std::vector<Tensor> forward(const std::vector<Map>& levels, const Tensor& anchors, const Masks& masks) {
  const PreparedAnchors<T> prepared(data<T>(anchors), levels[0].channels, masks,
                                    {0, static_cast<int64_t>(levels.size())});
  std::vector<Tensor> out;
  std::vector<Cosine<T>> tasks;
  int64_t size = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    out.push_back(make({levels[l].batch, masks.count(), levels[l].height, levels[l].width}, kScalarType<T>));
    tasks.push_back({levels[l], make_map(out[l]), {}, prepared[l], nullptr});
    size = std::max(size, tasks[l].scratch());
  }
  const std::vector<Block> blocks = make_blocks(levels, 1);
  parallel<T>(blocks.size(), size, [&](int64_t task, T* scratch) {
    kernels<T>().cosine(tasks[blocks[task].level], blocks[task].begin, blocks[task].end, scratch);
  });
  return out;
}

// Fills the gradients of the maps; returns that of the anchors. Each block adds up its own share of the anchors'.
template <class T>
Tensor backward(const std::vector<Map>& upstream, const std::vector<Map>& levels, const std::vector<Map>& gradients,
                const Tensor& anchors, const Masks& masks) {
  const PreparedAnchors<T> prepared(data<T>(anchors), levels[0].channels, masks,
                                    {0, static_cast<int64_t>(levels.size())});
  const int64_t count = static_cast<int64_t>(levels.size()), channels = levels[0].channels;
  const int64_t table = masks.count() * channels, moment = padded_rows(masks.count()) * channels;
  const int64_t direction_size = masks.count() * (channels + kMaxBlockRows);
  Buffer<T> directions(count * direction_size);
  std::vector<Cosine<T>> tasks;
  int64_t size = 0;
  for (int64_t l = 0; l < count; ++l) {
    T* direction = directions.get() + l * direction_size;
    kernels<T>().directions(prepared[l], T(1), direction);
    tasks.push_back({levels[l], upstream[l], gradients[l], prepared[l], direction});
    size = std::max(size, tasks[l].scratch());
  }
  const std::vector<Block> blocks = make_blocks(levels, 64);
  Buffer<T> moments(static_cast<int64_t>(blocks.size()) * moment);
  parallel<T>(blocks.size(), size, [&](int64_t task, T* scratch) {
    T* own = moments.get() + task * moment;
    std::fill_n(own, moment, T(0));
    kernels<T>().cosine_backward(tasks[blocks[task].level], blocks[task].begin, blocks[task].end, own, scratch);
  });
  Tensor anchor_gradient = make({count, masks.count(), channels}, kScalarType<T>);
  const std::vector<int64_t> first = first_blocks(blocks, count);
  parallel(count, [&](int64_t l) {
    T* gradient = data<T>(anchor_gradient) + l * table;
    std::fill_n(gradient, table, T(0));
    kernels<T>().project(prepared[l], moments.get() + first[l] * moment, first[l + 1] - first[l], moment, gradient);
  });
  return anchor_gradient;
}

std::vector<Tensor> anchor_cosine(std::vector<Tensor> features, Tensor anchors, std::vector<Tensor> regions) {
  const std::vector<Map> levels = make_maps(features);
  const Masks masks(regions, levels);
  return with_compute_type(any_double(anchors),
                           [&](auto zero) { return forward<decltype(zero)>(levels, anchors, masks); });
}

std::vector<Tensor> anchor_cosine_backward(std::vector<Tensor> gradients, std::vector<Tensor> features, Tensor anchors,
                                           std::vector<Tensor> regions) {
  const std::vector<Map> levels = make_maps(features);
  const Masks masks(regions, levels);
  std::vector<Tensor> out;
  for (const Tensor& map : features) out.push_back(make_gradient(map));
  out.push_back(with_compute_type(any_double(anchors), [&](auto zero) {
    return backward<decltype(zero)>(make_maps(gradients), levels, make_maps(out), anchors, masks);
  }));
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) {
  library.impl("anchor_cosine", TORCH_BOX(&sea::anchor_cosine));
  library.impl("anchor_cosine_backward", TORCH_BOX(&sea::anchor_cosine_backward));
}
