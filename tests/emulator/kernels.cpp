// The kernels' host functions for Python: maps as (address, dtype, sizes, strides), everything else as addresses.
#include <cuda/launch.h>

#include <cuda/losses.cuh>

#include "bind.h"
#include "kernels_regions.h"

namespace py = pybind11;

namespace sea {
namespace {

using Address = uintptr_t;
using MapArguments = std::tuple<Address, std::string, std::array<int64_t, 4>, std::array<int64_t, 4>>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float64") return Dtype::float64;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  return Dtype::float32;
}

std::vector<Map> maps(const std::vector<MapArguments>& arguments) {
  std::vector<Map> out;
  for (const auto& [data, dtype, sizes, strides] : arguments)
    out.push_back(make_map(pointer<void>(data), dtype_of(dtype), sizes.data(), strides.data()));
  return out;
}

// [classes, area, counted, extent, bits], then K and the pixels of all levels; none without regions.
Masks masks(const std::vector<int64_t>& regions) {
  if (regions.empty()) return {};
  const auto at = [&](int i) { return static_cast<Address>(regions[i]); };
  return {pointer<const int64_t>(at(0)),    pointer<const float>(at(1)),
          pointer<const float>(at(2)),      pointer<const Extent>(at(3)),
          pointer<const uint32_t>(at(4)),   regions[6],
          static_cast<int32_t>(regions[5]), static_cast<int32_t>(1 + 2 * regions[5])};
}

// Calls f with a value of the type that maps are held in.
template <class F>
auto with_type(const std::string& name, F f) {
  if (name == "float64") return f(double());
  if (name == "float16") return f(__half());
  if (name == "bfloat16") return f(__nv_bfloat16());
  return f(float());
}

struct Loss {
  std::string type;  // of the maps in shared memory
  std::vector<Pair> pairs;
  Masks masks_;
  LossOptions options;

  Loss(std::string type_, const std::vector<MapArguments>& student, const std::vector<MapArguments>& teacher,
       const std::vector<MapArguments>& gradient, const std::vector<int64_t>& parts,
       const std::vector<int64_t>& regions, double distance_temperature, double localization_temperature,
       bool detach_anchors, bool save, int slices)
      : type(type_),
        pairs(make_pairs(maps(student), maps(teacher), maps(gradient), parts)),
        masks_(masks(regions)),
        options{distance_temperature, localization_temperature, detach_anchors, save, slices} {}

  std::array<int64_t, 3> lay_out(const std::array<Address, 3>& saved) {
    return with_type(type, [&](auto zero) {
      using T = Compute<decltype(zero)>;
      const auto sizes = sea::lay_out<decltype(zero)>(
          pairs, masks_.masks, options, {pointer<T>(saved[0]), pointer<T>(saved[1]), pointer<T>(saved[2])});
      return std::array<int64_t, 3>{sizes.kept, sizes.gradients, sizes.softmax};
    });
  }
  // The parts of the losses that lie between: 1: pooling alone, 2: all else.
  void only(int step) { options.anchors = step == 1 ? Anchors::written : Anchors::given; }
  int64_t lay_out_anchors(int64_t levels, Address anchors) {
    return with_type(type, [&](auto zero) {
      using T = Compute<decltype(zero)>;
      return sea::lay_out_anchors(pairs, levels, masks_.masks, pointer<T>(anchors));
    });
  }
  int64_t scratch() {
    return with_type(type, [&](auto zero) { return forward_scratch<decltype(zero)>(pairs, masks_, options); });
  }
  void forward(Address scratch, const std::array<Address, 3>& losses) {
    with_type(type, [&](auto zero) {
      using T = Compute<decltype(zero)>;
      T* const out[3] = {pointer<T>(losses[0]), pointer<T>(losses[1]), pointer<T>(losses[2])};
      run_forward<decltype(zero)>(pairs, masks_, options, pointer<void>(scratch), out, nullptr);
    });
  }
  void backward(const std::array<Address, 3>& upstream) {
    with_type(type, [&](auto zero) {
      using T = Compute<decltype(zero)>;
      const T* const in[3] = {pointer<T>(upstream[0]), pointer<T>(upstream[1]), pointer<T>(upstream[2])};
      run_backward<decltype(zero)>(pairs, masks_, options, in, nullptr);
    });
  }
};

int64_t pool_scratch_of(const std::string& type, const std::vector<MapArguments>& features,
                        const std::vector<int64_t>& regions, int slices) {
  const std::vector<Pair> pairs = make_pairs(maps(features), {}, {}, {kAnchor});
  return with_type(type, [&](auto zero) { return pool_scratch<decltype(zero)>(pairs, masks(regions), slices); });
}

void pool_of(const std::string& type, const std::vector<MapArguments>& features, const std::vector<int64_t>& regions,
             int slices, Address scratch, Address anchors) {
  const std::vector<Pair> pairs = make_pairs(maps(features), {}, {}, {kAnchor});
  with_type(type, [&](auto zero) {
    using T = Compute<decltype(zero)>;
    run_pool_anchors<decltype(zero)>(pairs, masks(regions), slices, pointer<void>(scratch), pointer<T>(anchors),
                                     nullptr);
  });
}

void pool_backward_of(const std::string& type, Address anchors, const std::vector<MapArguments>& gradients,
                      const std::vector<int64_t>& regions, int slices) {
  const std::vector<Map> out = maps(gradients);
  with_type(type, [&](auto zero) {
    using T = Compute<decltype(zero)>;
    run_pool_backward<decltype(zero)>(out, masks(regions), slices, pointer<T>(anchors), nullptr);
  });
}

int64_t cosine_scratch_of(const std::string& type, const std::vector<MapArguments>& features,
                          const std::vector<int64_t>& regions, int slices, bool gradient) {
  const std::vector<Pair> pairs = make_pairs(maps(features), {}, {}, {kDistance});
  return type == "float64" ? cosine_scratch<double>(pairs, masks(regions), slices, gradient)
                           : cosine_scratch<float>(pairs, masks(regions), slices, gradient);
}

void cosine_of(const std::string& type, const std::vector<MapArguments>& features,
               const std::vector<MapArguments>& cosines, const std::vector<MapArguments>& gradients,
               const std::vector<int64_t>& regions, int slices, Address scratch, Address anchors,
               Address anchor_gradient) {
  const bool backward = anchor_gradient != 0;
  const std::vector<Pair> pairs = make_pairs(maps(features), backward ? maps(cosines) : std::vector<Map>(),
                                             maps(backward ? gradients : cosines), {kDistance});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    run_cosine<T>(pairs, masks(regions), slices, pointer<void>(scratch), pointer<T>(anchors),
                  pointer<T>(anchor_gradient), nullptr);
  };
  type == "float64" ? run(0.) : run(0.f);
}

}  // namespace
}  // namespace sea

PYBIND11_MODULE(kernels, module) {
  emulator::bind(module);
  emulator::bind_regions(module);
  py::class_<sea::Loss>(module, "Loss", py::module_local())
      .def(py::init<std::string, const std::vector<sea::MapArguments>&, const std::vector<sea::MapArguments>&,
                    const std::vector<sea::MapArguments>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                    double, double, bool, bool, int>())
      .def("lay_out", &sea::Loss::lay_out)
      .def("only", &sea::Loss::only)
      .def("lay_out_anchors", &sea::Loss::lay_out_anchors)
      .def("scratch", &sea::Loss::scratch)
      .def("forward", &sea::Loss::forward)
      .def("backward", &sea::Loss::backward);
  module.def("pool_scratch", &sea::pool_scratch_of);
  module.def("pool", &sea::pool_of);
  module.def("pool_backward", &sea::pool_backward_of);
  module.def("cosine_scratch", &sea::cosine_scratch_of);
  module.def("cosine", &sea::cosine_of);
}
