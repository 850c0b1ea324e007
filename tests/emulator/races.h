// Finds races: accesses to the same byte that nothing orders, at least one of them a write. In a module built with
// races, g++ -fsanitize=thread has put a call into races.cpp in front of every access of a kernel; else all this does
// nothing.
#pragma once
#include <cstddef>

namespace emulator::races {

#ifdef RACES
void start_launch();
void start_block();
void barrier();            // of the block
void sync_warp(int warp);  // by __syncwarp; nothing else that a warp does together orders its accesses
// An access by the running thread. `code` is an address in the machine code of its line.
void access(const void* pointer, size_t bytes, bool write, const void* code);
#else
inline void start_launch() {}
inline void start_block() {}
inline void barrier() {}
inline void sync_warp(int) {}
inline void access(const void*, size_t, bool, const void*) {}
#endif

}  // namespace emulator::races
