// The operators of the fused losses: they turn tensors into pointers and allocate memory with torch.
#include <cuda/losses.cuh>

#include "tensors.h"

namespace sea {
namespace {

// The arguments of all operators.
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

// What pooling leaves for the rest of the forward pass.
struct Pooled {
  Tensor anchors;  // of all maps
  Tensor softmax;  // for backward; empty where softmax_elements is 0
  Tensor terms;    // of the localization loss
};

// pairs: those of the call; their pointers are set anew.
template <class X>
Pooled pool(const Call& call, std::vector<Pair>& pairs, double localization_temperature, int64_t softmax_elements) {
  using T = Compute<X>;
  const ScalarType type = kScalarType<T>;
  const OnDevice on(call.like());
  const LossSizes needed = lay_out<X>(pairs, call.levels(), call.masks.masks, false);
  check_elements("softmax_elements", softmax_elements, needed.softmax, true);
  const Pooled out{make({needed.anchors}, type, call.like()), make({softmax_elements}, type, call.like()),
                   make({needed.terms}, ScalarType::Double, call.like())};
  const Tensor softmax = softmax_elements > 0 ? out.softmax : make({needed.softmax}, type, call.like());
  lay_out<X>(pairs, call.levels(), call.masks.masks, false,
             {data<T>(out.anchors), nullptr, nullptr, data<T>(softmax), data<double>(out.terms)});
  with_scratch(call.like(), [&](Carver& scratch) {
    run_loss_pool<X>(pairs, call.masks, localization_temperature, slices(), scratch, on.stream());
  });
  return out;
}

// The sizes that compare() needs. Throws if those given are others.
template <class X>
LossSizes check_saved(const Call& call, std::vector<Pair>& pairs, int64_t saved_elements, int64_t gradient_elements) {
  const LossSizes needed = lay_out<X>(pairs, call.levels(), call.masks.masks, saved_elements > 0);
  check_elements("saved_elements", saved_elements, needed.saved, true);
  // Where there are several chunks of anchors, the gradient needs the pixels' softmax from what is saved.
  if (saved_elements == 0) check_elements("gradient_elements without saved_elements", gradient_elements, 0, false);
  check_elements("gradient_elements", gradient_elements, needed.gradients, true);
  return needed;
}

struct Compared {
  Tensor anchor, distance, localization;  // []
  Tensor saved, gradients;
};

// pairs: as for pool(). needed: what check_saved() returns. terms: null if the localization loss is not asked for.
template <class X>
Compared compare(const Call& call, std::vector<Pair>& pairs, const LossSizes& needed, const Tensor& anchors,
                 const Tensor* terms, double distance_temperature, int64_t saved_elements, int64_t gradient_elements) {
  using T = Compute<X>;
  const ScalarType type = kScalarType<T>;
  const Tensor& like = call.like();
  const OnDevice on(like);
  const bool save = saved_elements > 0;
  check_elements("anchors.numel()", anchors.numel(), needed.anchors, false);
  const Compared out{make({}, type, like), make({}, type, like), make({}, type, like),
                     make({saved_elements}, type, like), make({gradient_elements}, type, like)};
  // What is not saved is still needed until the call ends.
  const Tensor saved = save ? out.saved : make({needed.saved}, type, like);
  lay_out<X>(pairs, call.levels(), call.masks.masks, save,
             {data<T>(anchors), data<T>(saved), gradient_elements > 0 ? data<T>(out.gradients) : nullptr, nullptr,
              terms ? data<double>(*terms) : nullptr});
  const LossOptions options{distance_temperature, 1, save, gradient_elements > 0, slices()};
  T* const losses[3] = {data<T>(out.anchor), data<T>(out.distance), terms ? data<T>(out.localization) : nullptr};
  with_scratch(like,
               [&](Carver& scratch) { run_loss_compare<X>(pairs, call.masks, options, losses, scratch, on.stream()); });
  return out;
}

// The memory of pooling is freed before what is saved for backward is allocated.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> sea_loss(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<int64_t> losses, std::vector<Tensor> regions,
    double distance_temperature, double localization_temperature, int64_t saved_elements, int64_t gradient_elements,
    int64_t softmax_elements) {
  const Call call{student, teacher, losses, make_masks(regions, student)};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    std::vector<Pair> pairs = call.pairs();
    const LossSizes needed = check_saved<X>(call, pairs, saved_elements, gradient_elements);
    const Pooled pooled = pool<X>(call, pairs, localization_temperature, softmax_elements);
    const Compared out = compare<X>(call, pairs, needed, pooled.anchors, &pooled.terms, distance_temperature,
                                    saved_elements, gradient_elements);
    return std::make_tuple(out.anchor, out.distance, out.localization,
                           std::vector<Tensor>{out.saved, out.gradients, pooled.softmax});
  });
}

std::tuple<Tensor, Tensor, Tensor> sea_loss_pool(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                 std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                 double localization_temperature, int64_t anchor_elements,
                                                 int64_t softmax_elements) {
  const Call call{student, teacher, losses, make_masks(regions, student)};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    using T = Compute<X>;
    std::vector<Pair> pairs = call.pairs();
    const int64_t needed = lay_out<X>(pairs, call.levels(), call.masks.masks, false).anchors;
    check_elements("anchor_elements", anchor_elements, needed, false);
    const Pooled pooled = pool<X>(call, pairs, localization_temperature, softmax_elements);
    const OnDevice on(call.like());
    const Tensor localization = make({}, kScalarType<T>, call.like());
    run_localization<X>(call.masks, data<double>(pooled.terms), pooled.terms.numel(), data<T>(localization),
                        on.stream());
    return std::make_tuple(pooled.anchors, localization, pooled.softmax);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sea_loss_compare(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                            std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                            Tensor anchors, double distance_temperature,
                                                            int64_t saved_elements, int64_t gradient_elements) {
  const Call call{student, teacher, losses, make_masks(regions, student)};
  return with_held_type(student, teacher, [&](auto zero) {
    using X = decltype(zero);
    std::vector<Pair> pairs = call.pairs();
    const LossSizes needed = check_saved<X>(call, pairs, saved_elements, gradient_elements);
    const Compared out =
        compare<X>(call, pairs, needed, anchors, nullptr, distance_temperature, saved_elements, gradient_elements);
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
