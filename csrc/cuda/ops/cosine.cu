// The operators of anchor_cosine: they turn tensors into pointers and allocate memory with torch.
#include <cuda/cosine.cuh>
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {
namespace {

// Forward writes `cosines`. In backward, which writes the gradients of the features and of the anchors, `cosines` holds
// the gradient of the cosines.
template <class T>
void run(const std::vector<Tensor>& features, const Tensor& anchors, const std::vector<Tensor>& regions,
         const std::vector<Tensor>& cosines, const std::vector<Tensor>& gradients, const Tensor* anchor_gradient) {
  const OnDevice on(anchors);
  const Masks masks = make_masks(regions, features);
  std::vector<Pair> pairs = make_pairs(make_maps(features), {}, make_maps(gradients), {kDistance});
  for (size_t i = 0; i < pairs.size(); ++i) {
    Pair& pair = pairs[i];
    const int64_t offset = pair.level * masks.masks * pair.channels;
    pair.cosines = make_map(cosines[i]);
    pair.anchors[0] = data<T>(anchors) + offset;
    if (anchor_gradient) pair.anchor_gradient = data<T>(*anchor_gradient) + offset;
    pair.anchor_pitch = pair.table_pitch = pair.channels;
  }
  with_scratch(anchors, [&](Carver& scratch) {
    run_cosine<T>(pairs, masks, slices(), anchor_gradient != nullptr, scratch, on.stream());
  });
}

std::vector<Tensor> anchor_cosine(std::vector<Tensor> features, Tensor anchors, std::vector<Tensor> regions) {
  const OnDevice on(anchors);
  std::vector<Tensor> cosines;
  for (const Tensor& map : features)
    cosines.push_back(make({map.size(0), anchors.size(1), map.size(2), map.size(3)}, anchors.scalar_type(), anchors));
  with_compute_type(any_double(anchors),
                    [&](auto zero) { run<decltype(zero)>(features, anchors, regions, cosines, {}, nullptr); });
  return cosines;
}

std::vector<Tensor> anchor_cosine_backward(std::vector<Tensor> gradients, std::vector<Tensor> features, Tensor anchors,
                                           std::vector<Tensor> regions) {
  const OnDevice on(anchors);
  std::vector<Tensor> out = make_gradients(features);
  const Tensor anchor_gradient =
      make({anchors.size(0), anchors.size(1), anchors.size(2)}, anchors.scalar_type(), anchors);
  with_compute_type(any_double(anchors), [&](auto zero) {
    run<decltype(zero)>(features, anchors, regions, gradients, out, &anchor_gradient);
  });
  out.push_back(anchor_gradient);
  return out;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) {
  library.impl("anchor_cosine", TORCH_BOX(&sea::anchor_cosine));
  library.impl("anchor_cosine_backward", TORCH_BOX(&sea::anchor_cosine_backward));
}
