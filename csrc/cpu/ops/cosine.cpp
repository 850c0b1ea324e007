// anchor_cosine: cosines between every pixel and every anchor.
#include "tensors.h"

namespace sea {
namespace {

std::vector<Map> maps(const std::vector<Tensor>& tensors) {
  std::vector<Map> out;
  for (const Tensor& tensor : tensors) out.push_back(make_map(tensor));
  return out;
}

template <class T>
std::vector<Tensor> forward(const std::vector<Tensor>& features, const Tensor& anchors,
                            const std::vector<Tensor>& regions_) {
  const std::vector<Map> levels = maps(features);
  const Regions regions(regions_, levels);
  const PreparedAnchors<T> prepared(data<T>(anchors), levels, regions);
  std::vector<Tensor> out;
  std::vector<Cosine<T>> tasks;
  int64_t size = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    out.push_back(make({levels[l].batch, regions.masks(), levels[l].height, levels[l].width}, kScalarType<T>));
    tasks.push_back({levels[l], make_map(out[l]), {}, prepared[l], nullptr});
    size = std::max(size, tasks[l].scratch());
  }
  const std::vector<Block> blocks = make_blocks(levels, 1);
  parallel<T>(blocks.size(), size, [&](int64_t task, T* scratch) {
    loops<T>().cosine(tasks[blocks[task].level], blocks[task].begin, blocks[task].end, scratch);
  });
  return out;
}

template <class T>
std::vector<Tensor> backward(const std::vector<Tensor>& gradients, const std::vector<Tensor>& features,
                             const Tensor& anchors, const std::vector<Tensor>& regions_) {
  const std::vector<Map> levels = maps(features);
  const Regions regions(regions_, levels);
  const PreparedAnchors<T> prepared(data<T>(anchors), levels, regions);
  const int64_t channels = levels[0].channels, masks = regions.masks();
  Buffer<T> directions(static_cast<int64_t>(levels.size()) * masks * channels);
  std::vector<Tensor> out;
  std::vector<Cosine<T>> tasks;
  int64_t size = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    out.push_back(make_gradient(features[l]));
    T* direction = directions.get() + l * masks * channels;
    loops<T>().directions(prepared[l], T(1), direction);
    tasks.push_back({levels[l], make_map(gradients[l]), make_map(out[l]), prepared[l], direction});
    size = std::max(size, tasks[l].scratch());
  }
  const std::vector<Block> blocks = make_blocks(levels, 64);
  const int64_t moment = masks * padded(channels);
  Buffer<T> moments(static_cast<int64_t>(blocks.size()) * moment);
  parallel<T>(blocks.size(), size, [&](int64_t task, T* scratch) {
    T* own = moments.get() + task * moment;
    std::fill_n(own, moment, T(0));
    loops<T>().cosine_backward(tasks[blocks[task].level], blocks[task].begin, blocks[task].end, own, scratch);
  });
  Tensor anchor_gradient = make({static_cast<int64_t>(levels.size()), masks, channels}, kScalarType<T>);
  const std::vector<int64_t> first = first_blocks(blocks, levels.size());
  parallel(levels.size(), [&](int64_t l) {
    T* gradient = data<T>(anchor_gradient) + l * masks * channels;
    std::fill_n(gradient, masks * channels, T(0));
    loops<T>().project(prepared[l], moments.get() + first[l] * moment, first[l + 1] - first[l], moment, gradient);
  });
  out.push_back(anchor_gradient);
  return out;
}

std::vector<Tensor> anchor_cosine(std::vector<Tensor> features, Tensor anchors, std::vector<Tensor> regions) {
  return anchors.scalar_type() == ScalarType::Double ? forward<double>(features, anchors, regions)
                                                     : forward<float>(features, anchors, regions);
}

std::vector<Tensor> anchor_cosine_backward(std::vector<Tensor> gradients, std::vector<Tensor> features, Tensor anchors,
                                           std::vector<Tensor> regions) {
  return anchors.scalar_type() == ScalarType::Double ? backward<double>(gradients, features, anchors, regions)
                                                     : backward<float>(gradients, features, anchors, regions);
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) {
  library.impl("anchor_cosine", TORCH_BOX(&sea::anchor_cosine));
  library.impl("anchor_cosine_backward", TORCH_BOX(&sea::anchor_cosine_backward));
}
