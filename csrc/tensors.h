// Converts torch's tensors to the arguments of kernels, on every kind of device.
#pragma once
#include <dlfcn.h>
#include <map.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace sea {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------------------------------------------------------- dtypes

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

inline Dtype dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      return Dtype::float32;
  }
}

inline bool any_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }
inline bool any_double(const std::vector<Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return any_double(x); });
}
inline bool any_double(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher) {
  return any_double(student) || any_double(teacher);
}

// Calls f with a zero of the type to compute in: with_compute_type(any_double(maps), [&](auto zero) { ... }).
template <class F>
auto with_compute_type(bool any_double, F f) {
  return any_double ? f(double()) : f(float());
}

// --------------------------------------------------------------------------------------------------- pointers and maps

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline Map make_map(const Tensor& tensor) {
  return make_map(tensor.data_ptr(), dtype(tensor), tensor.sizes().data(), tensor.strides().data());
}

inline std::vector<Map> make_maps(const std::vector<Tensor>& tensors) {
  std::vector<Map> maps;
  for (const Tensor& tensor : tensors) maps.push_back(make_map(tensor));
  return maps;
}

// Whether the elements fill one stretch of memory, in any order of dimensions. The gradient of such a map gets the
// map's strides. The gradient of any other map is contiguous.
inline bool is_dense(const Tensor& tensor) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) != 1) order.push_back(i);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); });
  int64_t expected = 1;
  for (const int64_t i : order) {
    if (tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

// ------------------------------------------------------------------------------------------------------------- memory

[[noreturn]] __attribute__((noinline, cold)) inline void fail_allocation(int64_t bytes, const char* error) {
  // From torch 2.13 on: why the last call of this thread failed. It is looked up, because even a weak reference would
  // make that the oldest torch of the library.
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, "torch_exception_get_what_without_backtrace") : nullptr;
  const auto what = reinterpret_cast<const char* (*)()>(found);
  throw std::runtime_error("sea_kernels: cannot allocate " + std::to_string(bytes) +
                           " bytes: " + (what ? what() : error));
}

// Calls a function of torch that allocates a tensor of so many bytes. The stable ABI reports any failure as "API call
// failed"; this error says what failed, and Python turns it into the one that torch raises (sea_kernels).
template <class F>
Tensor allocate(int64_t bytes, F f) {
  try {
    return f();
  } catch (const std::exception& error) {
    fail_allocation(bytes, error.what());
  }
}

inline int64_t count_bytes(const std::vector<int64_t>& sizes, ScalarType type) {
  const bool one = type == ScalarType::Byte || type == ScalarType::Bool;
  const bool two = type == ScalarType::Half || type == ScalarType::BFloat16;
  int64_t bytes = one ? 1 : two ? 2 : type == ScalarType::Float || type == ScalarType::Int ? 4 : 8;
  for (const int64_t size : sizes) bytes *= size;
  return bytes;
}

// -------------------------------------------------------------------------------------------------- saved for backward

// The tensors that a loss saves for backward, in the order in which the operators hand them over. Python computes their
// sizes (sea_kernels/native/saved.py). Each tensor holds its data set by set, and is empty where nothing is saved.
struct Saved {
  Tensor saved;                   // what the distances and anchors of the device's kernels need
  Tensor gradients;               // [levels, masks, channels] of the student's anchors, from the distances
  Tensor softmax;                 // [4, batch, channels] of each level with localization
  std::optional<Tensor> anchors;  // pooled, where they are those of several processes

  explicit Saved(const std::vector<Tensor>& tensors) : saved(tensors[0]), gradients(tensors[1]), softmax(tensors[2]) {
    if (tensors.size() > 3) anchors = tensors[3];
  }
};

// Checks a number of elements that Python computed against what the kernels need.
__attribute__((noinline)) inline void check_elements(const char* name, int64_t elements, int64_t needed,
                                                     bool may_be_zero) {
  STD_TORCH_CHECK(elements == needed || (may_be_zero && elements == 0), "sea_kernels: ", name, " is ", elements,
                  "; expected ", needed);
}

}  // namespace sea
