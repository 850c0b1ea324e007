// Stands in for csrc/cuda/ptx.cuh, which describes the functions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace sea {

using emulator::copy_async_commit;
using emulator::shared_address;
using emulator::shared_memory;

inline void store_shared(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

inline float exp2_approximate(float x) { return x < -126 ? 0 : exp2f(x); }

inline int thread_index() { return static_cast<int>(threadIdx.x); }

template <int kBytes>
void copy_async(void* shared, const void* global, int valid, emulator::Site site = emulator::Site::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(shared, global, kBytes, valid, site);
}

template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

inline void load_matrices(uint32_t (&out)[4], uint32_t row, emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices(false, out, shared_memory() + row, site);
}

inline void load_matrices_transposed(uint32_t (&out)[4], uint32_t row, emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices(true, out, shared_memory() + row, site);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply_add_bfloat16(d, a, b, site);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply_add_half(d, a, b, site);
}

inline void multiply_add(float (&d)[4], const float (&a)[4], const float (&b)[2],
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply_add_tf32(d, a, b, site);
}

}  // namespace sea
