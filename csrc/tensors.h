// From torch's tensors to what kernels are given, on every kind of device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <map.h>

namespace sea {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

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

inline Map make_map(const Tensor& tensor) {
  return make_map(tensor.data_ptr(), dtype(tensor), tensor.sizes().data(), tensor.strides().data());
}

inline bool any_double(const std::vector<Tensor>& maps) {
  for (const Tensor& map : maps)
    if (map.scalar_type() == ScalarType::Double) return true;
  return false;
}

// Whether the elements fill one stretch of memory, in whatever order of dimensions.
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

}  // namespace sea
