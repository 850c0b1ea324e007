// Where the operators of csrc/cuda/ops meet torch's CUDA: its current stream, its allocator, its dispatch key. The
// emulator of the tests has a file of this name, so that the same operators run on the CPU.
//
//   const OnDevice on(tensor);  // before anything is allocated or launched
//   Tensor out = make({n, 2}, ScalarType::Int, tensor);
//   Tensor gradient = make_gradient(map);
//   launch(..., on.stream(), ...);
//
//   STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) { ... }
#pragma once
#include <cuda/launch.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <tensors.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define SEA_DEVICE CUDA  // the dispatch key

namespace sea {

// How many slices the tiles of a launch are divided into, a block each (times the blocks of channels): one for each
// multiprocessor of the current device. It decides where sums are cut, so results are those of one kind of GPU.
inline int slices() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// torch's functions for streams exist only where torch has CUDA, in a library that was loaded without exporting its
// symbols: this one is looked up there at first use.
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

// Makes the device of a tensor the current one for its own lifetime, and knows the current stream of that device.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

// allocate() of <tensors.h>. Where the allocation failed because an earlier kernel did, it is that error that is
// thrown.
template <class F>
Tensor allocate_on_device(int64_t bytes, F f) {
  try {
    return allocate(bytes, f);
  } catch (const std::exception&) {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "an earlier kernel failed");
    throw;
  }
}

// A contiguous uninitialized tensor on the device of `like`.
inline Tensor make(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  return allocate_on_device(count_bytes(sizes, type), [&] { return torch::stable::new_empty(like, sizes, type); });
}

// An uninitialized gradient for a map: with the strides of a dense map, else contiguous.
static inline Tensor make_gradient(const Tensor& like) {  // static: the CPU's function has the same signature
  const auto given = like.sizes();
  const std::vector<int64_t> sizes(given.begin(), given.end());
  if (!is_dense(like)) return make(sizes, like.scalar_type(), like);
  return allocate_on_device(count_bytes(sizes, like.scalar_type()), [&] { return torch::stable::empty_like(like); });
}

}  // namespace sea
