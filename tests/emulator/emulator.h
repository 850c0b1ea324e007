// The machine that runs CUDA kernels on the CPU: each thread is a fiber, blocks run one after another. README.md says
// how, and what that proves.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running thread's.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

struct Settings {
  uint64_t seed = 0;  // of the order of blocks, warps and lanes. 0: forward; 1: backward; else shuffled
  size_t shared_memory_limit = 232448;  // 227 KiB, as on sm_90
  bool empty_grid_is_error = false;     // else it is no launch, as in csrc/cuda/launch.h
  int slices = 3;                       // slices() of csrc/cuda/device.h: so few that each has several tiles
};
inline Settings settings;
inline std::map<std::string, int64_t> launches;  // by kernel name

// Runs body() as every thread of the grid. Throws std::runtime_error for an error in the kernel or in the launch.
void launch(const char* kernel, dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);

// Of the running thread, what a pointer points to; kPrivate also where no thread runs.
enum class Memory { kPrivate, kShared, kGlobal };
Memory memory_of(const void* pointer);
inline bool in_atomic = false;  // the running thread is in an atomic function

// All that follows is called by kernel code.

// A call in the kernels' source. As a default argument, Site::here() is the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Waits for all lanes that the mask names, or for all threads of the block. Then `perform` does for all of them at once
// what they have met for; arguments[i] is that of lane i or thread i.
using Perform = void (*)(void* const* arguments, uint32_t mask);
void meet_warp(const char* name, Perform perform, uint32_t mask, void* argument, Site site);
void meet_block(const char* name, Perform perform, void* argument, Site site);

enum class Vote { kNone, kCount, kAnd, kOr };
int barrier(const char* name, Vote kind, int vote, Site site);
void sync_warp(uint32_t mask, Site site);
uint32_t ballot(const char* name, uint32_t mask, bool vote, Site site);

// PTX's shfl: a source behind the segment of `width` lanes (kUp: before it) is the lane itself.
enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(const char* name, uint32_t mask, Shuffle kind, uint64_t value, int by, int width, Site site);

unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);
void copy_async(void* shared, const void* global, int bytes, int valid, Site site);
void copy_async_commit();
void copy_async_wait(int pending);
void load_matrices(bool transposed, uint32_t* out, const void* row, Site site);
void multiply_add_bfloat16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void multiply_add_half(float* d, const uint32_t* a, const uint32_t* b, Site site);
void multiply_add_tf32(float* d, const float* a, const float* b, Site site);

}  // namespace emulator
