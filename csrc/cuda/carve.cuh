// Memory handed out piece by piece, on the host and on the device. A struct of shared memory takes its pieces from a
// Carver in its constructor. With a null base, this counts the bytes that a launch needs. In a kernel, it gives the
// pointers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sea {

class Carver {
 public:
  __host__ __device__ explicit Carver(void* base) : base_(static_cast<unsigned char*>(base)) {}  // null: only count

  template <class T>
  __host__ __device__ T* take(int64_t count) {  // aligned to 16 bytes
#ifdef __CUDA_ARCH__  // never null; a test for it would hide that this is shared memory, whose instructions are shorter
    T* out = reinterpret_cast<T*>(base_ + used_);
#else
    T* out = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
#endif
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    most_ = used_ > most_ ? used_ : most_;
    return out;
  }

  // After rewind(used), new pieces overlap those that were taken since used() had that value.
  __host__ __device__ int64_t used() const { return used_; }
  __host__ __device__ void rewind(int64_t used) { used_ = used; }

  __host__ __device__ int64_t most() const { return most_; }  // bytes in use at once, at most
  bool counts() const { return base_ == nullptr; }

 private:
  unsigned char* base_;
  int64_t used_ = 0, most_ = 0;
};

// The bytes that Memory(carver, arguments...) takes.
template <class Memory, class... Arguments>
int64_t bytes_of(const Arguments&... arguments) {
  Carver counter(nullptr);
  Memory(counter, arguments...);
  return counter.most();
}

}  // namespace sea
