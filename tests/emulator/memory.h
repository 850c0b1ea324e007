// Global memory: what the operators allocate lies between guards, and is full of 0xFF (NaN, -1) until it is written.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

void* allocate(size_t bytes);
inline size_t largest_filled = SIZE_MAX;  // what has more bytes is not filled
void release(void* memory);               // any thread may call it
size_t peak_bytes();                      // the most that the last operator held at one time

// An operator that runs; others wait for its end. What it allocates is held while it lives, also what is released, so
// that check() can look at the guards.
class RunningOperator {
 public:
  RunningOperator();
  RunningOperator(const RunningOperator&) = delete;
  ~RunningOperator();
  void check() const;  // throws std::runtime_error where something was written beside an allocation
};

}  // namespace emulator
