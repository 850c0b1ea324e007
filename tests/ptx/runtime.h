// What the host's code and the runtime that runs translated PTX (ptxrun.cpp) share.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

enum Mma {
  kFloat,
  kExact,
  kHardware
};  // sums of tensor-core products: float in the order of k; exact; cut as published

struct Settings {
  uint64_t seed = 0;  // order of blocks, warps and lanes. 0: forward; 1: backward; else shuffled
  int shared_memory_limit = PTX_ARCHITECTURE >= 90 ? 227 << 10 : 163 << 10;
  int slices = 3;  // slices() of csrc/cuda/device.h
  int architecture = PTX_ARCHITECTURE;
  int mma = kFloat;
  bool races =
      false;  // looks for accesses of two warps to a byte of shared memory, one a write, with no barrier between
  bool rough = false;  // ex2.approx and the like as far off as the ISA allows
};
extern Settings settings;
extern std::map<std::string, int64_t> launches;  // by mangled name

// What the launch that follows has to do, where its kernel deals out tiles.
struct TileKind {  // tiles of one level of the maps of one set of losses
  int losses;
  int64_t height, width;
  std::vector<int64_t> tiles;  // [columns of the grid]
  int64_t total;
};
struct Work {
  std::vector<TileKind> kinds;
};
extern Work work;

}  // namespace ptx
