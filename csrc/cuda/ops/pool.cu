// anchor_pool: tensors to pointers, and torch's memory.
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {
namespace {

Tensor anchor_pool(std::vector<Tensor> features, std::vector<Tensor> regions) {
  const Tensor& like = features[0];
  const OnDevice on(like);
  const Masks masks = make_masks(regions);
  const std::vector<Pair> pairs = make_pairs(make_maps(features), {}, {}, {kAnchor});
  return with_held_type(features, {}, [&](auto zero) {
    using X = decltype(zero);
    Tensor anchors =
        make({static_cast<int64_t>(features.size()), masks.masks, like.size(1)}, kScalarType<Compute<X>>, like);
    const Tensor scratch = make({pool_scratch<X>(pairs, masks, slices())}, ScalarType::Byte, like);
    run_pool_anchors<X>(pairs, masks, slices(), scratch.data_ptr(), data<Compute<X>>(anchors), on.stream());
    return anchors;
  });
}

// The maps lend their shapes, strides and dtype alone.
std::vector<Tensor> anchor_pool_backward(Tensor gradient, std::vector<Tensor> features, std::vector<Tensor> regions) {
  const OnDevice on(gradient);
  std::vector<Tensor> out;
  for (const Tensor& map : features) out.push_back(make_gradient(map));
  with_held_type(features, {}, [&](auto zero) {
    using X = decltype(zero);
    run_pool_backward<X>(make_maps(out), make_masks(regions), slices(), data<Compute<X>>(gradient), on.stream());
  });
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) {
  library.impl("anchor_pool", TORCH_BOX(&sea::anchor_pool));
  library.impl("anchor_pool_backward", TORCH_BOX(&sea::anchor_pool_backward));
}
