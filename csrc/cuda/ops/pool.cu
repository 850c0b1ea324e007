// The operators of anchor_pool: they turn tensors into pointers and allocate memory with torch. run_pool() and
// run_backward(), which the losses use too, are compiled here and only here.
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {

template decltype(run_pool<double>) run_pool<double>;
template decltype(run_pool<float>) run_pool<float>;
template decltype(run_pool<__half>) run_pool<__half>;
template decltype(run_pool<__nv_bfloat16>) run_pool<__nv_bfloat16>;
template decltype(run_backward<double>) run_backward<double>;
template decltype(run_backward<float>) run_backward<float>;
template decltype(run_backward<__half>) run_backward<__half>;
template decltype(run_backward<__nv_bfloat16>) run_backward<__nv_bfloat16>;

namespace {

Tensor anchor_pool(std::vector<Tensor> features, std::vector<Tensor> regions) {
  const Tensor& like = features[0];
  const OnDevice on(like);
  const Masks masks = make_masks(regions, features);
  return with_held_type(features, {}, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    Tensor anchors = make({static_cast<int64_t>(features.size()), masks.masks, like.size(1)}, kScalarType<T>, like);
    std::vector<Pair> pairs = make_pairs(make_maps(features), {}, {}, {kAnchor});
    for (Pair& pair : pairs) {
      pair.anchors[0] = data<T>(anchors) + pair.level * masks.masks * pair.channels;
      pair.anchor_pitch = pair.channels;
    }
    with_scratch(like, [&](Carver& scratch) { run_anchor_pool<X>(pairs, masks, slices(), scratch, on.stream()); });
    return anchors;
  });
}

// Only the shapes, strides and dtype of the features are used.
std::vector<Tensor> anchor_pool_backward(Tensor gradient, std::vector<Tensor> features, std::vector<Tensor> regions) {
  const OnDevice on(gradient);
  const Masks masks = make_masks(regions, features);
  const std::vector<Tensor> out = make_gradients(features);
  with_held_type(features, {}, [&](auto zero) {
    using X = decltype(zero);
    std::vector<Pair> pairs = make_pairs(make_maps(out), {}, make_maps(out), {kAnchor});
    for (Pair& pair : pairs) {
      pair.anchor_gradient = data<Compute<X>>(gradient) + pair.level * masks.masks * pair.channels;
      pair.table_pitch = pair.channels;
    }
    run_anchor_pool_backward<X>(pairs, masks, slices(), on.stream());
  });
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) {
  library.impl("anchor_pool", TORCH_BOX(&sea::anchor_pool));
  library.impl("anchor_pool_backward", TORCH_BOX(&sea::anchor_pool_backward));
}
