// The losses, fused: tensors to pointers, and torch's memory.
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {
namespace {

std::vector<Pair> make_pairs(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                             const std::vector<Tensor>& gradient, const std::vector<int64_t>& parts) {
  return make_pairs(make_maps(student), make_maps(teacher), make_maps(gradient), parts);
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> sea_loss(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<int64_t> parts, std::vector<Tensor> regions,
    double distance_temperature, double localization_temperature, bool detach_anchors, bool save, int64_t) {
  const Tensor& like = student[0];
  const OnDevice on(like);
  const Masks masks = make_masks(regions);
  std::vector<Pair> pairs = make_pairs(student, teacher, {}, parts);
  const LossOptions options{distance_temperature, localization_temperature, detach_anchors, save, slices()};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    const SavedSizes sizes = lay_out<X>(pairs, masks.masks, options, {});
    const std::vector<Tensor> saved{make({sizes.kept}, kScalarType<T>, like),
                                    make({sizes.gradients}, kScalarType<T>, like),
                                    make({sizes.softmax}, kScalarType<T>, like)};
    lay_out<X>(pairs, masks.masks, options, {data<T>(saved[0]), data<T>(saved[1]), data<T>(saved[2])});
    const Tensor scratch = make({forward_scratch<X>(pairs, masks, options)}, ScalarType::Byte, like);
    const Tensor losses[3] = {make({}, kScalarType<T>, like), make({}, kScalarType<T>, like),
                              make({}, kScalarType<T>, like)};
    run_forward<X>(pairs, masks, options, scratch.data_ptr(),
                   {data<T>(losses[0]), data<T>(losses[1]), data<T>(losses[2])}, on.stream());
    const Tensor none = make({0}, kScalarType<T>, like);
    return std::make_tuple(
        losses[0], losses[1], losses[2],
        save ? saved : std::vector<Tensor>{none, make({0}, kScalarType<T>, like), make({0}, kScalarType<T>, like)});
  });
}

// Pooling and localization.
std::tuple<Tensor, Tensor, Tensor> sea_loss_pool(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                 std::vector<int64_t> parts, std::vector<Tensor> regions,
                                                 double localization_temperature) {
  const Tensor& like = student[0];
  const OnDevice on(like);
  const Masks masks = make_masks(regions);
  const int64_t levels = static_cast<int64_t>(student.size() / parts.size());
  std::vector<Pair> pairs = make_pairs(student, teacher, {}, parts);
  const LossOptions options{1, localization_temperature, false, false, slices(), Anchors::written};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    const Tensor anchors = make({lay_out_anchors<T>(pairs, levels, masks.masks, nullptr)}, kScalarType<T>, like);
    const Tensor softmax = make({lay_out<X>(pairs, masks.masks, options, {}).softmax}, kScalarType<T>, like);
    lay_out_anchors(pairs, levels, masks.masks, data<T>(anchors));
    lay_out<X>(pairs, masks.masks, options, {nullptr, nullptr, data<T>(softmax)});
    const Tensor scratch = make({forward_scratch<X>(pairs, masks, options)}, ScalarType::Byte, like);
    const Tensor localization = make({}, kScalarType<T>, like);
    run_forward<X>(pairs, masks, options, scratch.data_ptr(), {nullptr, nullptr, data<T>(localization)}, on.stream());
    return std::make_tuple(anchors, localization, softmax);
  });
}

// Everything else, of given anchors.
std::tuple<Tensor, Tensor, Tensor, Tensor> sea_loss_compare(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                            std::vector<int64_t> parts, std::vector<Tensor> regions,
                                                            Tensor anchors, double distance_temperature,
                                                            bool detach_anchors, bool save, int64_t) {
  const Tensor& like = student[0];
  const OnDevice on(like);
  const Masks masks = make_masks(regions);
  std::vector<Pair> pairs = make_pairs(student, teacher, {}, parts);
  const LossOptions options{distance_temperature, 1, detach_anchors, save, slices(), Anchors::given};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    lay_out_anchors(pairs, static_cast<int64_t>(student.size() / parts.size()), masks.masks, data<T>(anchors));
    const SavedSizes sizes = lay_out<X>(pairs, masks.masks, options, {});
    const Tensor kept = make({sizes.kept}, kScalarType<T>, like);
    const Tensor gradients = make({sizes.gradients}, kScalarType<T>, like);
    lay_out<X>(pairs, masks.masks, options, {data<T>(kept), data<T>(gradients), nullptr});
    const Tensor scratch = make({forward_scratch<X>(pairs, masks, options)}, ScalarType::Byte, like);
    const Tensor anchor = make({}, kScalarType<T>, like), distance = make({}, kScalarType<T>, like);
    run_forward<X>(pairs, masks, options, scratch.data_ptr(), {data<T>(anchor), data<T>(distance), nullptr},
                   on.stream());
    if (save) return std::make_tuple(anchor, distance, kept, gradients);
    const Tensor none = make({0}, kScalarType<T>, like);
    return std::make_tuple(anchor, distance, none, make({0}, kScalarType<T>, like));
  });
}

std::vector<Tensor> sea_loss_backward(std::optional<Tensor> anchor, std::optional<Tensor> distance,
                                      std::optional<Tensor> localization, std::vector<Tensor> student,
                                      std::vector<Tensor> teacher, std::vector<int64_t> parts,
                                      std::vector<Tensor> regions, std::vector<Tensor> saved,
                                      double distance_temperature, double localization_temperature,
                                      bool detach_anchors) {
  const OnDevice on(student[0]);
  const Masks masks = make_masks(regions);
  std::vector<Tensor> gradients;
  for (const Tensor& map : student) gradients.push_back(make_gradient(map));
  std::vector<Pair> pairs = make_pairs(student, teacher, gradients, parts);
  const LossOptions options{distance_temperature, localization_temperature, detach_anchors, true, slices()};
  with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    lay_out<X>(pairs, masks.masks, options, {data<T>(saved[0]), data<T>(saved[1]), data<T>(saved[2])});
    run_backward<X>(pairs, masks, options, {data<T>(anchor), data<T>(distance), data<T>(localization)}, on.stream());
  });
  return gradients;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) {
  library.impl("sea_loss", TORCH_BOX(&sea::sea_loss));
  library.impl("sea_loss_pool", TORCH_BOX(&sea::sea_loss_pool));
  library.impl("sea_loss_compare", TORCH_BOX(&sea::sea_loss_compare));
  library.impl("sea_loss_backward", TORCH_BOX(&sea::sea_loss_backward));
}
