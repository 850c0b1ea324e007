// The operators of the fused losses: they turn tensors into pointers and allocate memory with torch.
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {
namespace {

// A tensor of the number of elements that Python computed, or an empty one, with 0 elements, where it is not saved.
Tensor make_saved(const char* name, int64_t elements, int64_t needed, ScalarType type, const Tensor& like) {
  check_elements(name, elements, needed, true);
  return make({elements}, type, like);
}

// The arguments of all operators, and the tensors that the forward operators allocate.
struct Call {
  const std::vector<Tensor>&student, &teacher;
  const std::vector<int64_t>& losses;
  Masks masks;

  const Tensor& like() const { return student[0]; }
  std::vector<Pair> pairs(const std::vector<Tensor>& gradients = {}) const {
    return make_pairs(make_maps(student), make_maps(teacher), make_maps(gradients), losses);
  }
  int64_t levels() const { return static_cast<int64_t>(student.size() / losses.size()); }
};

struct Outputs {
  Tensor anchor, distance, localization;  // []
  Tensor saved, gradients, softmax;
};

// The steps of the forward pass. anchors: those of all maps, written by Steps::pool and read by Steps::compare.
template <class X>
Outputs forward(const Call& call, Steps steps, double distance_temperature, double localization_temperature,
                LossSizes elements, const Tensor* anchors) {
  using T = Compute<X>;
  const ScalarType type = kScalarType<T>;
  const Tensor& like = call.like();
  const OnDevice on(like);
  const bool save = elements.saved > 0;
  const LossOptions options{distance_temperature, localization_temperature, save, elements.gradients > 0, slices()};
  std::vector<Pair> pairs = call.pairs();
  const LossSizes needed = lay_out<X>(pairs, call.levels(), call.masks.masks, save);
  if (anchors) check_elements("anchors.numel()", anchors->numel(), needed.anchors, false);
  // Where there are several chunks of anchors, the gradient needs the pixels' softmax from what is saved.
  if (!save) check_elements("gradient_elements without saved_elements", elements.gradients, 0, false);
  const auto empty = [&] { return make({0}, type, like); };
  const Outputs out{
      make({}, type, like),
      make({}, type, like),
      make({}, type, like),
      steps == Steps::pool ? empty() : make_saved("saved_elements", elements.saved, needed.saved, type, like),
      steps == Steps::pool ? empty()
                           : make_saved("gradient_elements", elements.gradients, needed.gradients, type, like),
      steps == Steps::compare ? empty() : make_saved("softmax_elements", elements.softmax, needed.softmax, type, like)};
  // Tensors that are not saved are still needed until the call ends.
  const Tensor own_saved = steps != Steps::pool && !save ? make({needed.saved}, type, like) : out.saved;
  const Tensor own_softmax =
      steps != Steps::compare && elements.softmax == 0 ? make({needed.softmax}, type, like) : out.softmax;
  LossMemory<T> memory;
  if (anchors) memory.anchors = data<T>(*anchors);
  if (steps != Steps::pool) memory.saved = data<T>(own_saved);
  if (elements.gradients > 0) memory.gradients = data<T>(out.gradients);
  if (steps != Steps::compare) memory.softmax = data<T>(own_softmax);
  lay_out<X>(pairs, call.levels(), call.masks.masks, save, memory);
  with_scratch(like, [&](Carver& scratch) {
    run_forward<X>(
        pairs, call.masks, options, steps,
        {steps == Steps::pool ? nullptr : data<T>(out.anchor), steps == Steps::pool ? nullptr : data<T>(out.distance),
         steps == Steps::compare ? nullptr : data<T>(out.localization)},
        scratch, on.stream());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> sea_loss(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<int64_t> losses, std::vector<Tensor> regions,
    double distance_temperature, double localization_temperature, int64_t saved_elements, int64_t gradient_elements,
    int64_t softmax_elements) {
  const Call call{student, teacher, losses, make_masks(regions, student)};
  return with_held_type(student, teacher, [&](auto zero) {
    const Outputs out = forward<decltype(zero)>(call, Steps::both, distance_temperature, localization_temperature,
                                                {0, saved_elements, gradient_elements, softmax_elements}, nullptr);
    return std::make_tuple(out.anchor, out.distance, out.localization,
                           std::vector<Tensor>{out.saved, out.gradients, out.softmax});
  });
}

std::tuple<Tensor, Tensor, Tensor> sea_loss_pool(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                 std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                 double localization_temperature, int64_t anchor_elements,
                                                 int64_t softmax_elements) {
  const Call call{student, teacher, losses, make_masks(regions, student)};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    std::vector<Pair> pairs = call.pairs();
    const int64_t needed = lay_out<X>(pairs, call.levels(), call.masks.masks, false).anchors;
    check_elements("anchor_elements", anchor_elements, needed, false);
    const OnDevice on(call.like());
    const Tensor anchors = make({anchor_elements}, kScalarType<Compute<X>>, call.like());
    const Outputs out =
        forward<X>(call, Steps::pool, 1, localization_temperature, {0, 0, 0, softmax_elements}, &anchors);
    return std::make_tuple(anchors, out.localization, out.softmax);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sea_loss_compare(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                            std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                            Tensor anchors, double distance_temperature,
                                                            int64_t saved_elements, int64_t gradient_elements) {
  const Call call{student, teacher, losses, make_masks(regions, student)};
  return with_held_type(student, teacher, [&](auto zero) {
    const Outputs out = forward<decltype(zero)>(call, Steps::compare, distance_temperature, 1,
                                                {0, saved_elements, gradient_elements, 0}, &anchors);
    return std::make_tuple(out.anchor, out.distance, out.saved, out.gradients);
  });
}

std::vector<Tensor> sea_loss_backward(std::optional<Tensor> anchor, std::optional<Tensor> distance,
                                      std::optional<Tensor> localization, std::vector<Tensor> student,
                                      std::vector<Tensor> teacher, std::vector<int64_t> losses,
                                      std::vector<Tensor> regions, std::vector<Tensor> saved,
                                      double distance_temperature, double localization_temperature) {
  const OnDevice on(student[0]);
  const Call call{student, teacher, losses, make_masks(regions, student)};
  const std::vector<Tensor> gradients = make_gradients(student);
  const Saved tensors(saved);
  const bool anchor_gradient = tensors.gradients.numel() > 0;
  const LossOptions options{distance_temperature, localization_temperature, true, anchor_gradient, slices()};
  with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    std::vector<Pair> pairs = call.pairs(gradients);
    const LossMemory<T> memory{nullptr, data<T>(tensors.saved), anchor_gradient ? data<T>(tensors.gradients) : nullptr,
                               data<T>(tensors.softmax)};
    const LossSizes needed = lay_out<X>(pairs, call.levels(), call.masks.masks, true, memory);
    check_elements("saved[0]", tensors.saved.numel(), needed.saved, false);
    check_elements("saved[1]", tensors.gradients.numel(), needed.gradients, true);
    check_elements("saved[2]", tensors.softmax.numel(), needed.softmax, false);
    run_loss_backward<X>(pairs, call.masks, options, {data<T>(anchor), data<T>(distance), data<T>(localization)},
                         on.stream());
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
