// Toy kernels for the tests of the emulator itself, right ones and wrong ones.
#include <cuda/launch.h>
#include <map.h>
#include <pybind11/numpy.h>

#include <cuda/mma.cuh>

#include "bind.h"

namespace sea {

struct SumParams {
  const float* in;  // [blocks * threads]
  float* out;       // [blocks]
  int missing_barrier;
};

// The sum of a block's values.
__global__ void block_sum(const __grid_constant__ SumParams params) {
  float* sums = reinterpret_cast<float*>(shared_memory());  // [warps]
  float x = params.in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits; bits >>= 1) x += __shfl_xor_sync(0xFFFFFFFF, x, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  if (!params.missing_barrier) __syncthreads();
  // The reader is in the middle, and so too early whether warps run first to last or last to first.
  if (threadIdx.x == blockDim.x / 2) {
    float sum = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += sums[i];
    params.out[blockIdx.x] = sum;
  }
}

enum class Pipeline { kRight, kNoWait, kWaitTooWeak, kNoBarrierAfterWait, kNoBarrierBeforeReuse, kNoWaitAtAll };

struct PipelineParams {
  const float* in;  // [steps, 4 * threads]
  float* out;       // [threads]
  int steps, valid;
  Pipeline mode;
};

// out[t] = sum over the steps of what the threads t + 1, t + 33, ... have copied, through three stages of shared
// memory.
__global__ void pipeline(const __grid_constant__ PipelineParams params) {
  const int threads = blockDim.x, t = threadIdx.x;
  auto stage = [&](int step) { return reinterpret_cast<float*>(shared_memory()) + step % 3 * 4 * threads; };
  auto copy = [&](int step) {
    if (step < params.steps) copy_async<16>(stage(step) + 4 * t, params.in + (step * threads + t) * 4, params.valid);
    copy_async_commit();
  };
  copy(0);
  copy(1);
  float sum = 0;
  for (int step = 0; step < params.steps; ++step) {
    if (params.mode == Pipeline::kNoBarrierBeforeReuse) copy(step + 2);  // the other warps may still read that stage
    if (params.mode == Pipeline::kWaitTooWeak)
      copy_async_wait<2>();
    else if (params.mode == Pipeline::kNoBarrierBeforeReuse)
      copy_async_wait<2>();
    else if (params.mode != Pipeline::kNoWait && params.mode != Pipeline::kNoWaitAtAll)
      copy_async_wait<1>();
    if (params.mode != Pipeline::kNoBarrierAfterWait) __syncthreads();
    for (int other = t + 1; other < t + threads; other += 32)
      for (int i = 0; i < 4; ++i) sum += stage(step)[4 * (other % threads) + i];
    if (params.mode != Pipeline::kNoBarrierBeforeReuse) copy(step + 2);
  }
  if (params.mode != Pipeline::kNoWaitAtAll) copy_async_wait<0>();
  params.out[t] = sum;
}

struct ProductParams {
  const void* a;  // [16, 16] of the type; float for tf32
  const void* b;  // [16, 16]
  float* c;       // [16, 16]
};

// c = a b by one warp.
template <class Half>
__global__ void product(const __grid_constant__ ProductParams params) {
  auto* a = reinterpret_cast<uint16_t*>(shared_memory());  // [16, 16]
  auto* b = a + 256;                                       // [16, 16]
  const int lane = threadIdx.x;
  copy_async<16>(a + 8 * lane, static_cast<const uint16_t*>(params.a) + 8 * lane, 16);
  copy_async<16>(b + 8 * lane, static_cast<const uint16_t*>(params.b) + 8 * lane, 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  // The four 8 x 8 quarters of both: of a down its columns first, of b likewise but transposed, as mma has b.
  uint32_t quarters_a[4], quarters_b[4];
  const int row = lane % 16, column = lane / 16 * 8;
  load_matrices(quarters_a, shared_address(a + 16 * row + column));
  load_matrices_transposed(quarters_b, shared_address(b + 16 * row + column));
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    const uint32_t columns[2] = {quarters_b[2 * half], quarters_b[2 * half + 1]};
    multiply_add(d, quarters_a, columns, Half());
    for (int i = 0; i < 4; ++i) params.c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

__global__ void product_tf32(const __grid_constant__ ProductParams params) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  auto a = [&](int i, int k) { return static_cast<const float*>(params.a)[16 * i + k]; };
  auto b = [&](int k, int j) { return static_cast<const float*>(params.b)[16 * k + j]; };
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    for (int k = 0; k < 16; k += 8)
      multiply_add(d, {a(g, k + t), a(g + 8, k + t), a(g, k + t + 4), a(g + 8, k + t + 4)},
                   {b(k + t, 8 * half + g), b(k + t + 4, 8 * half + g)});
    for (int i = 0; i < 4; ++i) params.c[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2] = d[i];
  }
}

struct ShuffleParams {
  const double* in;  // [32]
  double* out;       // [4, 32]: index, up, down, xor
  int by, width;
};

__global__ void shuffles(const __grid_constant__ ShuffleParams params) {
  const int lane = threadIdx.x;
  const double x = params.in[lane];
  params.out[lane] = __shfl_sync(0xFFFFFFFF, x, params.by, params.width);
  params.out[32 + lane] = __shfl_up_sync(0xFFFFFFFF, x, params.by, params.width);
  params.out[64 + lane] = __shfl_down_sync(0xFFFFFFFF, x, params.by, params.width);
  params.out[96 + lane] = __shfl_xor_sync(0xFFFFFFFF, x, params.by, params.width);
}

struct VoteParams {
  const int* in;  // [threads]
  int* out;       // [votes, threads]
};

// The votes and sums of a block, and of the odd lanes of each warp alone.
__global__ void votes(const __grid_constant__ VoteParams params) {
  const int t = threadIdx.x, x = params.in[t];
  int* out = params.out + t;
  auto put = [&](int value) { *out = value, out += blockDim.x; };
  put(__syncthreads_count(x > 0));
  put(__syncthreads_and(x > 0));
  put(__syncthreads_or(x > 0));
  put(static_cast<int>(__ballot_sync(0xFFFFFFFF, x > 0)));
  put(__any_sync(0xFFFFFFFF, x > 0));
  put(__all_sync(0xFFFFFFFF, x > 0));
  put(__reduce_add_sync(0xFFFFFFFF, x));
  put(static_cast<int>(__reduce_or_sync(0xFFFFFFFF, static_cast<unsigned>(x))));
  if (t % 2) {
    put(static_cast<int>(__ballot_sync(0xAAAAAAAA, x > 0)));
    put(__shfl_down_sync(0xAAAAAAAA, x, 0));
  } else {
    put(-1);
    put(__reduce_add_sync(0x55555555, x));
  }
}

struct OrderParams {
  int* next;      // [1]
  int* order;     // [blocks * threads]: when each thread had its turn
  int64_t* bins;  // [7]
};

__global__ void order(const __grid_constant__ OrderParams params) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = block * blockDim.x + threadIdx.x;
  params.order[thread] = atomicAdd(params.next, 1);
  atomicAdd(reinterpret_cast<unsigned long long*>(params.bins + thread % 7), 1);
}

enum class Error {
  kNone,
  kExitBeforeBarrier,
  kOtherBarrier,
  kBarrierElsewhere,
  kExitBeforeShuffle,
  kOtherShuffle,
  kHalfAtBarrier,
  kMaskWithoutSelf,
  kLaneOutOfMask,
  kPartialWarp,
  kOverrun,
  kUnderrun,
  kMisalignedVector,
  kArrayBounds,
  kDivision,
  kShift,
  kConversion,
  kMisalignedCopy,
  kCopyBeyond,
  kCopyToGlobal,
  kMisalignedRow,
  kRowBehind,
  kUnfinishedCopy,
  kException,
};

struct ErrorParams {
  Error error;
  float* out;  // [threads]
  int zero;
};

// One error of each kind, none of them by every thread. 64 threads, 1024 bytes.
__global__ void wrong(const __grid_constant__ ErrorParams params) {
  const int t = threadIdx.x, zero = params.zero;
  auto* memory = reinterpret_cast<float*>(shared_memory());
  const bool last = t == 63;
  float x = 1, array[4] = {};
  uint32_t quarters[4];
  switch (params.error) {
    case Error::kNone:
      break;
    case Error::kExitBeforeBarrier:
      if (last) return;
      break;
    case Error::kOtherBarrier:
      if (last) __syncthreads_or(0);
      break;
    case Error::kBarrierElsewhere:
      if (t < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Error::kExitBeforeShuffle:
      if (last) return;
      x = __shfl_xor_sync(0xFFFFFFFF, x, 1);
      break;
    case Error::kOtherShuffle:
      x = last ? __shfl_down_sync(0xFFFFFFFF, x, 1) : __shfl_up_sync(0xFFFFFFFF, x, 1);
      break;
    case Error::kHalfAtBarrier:
      if (t % 32 < 16) __syncwarp();
      break;
    case Error::kMaskWithoutSelf:
      x = __shfl_xor_sync(0x7FFFFFFF, x, 0);
      break;
    case Error::kLaneOutOfMask:
      if (t % 32 < 16) x = __shfl_sync(0x0000FFFF, x, 16);
      break;
    case Error::kPartialWarp:
      x = __shfl_sync(0xFFFFFFFF, x, 0);
      break;
    case Error::kOverrun:
      memory[256 + (last ? 0 : -1)] = x;
      break;
    case Error::kUnderrun:
      memory[last ? -1 : 0] = x;
      break;
    case Error::kMisalignedVector:
      x = reinterpret_cast<float4*>(memory + (last ? 1 : 0))->x;
      break;
    case Error::kArrayBounds:
      x = array[t / 16 + (last ? 1 : 0)];
      break;
    case Error::kDivision:
      x = t / (last ? zero : 1);
      break;
    case Error::kShift:
      x = 1 << (last ? 32 + zero : 0);
      break;
    case Error::kConversion:
      x = static_cast<float>(static_cast<int>(last ? x * 3e9f : x));
      break;
    case Error::kMisalignedCopy:
      copy_async<16>(memory + (last ? 2 : 0), params.out, 16);
      break;
    case Error::kCopyBeyond:
      copy_async<8>(memory, params.out, last ? 9 : 8);
      break;
    case Error::kCopyToGlobal:
      copy_async<4>(last ? params.out : memory, params.out, 4);
      break;
    case Error::kMisalignedRow:
      load_matrices(quarters, shared_address(memory) + (last ? sizeof(*memory) : 0));
      break;
    case Error::kRowBehind:
      load_matrices(quarters, shared_address(memory) + (last ? 256 * sizeof(*memory) : 0));
      break;
    case Error::kUnfinishedCopy:
      if (last) copy_async<4>(memory, params.out, 4);
      return;
    case Error::kException:
      if (last) throw std::out_of_range("thrown by the kernel");
      break;
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  params.out[t] = x;
}

enum class Sharing { kRight, kNoSyncWarp, kVoteForSyncWarp, kNoAtomic, kPlainRead, kBlocksOverlap, kWriteAfterReads };

struct SharingParams {
  int* counter;  // [1]
  int* out;      // [blocks * threads]
  Sharing mode;
};

// out[t] = t ^ 1 through shared memory; counter += the number of threads. Two blocks of two warps.
__global__ void sharing(const __grid_constant__ SharingParams params) {
  int* memory = reinterpret_cast<int*>(shared_memory());  // [threads]
  const int t = threadIdx.x, first = params.mode == Sharing::kBlocksOverlap ? 0 : blockIdx.x * blockDim.x;
  memory[t] = t;
  if (params.mode == Sharing::kVoteForSyncWarp)
    __any_sync(0xFFFFFFFF, 1);
  else if (params.mode != Sharing::kNoSyncWarp)
    __syncwarp();
  const int neighbor = memory[t ^ 1];
  __syncthreads();
  memory[blockDim.x - 1 - t] = 0;
  if (params.mode == Sharing::kWriteAfterReads) {  // within a warp, by one of those who read
    __syncthreads();
    const int read = memory[t / 32];
    if (t % 32 == read) memory[t / 32] = 1;
  }
  if (params.mode == Sharing::kNoAtomic)
    ++*params.counter;
  else
    atomicAdd(params.counter, 1);
  params.out[first + t] = neighbor + (params.mode == Sharing::kPlainRead && *params.counter < 0);
}

struct ConvertParams {
  const float* in;      // [count]
  uint16_t* narrow[2];  // [count], bfloat16 and half
  float* tf32[2];       // [count], rounded and rest
  float* wide[2];       // [65536]
  int count;
};

__global__ void convert(const __grid_constant__ ConvertParams params) {
  const int step = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  for (int i = first; i < params.count; i += step) {
    params.narrow[0][i] = __bfloat16_as_ushort(__float2bfloat16_rn(params.in[i]));
    params.narrow[1][i] = __half_as_ushort(__float2half_rn(params.in[i]));
    split_to_tf32(params.in[i], params.tf32[0][i], params.tf32[1][i]);
  }
  for (int i = first; i < 65536; i += step) {
    params.wide[0][i] = __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(i)));
    params.wide[1][i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i)));
  }
}

}  // namespace sea

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

PYBIND11_MODULE(selftest, module) {
  using namespace sea;
  emulator::bind(module);
  auto one = [](auto kernel, const char* name, int threads, size_t bytes, const auto& params) {
    launch(kernel, name, dim3(1), threads, bytes, nullptr, params);
  };
  module.def("block_sum", [](const Array<float>& in, int threads, bool missing_barrier) {
    const unsigned blocks = in.size() / threads;
    Array<float> out(blocks);
    launch(block_sum, "block_sum", dim3(blocks), threads, threads / 32 * sizeof(float), nullptr,
           SumParams{in.data(), out.mutable_data(), missing_barrier});
    return out;
  });
  module.def("pipeline", [=](const Array<float>& in, int threads, int valid, int mode) {
    Array<float> out(threads);
    const int steps = in.size() / threads / 4;
    one(pipeline, "pipeline", threads, 3 * 16 * threads,
        PipelineParams{in.data(), out.mutable_data(), steps, valid, static_cast<Pipeline>(mode)});
    return out;
  });
  module.def("product", [=](const std::string& type, const py::array& a, const py::array& b) {
    Array<float> c({16, 16});
    const ProductParams params = {a.data(), b.data(), c.mutable_data()};
    if (type == "tf32")
      one(product_tf32, "product_tf32", 32, 0, params);
    else
      one(type == "half" ? product<__half> : product<__nv_bfloat16>, "product", 32, 1024, params);
    return c;
  });
  module.def("shuffles", [=](const Array<double>& in, int by, int width) {
    Array<double> out({4, 32});
    one(shuffles, "shuffles", 32, 0, ShuffleParams{in.data(), out.mutable_data(), by, width});
    return out;
  });
  module.def("votes", [=](const Array<int>& in) {
    const int threads = in.size();
    Array<int> out({10, threads});
    one(votes, "votes", threads, 0, VoteParams{in.data(), out.mutable_data()});
    return out;
  });
  module.def("order", [](unsigned x, unsigned y, unsigned z, int threads, size_t shared_bytes) {
    const bool small = static_cast<size_t>(x) * y * z * threads <= 1 << 20;  // else the launch is refused
    Array<int> out(small ? static_cast<size_t>(x) * y * z * threads : 0);
    Array<int64_t> bins(7);
    int next = 0;
    std::fill_n(bins.mutable_data(), 7, 0);
    launch(order, "order", dim3(x, y, z), threads, shared_bytes, nullptr,
           OrderParams{&next, out.mutable_data(), bins.mutable_data()});
    return py::make_tuple(out, bins);
  });
  module.def("wrong", [=](int error, int threads) {
    Array<float> out(threads);
    one(wrong, "wrong", threads, 1024, ErrorParams{static_cast<Error>(error), out.mutable_data(), 0});
    return out;
  });
  module.def("sharing", [](int mode) {
    Array<int> out(128), counter(1);
    *counter.mutable_data() = 0;
    launch(sharing, "sharing", dim3(2), 64, 64 * sizeof(int), nullptr,
           SharingParams{counter.mutable_data(), out.mutable_data(), static_cast<Sharing>(mode)});
    return py::make_tuple(*counter.data(), out);
  });
  module.def("convert", [=](const Array<float>& in) {
    Array<uint16_t> bfloat16(in.size()), half(in.size());
    Array<float> tf32(in.size()), rest(in.size()), from_bfloat16(65536), from_half(65536);
    launch(convert, "convert", dim3(3), 128, 0, nullptr,
           ConvertParams{in.data(),
                         {bfloat16.mutable_data(), half.mutable_data()},
                         {tf32.mutable_data(), rest.mutable_data()},
                         {from_bfloat16.mutable_data(), from_half.mutable_data()},
                         static_cast<int>(in.size())});
    return py::make_tuple(bfloat16, half, tf32, rest, from_bfloat16, from_half);
  });
}
