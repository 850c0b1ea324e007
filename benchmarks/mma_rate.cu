// How fast tensor cores multiply bfloat16 matrices that lie in registers already: by mma.sync, and where it is built
// for sm_90a by wgmma with 64 columns, the number of anchors that the kernels hold at once. Prints a line of JSON:
// FLOP/s.
//
//   nvcc -gencode arch=compute_90a,code=sm_90a -o mma_rate mma_rate.cu && ./mma_rate
#include <cstdint>
#include <cstdio>
#include <cstdlib>

constexpr int kThreads = 256, kTurns = 4096, kChains = 8;

static void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Two bfloat16 of random sign and mantissa, in size 0.5 to 1: the power that zeros save would raise the clock.
__device__ uint32_t random_pair(uint32_t seed) {
  seed = (seed + 1) * 2654435761u;
  return ((seed ^ seed >> 15) & 0x807f807f) | 0x3f003f00;
}

__global__ void mma_sync(float* out) {
  uint32_t a[4], b[2];
  float sums[kChains][4] = {};
  for (int i = 0; i < 4; ++i) a[i] = random_pair(4 * threadIdx.x + i);
  for (int i = 0; i < 2; ++i) b[i] = random_pair(9999 + 2 * threadIdx.x + i);
  for (int turn = 0; turn < kTurns; ++turn)
#pragma unroll
    for (int c = 0; c < kChains; ++c)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
          "%2, %3};"
          : "+f"(sums[c][0]), "+f"(sums[c][1]), "+f"(sums[c][2]), "+f"(sums[c][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  float sum = 0;
  for (auto& chain : sums)
    for (float x : chain) sum += x;
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// [64, 16] of registers times [16, 64] of shared memory: as core matrices of 8 x 16 bytes, one after the other.
__global__ void wgmma(float* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ alignas(128) uint32_t right[16 * 64 / 2];
  for (int i = threadIdx.x; i < 16 * 64 / 2; i += kThreads) right[i] = random_pair(i);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(right)) >> 4;
  const uint64_t matrix = address | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
  uint32_t a[4];
  float d[32] = {};
  for (int i = 0; i < 4; ++i) a[i] = random_pair(4 * threadIdx.x + i);
  for (int turn = 0; turn < kTurns; ++turn) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int c = 0; c < kChains; ++c)
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
          "%12, "
          "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, "
          "%34, %35}, %36, 1, 1, 1, 0;"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
            "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
            "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
            "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix));
    asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  float sum = 0;
  for (float x : d) sum += x;
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
#endif
}

// FLOP/s, the best of five launches. operations: of one product, a thread's share.
static double rate(void (*kernel)(float*), double operations) {
  cudaDeviceProp card;
  check(cudaGetDeviceProperties(&card, 0));
  const int blocks = 2 * card.multiProcessorCount;
  float *out, best = 0;
  check(cudaMalloc(&out, sizeof(float) * blocks * kThreads));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int k = 0; k < 6; ++k) {
    check(cudaEventRecord(begin));
    kernel<<<blocks, kThreads>>>(out);
    check(cudaGetLastError());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (k > 0 && (best == 0 || ms < best)) best = ms;
  }
  check(cudaFree(out));
  return operations * kTurns * kChains * kThreads * blocks / best * 1e3;
}

int main() {
  cudaDeviceProp card;
  check(cudaGetDeviceProperties(&card, 0));
  std::printf("{\"mma_sync\": %.4e", rate(mma_sync, 2.0 * 16 * 8 * 16 / 32));
  if (card.major == 9) std::printf(", \"wgmma\": %.4e", rate(wgmma, 2.0 * 64 * 64 * 16 / 128));
  std::printf("}\n");
}
