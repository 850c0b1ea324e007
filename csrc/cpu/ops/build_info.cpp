// Which instruction set runs, and the report of what was built. SEA_BUILD_INFO: what setup.py says of CUDA, members in
// JSON.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include <cpu/loops.h>

namespace sea {

namespace baseline {
extern const Loops<float> loops_float;
extern const Loops<double> loops_double;
}  // namespace baseline
#ifdef SEA_X86
namespace avx2 {
extern const Loops<float> loops_float;
extern const Loops<double> loops_double;
}  // namespace avx2
namespace avx512 {
extern const Loops<float> loops_float;
extern const Loops<double> loops_double;
}  // namespace avx512
#endif

namespace {

struct Isa {
  const char* name;
  bool available;
  const Loops<float>* loops_float;
  const Loops<double>* loops_double;
};

const Isa* list() {
  static const Isa all[] = {
      {"baseline", true, &baseline::loops_float, &baseline::loops_double},
#ifdef SEA_X86
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       &avx2::loops_float, &avx2::loops_double},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       &avx512::loops_float, &avx512::loops_double},
#endif
      {nullptr, false, nullptr, nullptr},
  };
  return all;
}

// SEA_KERNELS_CPU was checked against the report when the package was imported; an unknown name falls back to the best.
const Isa& in_use() {
  static const Isa& chosen = []() -> const Isa& {
    const char* wish = std::getenv("SEA_KERNELS_CPU");
    const Isa* best = list();
    for (const Isa* isa = list(); isa->name; ++isa) {
      if (!isa->available) continue;
      best = isa;
      if (wish && std::string(wish) == isa->name) break;
    }
    return *best;
  }();
  return chosen;
}

std::string build_info() {
  std::string built, available;
  for (const Isa* isa = list(); isa->name; ++isa) {
    built += std::string(built.empty() ? "\"" : ", \"") + isa->name + "\"";
    if (isa->available) available += std::string(available.empty() ? "\"" : ", \"") + isa->name + "\"";
  }
  return "{\"cpu\": [" + built + "], \"cpu_available\": [" + available + "], \"cpu_in_use\": \"" + in_use().name +
         "\", " + SEA_BUILD_INFO + "}";
}

}  // namespace

template <>
const Loops<float>& loops<float>() {
  return *in_use().loops_float;
}
template <>
const Loops<double>& loops<double>() {
  return *in_use().loops_double;
}

}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&sea::build_info));
}
