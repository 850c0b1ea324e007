// What the glue of the CUDA kernels shares; with <maps.h>: data<T>(tensor), dtype, make_map, any_double.
//
//   const OnDevice on(tensor);               // before anything is allocated or launched
//   Tensor out = make({n, 2}, ScalarType::Int, tensor);
//   Tensor gradient = make_gradient(map);
//   pool(..., on.stream());                  // a host function of <pool.cuh>
//
// torch's functions on streams are there only where torch has CUDA, in a library that nobody loads for others to see:
// they are looked up in it when they are first needed.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <cuda/launch.h>
#include <tensors.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda/pyramid.cuh>
#include <cuda/vec.cuh>

namespace sea {

inline void* current_stream(int32_t device) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!found)
      throw std::runtime_error("sea_kernels: this torch has no CUDA streams (libtorch_cuda.so is not loaded)");
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(found);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// While it lives, the device of a tensor is the current one; and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

// A contiguous tensor on the device of `like`, its values not set.
inline Tensor make(std::vector<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, type);
}

// A gradient for a map: its strides where it is dense, else contiguous. Static, for the CPU's has the same signature.
static inline Tensor make_gradient(const Tensor& like) {
  if (is_dense(like)) return torch::stable::empty_like(like);
  const auto sizes = like.sizes();
  return make({sizes.begin(), sizes.end()}, like.scalar_type(), like);
}

inline std::vector<Map> make_maps(const std::vector<Tensor>& tensors) {
  std::vector<Map> maps;
  for (const Tensor& tensor : tensors) maps.push_back(make_map(tensor));
  return maps;
}

// tensors: classes [K], area [L, P], counted [L], extent [L, B, 2], bits [words * pixels]; or none
inline Masks make_masks(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) return {};
  const int64_t capacity = tensors[0].numel(), masks = 1 + 2 * capacity;
  return {data<int64_t>(tensors[0]),      data<float>(tensors[1]),    data<float>(tensors[2]),
          data<Extent>(tensors[3]),       data<uint32_t>(tensors[4]), tensors[4].numel() / divide_up(masks, 32),
          static_cast<int32_t>(capacity), static_cast<int32_t>(masks)};
}

// Calls f with a zero of the type that maps are held in while they are worked on: their own if they all have the same,
// else what they are computed in.
template <class F>
auto with_held_type(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, F f) {
  const ScalarType type = student[0].scalar_type();
  bool same = true;
  for (const auto* maps : {&student, &teacher})
    for (const Tensor& map : *maps) same = same && map.scalar_type() == type;
  if (any_double(student) || any_double(teacher)) return f(double());
  if (same && type == ScalarType::Half) return f(__half());
  if (same && type == ScalarType::BFloat16) return f(__nv_bfloat16());
  return f(float());
}

}  // namespace sea
