// anchor_cosine: tensors to pointers, and torch's memory.
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {
namespace {

// Forward without gradients, else backward; out: the cosines, or the features' gradients and the anchors'.
template <class T>
void cosine(const std::vector<Tensor>& features, const std::vector<Tensor>& gradients, const Tensor& anchors,
            const std::vector<Tensor>& regions, const std::vector<Tensor>& out, const Tensor* anchor_gradient) {
  const OnDevice on(anchors);
  const Masks masks = make_masks(regions);
  const std::vector<Pair> pairs = make_pairs(make_maps(features), make_maps(gradients), make_maps(out), {kDistance});
  const int64_t bytes = cosine_scratch<T>(pairs, masks, slices(), anchor_gradient != nullptr);
  const Tensor scratch = make({bytes}, ScalarType::Byte, anchors);
  run_cosine<T>(pairs, masks, slices(), scratch.data_ptr(), data<T>(anchors),
                anchor_gradient ? data<T>(*anchor_gradient) : nullptr, on.stream());
}

std::vector<Tensor> anchor_cosine(std::vector<Tensor> features, Tensor anchors, std::vector<Tensor> regions) {
  const OnDevice on(anchors);
  std::vector<Tensor> out;
  for (const Tensor& map : features)
    out.push_back(make({map.size(0), anchors.size(1), map.size(2), map.size(3)}, anchors.scalar_type(), anchors));
  const auto run = anchors.scalar_type() == ScalarType::Double ? &cosine<double> : &cosine<float>;
  run(features, {}, anchors, regions, out, nullptr);
  return out;
}

std::vector<Tensor> anchor_cosine_backward(std::vector<Tensor> gradients, std::vector<Tensor> features, Tensor anchors,
                                           std::vector<Tensor> regions) {
  const OnDevice on(anchors);
  std::vector<Tensor> out;
  for (const Tensor& map : features) out.push_back(make_gradient(map));
  const Tensor anchor_gradient =
      make({anchors.size(0), anchors.size(1), anchors.size(2)}, anchors.scalar_type(), anchors);
  const auto run = anchors.scalar_type() == ScalarType::Double ? &cosine<double> : &cosine<float>;
  run(features, gradients, anchors, regions, out, &anchor_gradient);
  out.push_back(anchor_gradient);
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) {
  library.impl("anchor_cosine", TORCH_BOX(&sea::anchor_cosine));
  library.impl("anchor_cosine_backward", TORCH_BOX(&sea::anchor_cosine_backward));
}
