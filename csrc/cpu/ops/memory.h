// Memory from torch's allocator: outputs, and buffers that a call needs until it returns.
#pragma once
#include <tensors.h>

namespace sea {

// A contiguous uninitialized tensor.
Tensor make(std::vector<int64_t> sizes, ScalarType type);

// A tensor of one value.
template <class T>
Tensor make_scalar(double value) {
  Tensor out = make({}, kScalarType<T>);
  *data<T>(out) = static_cast<T>(value);
  return out;
}

// An uninitialized gradient for a map: with the strides of a dense map, else contiguous.
Tensor make_gradient(const Tensor& like);

// Memory for the time of a call. It comes from torch's allocator, so that torch's tools see it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : tensor_(make({size}, kScalarType<T>)) {}
  T* get() const { return data<T>(tensor_); }

 private:
  Tensor tensor_;
};

}  // namespace sea
