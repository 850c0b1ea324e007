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

// Bytes of shared memory that a block may have on the current device.
inline int shared_memory_limit() {
  static std::mutex mutex;
  static std::map<int, int> limits;
  const std::lock_guard<std::mutex> lock(mutex);
  const int device = current_device();
  int& bytes = limits[device];
  if (bytes == 0)
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Lets a kernel have all of it. Once for each kernel and device, and always the same: a smaller number for one launch
// would be in the way of another thread's.
inline void raise_shared_memory(const void* function, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> raised;
  const int limit = shared_memory_limit();
  const std::lock_guard<std::mutex> lock(mutex);
  if (raised.insert({function, current_device()}).second)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), name);
}

// Kernels take one struct by value and no other argument. `name` is for the error alone. An empty grid is no launch.
template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
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
