#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

// By the linker: where this library, its constants and its variables lie.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

namespace emulator::races {
namespace {

struct Access {
  uint32_t phase = 0;       // of the launch: grows at every block's start and barrier. 0: no access
  uint32_t warp_phase = 0;  // of the warp: grows at every __syncwarp
  uint32_t code = 0;        // in bytes from the start of this library
  uint16_t thread = 0;
  bool write = false, atomic = false;
};

// The last write of a byte, and since then the last read and, before that, the last by another lane of the same warp
// and the last from another warp: whoever writes next, one of them is another thread's, if there is any.
struct Byte {
  Access write, read, lane_read, warp_read;
};

constexpr uintptr_t kPageBytes = 4096;
using Page = std::array<Byte, kPageBytes>;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* page = nullptr;  // the last one that was asked for
uintptr_t page_number = 0;

struct Start {
  uint32_t phase;
  uint3 block;
};
std::vector<Start> starts;  // of the launch's blocks, in their order
uint32_t phase = 0;
std::array<uint32_t, 32> warp_phases;

Byte& byte_at(uintptr_t address) {
  if (!page || page_number != address / kPageBytes) {
    page_number = address / kPageBytes;
    auto& found = pages[page_number];
    if (!found) found = std::make_unique<Page>();
    page = found.get();
  }
  return (*page)[address % kPageBytes];
}

bool ordered(const Access& before, const Access& now, bool shared) {
  if (before.phase == 0 || (before.atomic && now.atomic)) return true;
  if (before.phase < starts.back().phase) return shared;  // of another block, with its own shared memory
  return before.phase < now.phase || before.thread == now.thread ||
         (before.thread / warpSize == now.thread / warpSize && before.warp_phase < now.warp_phase);
}

// Where an access is in the source: file:line, and of an inlined function where that was called.
std::string text_of(const Access& access) {
  std::string text = access.atomic ? "an atomic change at " : access.write ? "a write at " : "a read at ";
  Dl_info library;
  char command[4096], line[512];
  if (!dladdr(__ehdr_start, &library)) return text + "?";
  std::snprintf(command, sizeof command, "addr2line -sie '%s' %#x", library.dli_fname, access.code - 1);
  FILE* lines = popen(command, "r");
  const char* separator = "";
  while (lines && std::fgets(line, sizeof line, lines)) {
    text += separator + std::string(line, std::strcspn(line, " \n"));
    separator = " in ";
  }
  if (lines) pclose(lines);
  return text;
}

[[noreturn]] void report(const Access& before, const Access& now, const void* pointer, bool shared) {
  auto later = [](uint32_t phase, const Start& start) { return phase < start.phase; };
  const uint3 block = std::prev(std::upper_bound(starts.begin(), starts.end(), before.phase, later))->block;
  char place[64];
  if (shared)
    std::snprintf(place, sizeof place, "byte %td of shared memory",
                  static_cast<const unsigned char*>(pointer) - shared_memory());
  else
    std::snprintf(place, sizeof place, "global memory (%p)", pointer);
  fail("race on %s: %s; by thread %d of block (%u, %u, %u) %s", place, text_of(now).c_str(), before.thread, block.x,
       block.y, block.z, text_of(before).c_str());
}

}  // namespace

void start_launch() {
  pages.clear();
  page = nullptr;
  starts.clear();
  phase = 0;
  warp_phases.fill(0);
}

void start_block() { starts.push_back({++phase, blockIdx}); }

void barrier() { ++phase; }

void sync_warp(int warp) { ++warp_phases[warp]; }

void access(const void* pointer, size_t bytes, bool write, const void* code) {
  const Memory memory = memory_of(pointer);
  if (memory == Memory::kPrivate || (in_atomic && !write)) return;  // an atomic change is a write
  const auto address = reinterpret_cast<uintptr_t>(pointer), library = reinterpret_cast<uintptr_t>(__ehdr_start);
  if (address >= library && address < reinterpret_cast<uintptr_t>(_end)) return;
  const bool shared = memory == Memory::kShared;
  const Access now = {phase,
                      warp_phases[threadIdx.x / warpSize],
                      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - library),
                      static_cast<uint16_t>(threadIdx.x),
                      write,
                      in_atomic};
  for (size_t i = 0; i < bytes; ++i) {
    Byte& byte = byte_at(address + i);
    auto check = [&](const Access& before) {
      if (!ordered(before, now, shared)) report(before, now, static_cast<const char*>(pointer) + i, shared);
    };
    check(byte.write);
    if (write) {
      for (const Access* before : {&byte.read, &byte.lane_read, &byte.warp_read}) check(*before);
      byte = {now, {}, {}, {}};
    } else {
      const bool same_block = byte.read.phase >= starts.back().phase;
      const bool same_warp = same_block && byte.read.thread / warpSize == now.thread / warpSize;
      if (!same_warp)
        byte.warp_read = byte.read;
      else if (byte.read.thread != now.thread)
        byte.lane_read = byte.read;
      byte.read = now;
    }
  }
}

}  // namespace emulator::races

// ThreadSanitizer's runtime, as far as kernels and pybind11 call it.
namespace {
template <size_t kBytes, bool kWrite>
void access(const void* pointer, const void* code) {
  emulator::races::access(pointer, kBytes, kWrite, code);
}
}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read1(void* p) { access<1, false>(p, __builtin_return_address(0)); }
void __tsan_read2(void* p) { access<2, false>(p, __builtin_return_address(0)); }
void __tsan_read4(void* p) { access<4, false>(p, __builtin_return_address(0)); }
void __tsan_read8(void* p) { access<8, false>(p, __builtin_return_address(0)); }
void __tsan_read16(void* p) { access<16, false>(p, __builtin_return_address(0)); }
void __tsan_write1(void* p) { access<1, true>(p, __builtin_return_address(0)); }
void __tsan_write2(void* p) { access<2, true>(p, __builtin_return_address(0)); }
void __tsan_write4(void* p) { access<4, true>(p, __builtin_return_address(0)); }
void __tsan_write8(void* p) { access<8, true>(p, __builtin_return_address(0)); }
void __tsan_write16(void* p) { access<16, true>(p, __builtin_return_address(0)); }
void __tsan_read_range(void* p, size_t bytes) { emulator::races::access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { emulator::races::access(p, bytes, true, __builtin_return_address(0)); }
char __tsan_atomic8_load(const char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(int* p, int value, int) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }
}
