// How a kernel is started. The emulator of the tests has a file of this name, which runs the kernel on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sea {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sea_kernels: ") + what + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a block may have on the current device.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Kernels take one struct by value and no other argument. `name` is for the error alone. An empty grid is no launch.
template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes, stream), name);
}

}  // namespace sea
