// What is noted while kernels run (PTXRUN_COUNT): the basic blocks that a thread enters, and what it accesses in
// memory. ptxcount.cpp makes warps' counts of it, count.py a report.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "runtime.h"

namespace ptx {

struct Noted {
  uint64_t address;  // of shared memory: the offset
  uint32_t line;
  uint16_t size;
  uint8_t kind;
};
enum Kind : int { kGlobal = 8, kMatrices = 16 };  // added to an access; of shared memory nothing is added

namespace counts {

// Of the running lane: where the next entry goes, and the end of the room.
extern uint16_t *trace, *trace_end;
extern Noted *note, *note_end;
void grow_trace() __attribute__((cold));
void grow_notes() __attribute__((cold));

void resume(int lane);
void suspend(int lane);
void fold(int first, int lanes);  // all lanes of a warp are at one place
void begin(const std::string& kernel, const unsigned* grid, const unsigned* block, uint64_t shared,
           const std::vector<TileKind>& kinds);
void block(uint64_t number);
bool wanted(uint64_t number);
bool skips_products();  // where results are wrong anyway, matrix products leave their sums as they are

}  // namespace counts

inline void enter(int block) {
  if (__builtin_expect(counts::trace == counts::trace_end, 0)) counts::grow_trace();
  *counts::trace++ = static_cast<uint16_t>(block);
}
inline void note_memory(int line, uint64_t address, unsigned size, int kind) {
  if (__builtin_expect(counts::note == counts::note_end, 0)) counts::grow_notes();
  *counts::note++ = {address, static_cast<uint32_t>(line), static_cast<uint16_t>(size), static_cast<uint8_t>(kind)};
}

}  // namespace ptx

#define PTXRUN_NOTE(line, address, size, kind) ::ptx::note_memory(line, address, size, kind)
