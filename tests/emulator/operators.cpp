// The operators of csrc/cuda/ops as a Python module, which puts them in the place of the CPU's and takes them away
// again.
#include <bind.h>
#include <cuda/device.h>

PYBIND11_MODULE(operators, module) {
  using torch::stable::detail::StableLibrary;
  emulator::bind(module);
  static std::vector<std::unique_ptr<StableLibrary>>& installed = *new std::vector<std::unique_ptr<StableLibrary>>;
  module.def("install", [] {
    for (const emulator::Register register_operators : emulator::registrations) {
      installed.push_back(
          std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "sea_kernels", "CPU", __FILE__, __LINE__));
      register_operators(*installed.back());
    }
  });
  module.def("uninstall", [] { installed.clear(); });
  module.def("peak_bytes", &emulator::peak_bytes);
}
