// Stands in for csrc/cuda/device.h: the emulator's, whose memory and one stream serve here as well.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>

#include "../runtime.h"

struct CUstream_st {};

namespace emulator {
inline CUstream_st the_stream;
inline cudaStream_t stream = nullptr;
inline ptx::Settings& settings = ptx::settings;
[[noreturn]] inline void fail(const char* text) { throw std::runtime_error(std::string("ptx: ") + text); }
}  // namespace emulator

#include "../../emulator/cuda/device.h"
