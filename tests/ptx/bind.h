// Stands in for tests/emulator/bind.h: what the module gives to Python besides the operators.
#pragma once
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "../emulator/memory.h"
#include "runtime.h"

namespace emulator {

inline ptx::Mma mma_of(const std::string& name) {
  if (name == "float") return ptx::kFloat;
  if (name == "exact") return ptx::kExact;
  if (name == "hardware") return ptx::kHardware;
  throw std::invalid_argument("PTXRUN_MMA is float, exact or hardware; it is " + name);
}
inline std::string environment(const char* name, const char* otherwise) {
  const char* const value = std::getenv(name);
  return value ? value : otherwise;
}

// "pool" of void sea::pool<float>(...)
inline std::string short_name(const std::string& mangled) {
  int status = 0;
  char* const text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  name = name.substr(0, name.find_first_of("<("));
  const size_t begin = name.find_last_of(": ");
  return begin == std::string::npos ? name : name.substr(begin + 1);
}

inline void bind(pybind11::module_& module) {
  namespace py = pybind11;
  const ptx::Settings defaults;
  module.def(
      "settings",
      [](uint64_t seed, int shared_memory_limit, bool, int slices, const std::string& mma, bool rough, bool races,
         size_t largest_filled) {
        ptx::settings.seed = seed;
        ptx::settings.shared_memory_limit = shared_memory_limit;
        ptx::settings.slices = slices;
        ptx::settings.mma = mma_of(mma);
        ptx::settings.rough = rough;
        ptx::settings.races = races;
        emulator::largest_filled = largest_filled;
      },
      py::kw_only(), py::arg("seed") = defaults.seed, py::arg("shared_memory_limit") = defaults.shared_memory_limit,
      py::arg("empty_grid_is_error") = false, py::arg("slices") = defaults.slices,
      py::arg("mma") = environment("PTXRUN_MMA", "float"), py::arg("rough") = environment("PTXRUN_ROUGH", "0") != "0",
      py::arg("races") = environment("PTXRUN_RACES", "0") != "0", py::arg("largest_filled") = SIZE_MAX);
  module.def("launches", [] {
    std::map<std::string, int64_t> out;
    for (const auto& [name, count] : std::exchange(ptx::launches, {})) out[short_name(name)] += count;
    return out;
  });
  module.attr("settings")();
}

}  // namespace emulator
