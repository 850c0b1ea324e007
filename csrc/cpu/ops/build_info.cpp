// Which instruction set runs, and the report of what was built. SEA_BUILD_INFO: what setup.py says about CUDA, as
// members of a JSON object.
#include <cpu/kernels.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

namespace sea {

namespace baseline {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace baseline
#ifdef SEA_X86
namespace avx2 {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace avx512
#endif

namespace {

struct Isa {
  const char* name;
  bool available;
  const Kernels<float>* kernels_float;
  const Kernels<double>* kernels_double;
};

const Isa* list() {
  static const Isa all[] = {
      {"baseline", true, &baseline::kernels_float, &baseline::kernels_double},
#ifdef SEA_X86
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       &avx2::kernels_float, &avx2::kernels_double},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       &avx512::kernels_float, &avx512::kernels_double},
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
const Kernels<float>& kernels<float>() {
  return *in_use().kernels_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return *in_use().kernels_double;
}

}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&sea::build_info));
}
