// Stands in for csrc/cuda/device.h, which describes the functions. Operators are collected, and registered for the CPU
// by operators.cpp; each is checked when it ends.
#pragma once
#include <cuda/launch.h>
#include <cuda_runtime.h>
#include <tensors.h>

#include <utility>

#include "../memory.h"

#define SEA_DEVICE CPU

namespace emulator {

using Operator = void (*)(StableIValue*, uint64_t, uint64_t);
using Register = void (*)(torch::stable::detail::StableLibrary&);
inline std::vector<Register> registrations;  // of every file in csrc/cuda/ops

// Not watched for races: it waits while an operator of another Python thread runs.
template <Operator kOperator>
__attribute__((no_sanitize("thread"))) void run(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const RunningOperator running;
  kOperator(stack, inputs, outputs);
  running.check();
}

}  // namespace emulator

#undef TORCH_BOX
#define TORCH_BOX(function) \
  &emulator::run<&torch::stable::detail::boxer<std::remove_pointer_t<decltype(function)>, (function)>::boxed_fn>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, library)                                                        \
  static void register_operators(torch::stable::detail::StableLibrary& library);                             \
  [[maybe_unused]] static const auto& registered = emulator::registrations.emplace_back(register_operators); \
  static void register_operators(torch::stable::detail::StableLibrary& library)

namespace sea {

inline int slices() { return emulator::settings.slices; }

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) : before_(std::exchange(emulator::stream, &emulator::the_stream)) {}
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { emulator::stream = before_; }
  cudaStream_t stream() const { return emulator::stream; }

 private:
  cudaStream_t before_;
};

inline Tensor make(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  if (!emulator::stream) emulator::fail("memory is allocated before the device of a tensor is the current one");
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  for (const int64_t size : sizes) bytes *= size;
  return torch::stable::from_blob(emulator::allocate(bytes), sizes, strides, torch::headeronly::DeviceType::CPU, type,
                                  &emulator::release);
}

inline Tensor make(const std::vector<int64_t>& sizes, ScalarType type, const Tensor&) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return make(sizes, strides, type);
}

inline Tensor make_gradient(const Tensor& like) {
  const auto sizes = like.sizes(), strides = like.strides();
  if (is_dense(like)) return make({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, like.scalar_type());
  return make({sizes.begin(), sizes.end()}, like.scalar_type(), like);
}

}  // namespace sea
