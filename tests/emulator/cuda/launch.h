// Stands in for csrc/cuda/launch.h: the kernel runs to its end on the CPU before launch() returns.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace sea {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sea_kernels: ") + what + ": " + cudaGetErrorString(error));
}

inline int shared_memory_limit() { return static_cast<int>(emulator::settings.shared_memory_limit); }

constexpr size_t kMaxParameterBytes = 20 << 10;

template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMaxParameterBytes);
  emulator::check_stream(name, stream);
  // Not among the accesses that may race: the copy of the parameters that every thread gets.
  auto body = [&]() __attribute__((no_sanitize("thread"))) { kernel(params); };
  emulator::launch(name, grid, threads, shared_bytes, body);
}

}  // namespace sea
