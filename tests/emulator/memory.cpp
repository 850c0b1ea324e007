#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizer.h"

namespace emulator {
namespace {

constexpr size_t kGuardBytes = 64;                // also the alignment of what lies between two guards
constexpr unsigned char kGuard[] = {0xF7, 0x7F};  // NaN as float, double, half and bfloat16

struct Allocation {
  unsigned char* begin;
  size_t bytes;
  bool released;
};

// Never destroyed: tensors may be released after the variables of this library are gone.
std::mutex& operators = *new std::mutex;                              // locked while one runs
std::mutex& mutex = *new std::mutex;                                  // of the list
std::vector<Allocation>& allocations = *new std::vector<Allocation>;  // since the running operator began
size_t live, most;                                                    // bytes not released: now, and at most

void fill_guard(unsigned char* guard) {
  for (size_t i = 0; i < kGuardBytes; ++i) guard[i] = kGuard[i % 2];
  __asan_poison_memory_region(guard, kGuardBytes);
}

void free_all(unsigned char* begin) { std::free(begin - kGuardBytes); }

}  // namespace

void* allocate(size_t bytes) {
  const size_t rounded = (bytes + kGuardBytes - 1) / kGuardBytes * kGuardBytes;
  auto* all = static_cast<unsigned char*>(std::aligned_alloc(kGuardBytes, rounded + 2 * kGuardBytes));
  if (!all) throw std::bad_alloc();
  unsigned char* begin = all + kGuardBytes;
  fill_guard(all);
  if (bytes <= largest_filled) std::memset(begin, 0xFF, bytes);
  fill_guard(begin + bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  allocations.push_back({begin, bytes, false});
  live += bytes;
  most = std::max(most, live);
  return begin;
}

void release(void* memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (Allocation& allocation : allocations)
    if (allocation.begin == memory) {
      allocation.released = true;
      live -= allocation.bytes;
      return;
    }
  free_all(static_cast<unsigned char*>(memory));
}

size_t peak_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return most;
}

RunningOperator::RunningOperator() {
  operators.lock();
  live = most = 0;
}

void RunningOperator::check() const {
  if (kAddressSanitizer) return;  // which has the guards poisoned
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Allocation& allocation : allocations)
    for (const unsigned char* guard : {allocation.begin - kGuardBytes, allocation.begin + allocation.bytes})
      for (size_t i = 0; i < kGuardBytes; ++i)
        if (guard[i] != kGuard[i % 2])
          throw std::runtime_error("emulator: a kernel wrote beside its memory: at byte " +
                                   std::to_string(guard + i - allocation.begin) + " of a tensor of " +
                                   std::to_string(allocation.bytes) + " bytes");
}

RunningOperator::~RunningOperator() {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Allocation& allocation : allocations)
      if (allocation.released) free_all(allocation.begin);
    allocations.clear();
  }
  operators.unlock();
}

}  // namespace emulator
