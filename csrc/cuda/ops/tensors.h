// Converts torch's tensors to the arguments of the CUDA kernels' host functions.
#pragma once
#include <cuda/device.h>
#include <tensors.h>

#include <cuda/carve.cuh>
#include <cuda/pyramid.cuh>
#include <cuda/vec.cuh>

namespace sea {

// tensors: classes [K], area [L, P], counted [L], extent [L, B, 2], bits [words * pixels], runs [words of runs * 3]; or
// none. maps: those of the levels, and maybe more.
inline Masks make_masks(const std::vector<Tensor>& tensors, const std::vector<Tensor>& maps) {
  if (tensors.empty()) return {};
  const int64_t capacity = tensors[0].numel(), masks = 1 + 2 * capacity;
  int64_t pixels = 0, run_words = 0;
  for (int64_t l = 0; l < tensors[1].size(0); ++l) {
    const int64_t batch = maps[l].size(0), image = maps[l].size(2) * maps[l].size(3);
    pixels += batch * image;
    run_words += batch * divide_up(image, 32);
  }
  check_elements("regions[4]", tensors[4].numel(), divide_up(masks, 32) * pixels, false);
  check_elements("regions[5]", tensors[5].numel(), 3 * run_words, false);
  return {data<int64_t>(tensors[0]),
          data<float>(tensors[1]),
          data<float>(tensors[2]),
          data<Extent>(tensors[3]),
          data<uint32_t>(tensors[4]),
          data<RunWord>(tensors[5]),
          pixels,
          static_cast<int32_t>(capacity),
          static_cast<int32_t>(masks)};
}

inline std::vector<Tensor> make_gradients(const std::vector<Tensor>& maps) {
  std::vector<Tensor> out;
  for (const Tensor& map : maps) out.push_back(make_gradient(map));
  return out;
}

// Calls f with a zero of the type that maps have in shared memory: their own type if it is the same for all, else the
// type that is computed in.
template <class F>
auto with_held_type(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, F f) {
  const ScalarType type = student[0].scalar_type();
  bool same = true;
  for (const auto* maps : {&student, &teacher})
    for (const Tensor& map : *maps) same = same && map.scalar_type() == type;
  if (any_double(student, teacher)) return f(double());
  if (same && type == ScalarType::Half) return f(__half());
  if (same && type == ScalarType::BFloat16) return f(__nv_bfloat16());
  return f(float());
}

// Calls run(carver) twice: to count the bytes of scratch memory that it needs, and to run with them.
template <class Run>
void with_scratch(const Tensor& like, Run run) {
  Carver counter(nullptr);
  run(counter);
  const Tensor memory = make({std::max<int64_t>(counter.most(), 16)}, ScalarType::Byte, like);
  Carver scratch(memory.data_ptr());
  run(scratch);
}

}  // namespace sea
