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

// How many slices the tiles of a launch are divided into, a block each (times the blocks of channels). One number for
// every GPU, since it decides where sums are cut: one block for each multiprocessor of an H100.
inline int slices() { return 132; }

// A function of torch's C interface that some builds of torch lack, from a library that was loaded without exporting
// its symbols; null where it is missing.
template <class Function>
Function* find_function(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? reinterpret_cast<Function*>(dlsym(handle, name)) : nullptr;
}

inline void* current_stream(int32_t device) {
  static const auto get = find_function<decltype(aoti_torch_get_current_cuda_stream)>(
      "libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  if (!get) throw std::runtime_error("sea_kernels: this torch has no CUDA streams (libtorch_cuda.so is not loaded)");
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

// Calls allocate(), which makes a tensor of so many elements. torch's stable interface turns every exception
// inside of torch into "... API call failed", so that an exhausted memory would not be recognized; this throws with
// torch's own message (torch 2.13 and later provide it) or one that begins as torch's does. Python makes it
// torch.OutOfMemoryError.
template <class Allocate>
Tensor allocated(int64_t elements, ScalarType type, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    static const auto what =
        find_function<const char*()>("libtorch_cpu.so", "torch_exception_get_what_without_backtrace");
    if (what) throw std::runtime_error(what());
    const int64_t size = static_cast<int64_t>(
        aoti_torch_dtype_element_size(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))));
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "allocating memory");  // reports the error of an earlier kernel as such
    throw std::runtime_error("CUDA out of memory. sea_kernels tried to allocate " + std::to_string(elements * size) +
                             " bytes. The GPU has " + std::to_string(total) + " bytes, of which " +
                             std::to_string(free) + " are free.");
  }
}

// A contiguous uninitialized tensor on the device of `like`.
inline Tensor make(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  int64_t elements = 1;
  for (const int64_t size : sizes) elements *= size;
  return allocated(elements, type, [&] { return torch::stable::new_empty(like, sizes, type); });
}

// An uninitialized gradient for a map: with the strides of a dense map, else contiguous.
static inline Tensor make_gradient(const Tensor& like) {  // static: the CPU's function has the same signature
  if (is_dense(like))
    return allocated(like.numel(), like.scalar_type(), [&] { return torch::stable::empty_like(like); });
  const auto sizes = like.sizes();
  return make({sizes.begin(), sizes.end()}, like.scalar_type(), like);
}

}  // namespace sea
