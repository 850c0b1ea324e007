// What every module of emulated kernels gives to Python besides its kernels. Modules stand side by side in one process:
// bind no classes, or bind them py::module_local().
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

namespace emulator {

inline void bind(pybind11::module_& module) {
  namespace py = pybind11;
  // Sets what is given; everything else gets its default.
  module.def(
      "settings",
      [](uint64_t seed, size_t shared_memory_limit, bool empty_grid_is_error, int slices) {
        settings = {seed, shared_memory_limit, empty_grid_is_error, slices};
      },
      py::kw_only(), py::arg("seed") = Settings().seed, py::arg("shared_memory_limit") = Settings().shared_memory_limit,
      py::arg("empty_grid_is_error") = Settings().empty_grid_is_error, py::arg("slices") = Settings().slices);
  // The launches since the last call, by kernel name.
  module.def("launches", [] { return std::exchange(launches, {}); });
}

}  // namespace emulator
