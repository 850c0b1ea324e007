// How a kernel is started. The emulator of the tests has a file of this name, which runs the kernel on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace sea {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sea_kernels: ") + what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// An attribute of the current device, none of which is 0.
inline int device_attribute(cudaDeviceAttr attribute) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaDeviceAttr>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const int device = current_device();
  int& value = known[{device, attribute}];
  if (value == 0) check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Bytes of shared memory that a block may have on the current device.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Lets a kernel have all of it, once for each kernel and device. Always all of it, since a smaller limit for one launch
// could fail the launch of another thread.
inline void raise_shared_memory(const void* function, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> raised;
  const int limit = shared_memory_limit();
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> key{function, current_device()};
  if (raised.count(key)) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), name);
  raised.insert(key);  // only after it has succeeded
}

// CUDA allows a kernel 32,764 bytes of parameters. The largest table of maps takes this much, so that fields may be
// added.
constexpr size_t kMaxParameterBytes = 20 << 10;

// Kernels take one struct by value and no other argument. `name` appears in errors only. An empty grid launches
// nothing.
template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  static_assert(sizeof(Params) <= kMaxParameterBytes);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    if (shared_bytes > static_cast<size_t>(shared_memory_limit()))
      throw std::runtime_error(std::string("sea_kernels: ") + name + " needs " + std::to_string(shared_bytes) +
                               " bytes of shared memory, and this GPU has " + std::to_string(shared_memory_limit()) +
                               " for a block: too many categories");
    raise_shared_memory(function, name);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, stream), name);
}

}  // namespace sea
