// Launches kernels of handwritten PTX by their names, for test_the_ptx_machine_itself.py.
#include <cstdint>
#include <string>

#include "runtime.h"

struct Dim {  // dim3
  unsigned x, y, z;
};
extern "C" {
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*);
int cudaLaunchKernel(const void*, Dim, Dim, void**, size_t, void*);
const char* cudaGetErrorString(int);

// Empty, or the error. parameters: the bytes of the kernel's, one after the other
__attribute__((visibility("default"))) const char* run(const char* name, unsigned blocks, unsigned threads,
                                                       size_t shared, void* parameters) {
  static std::map<std::string, int> hosts;
  const auto [host, added] = hosts.try_emplace(name, 0);
  const char* const key = host->first.c_str();
  if (added) __cudaRegisterFunction(nullptr, key, nullptr, key, 0, nullptr, nullptr, nullptr, nullptr, nullptr);
  void* arguments[] = {parameters};
  const int code = cudaLaunchKernel(key, {blocks, 1, 1}, {threads, 1, 1}, arguments, shared, nullptr);
  return code == 0 ? "" : cudaGetErrorString(code);
}

__attribute__((visibility("default"))) void set(uint64_t seed, int mma, bool rough, bool races) {
  ptx::settings.seed = seed;
  ptx::settings.mma = mma;
  ptx::settings.rough = rough;
  ptx::settings.races = races;
}
}
