// Reductions in a fixed order, so that results are bitwise reproducible.
#pragma once
#include <cuda_runtime.h>

namespace sea {

constexpr unsigned kAllLanes = 0xffffffffu;

// Over groups of kLanes neighboring lanes, a power of two; every lane gets the result.
template <int kLanes, class T>
__device__ inline T sum_over_lanes(T x) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

template <int kLanes, class T>
__device__ inline T max_over_lanes(T x) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

// Over the block, of whole warps; every thread gets the result. All threads must call it.
template <class T>
__device__ inline T sum_over_block(T x, T* scratch) {  // scratch: [32] in shared memory
  x = sum_over_lanes<32>(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) x += scratch[w];
  return x;
}

}  // namespace sea
