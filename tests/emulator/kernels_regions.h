// The host function of csrc/regions.cuh for Python: pointers as integers, 0 for none; lists as the operator has them.
#pragma once
#include <cuda/regions.cuh>

#include "bind.h"

namespace emulator {

// (boxes, count, image of each, number in each image); an empty list counts as none
using BoxArguments = std::tuple<uintptr_t, int64_t, uintptr_t, std::vector<int64_t>>;

template <class T>
void rasterize(const BoxArguments& boxes, const BoxArguments& ignored, uintptr_t labels, uintptr_t sizes,
               const std::vector<int64_t>& size_list, int64_t batch, const std::vector<int64_t>& shapes,
               const std::vector<double>& strides, int64_t num_classes, double center_ratio, uintptr_t present,
               const std::array<uintptr_t, 6>& out) {  // classes, area, counted, extent, bits, scratch
  const auto list = [](const std::vector<int64_t>& x) { return x.empty() ? nullptr : x.data(); };
  const auto box_list = [&](const BoxArguments& x) {
    return sea::BoxList<T>{reinterpret_cast<const T*>(std::get<0>(x)), std::get<1>(x),
                           reinterpret_cast<const int64_t*>(std::get<2>(x)), list(std::get<3>(x))};
  };
  const sea::RasterInput<T> in{box_list(boxes),
                               box_list(ignored),
                               reinterpret_cast<const int64_t*>(labels),
                               reinterpret_cast<const int64_t*>(sizes),
                               list(size_list),
                               batch,
                               static_cast<int64_t>(shapes.size()) / 2,
                               shapes.data(),
                               strides.data(),
                               num_classes,
                               center_ratio,
                               reinterpret_cast<const bool*>(present)};
  const sea::RasterOutput output{reinterpret_cast<int64_t*>(out[0]), reinterpret_cast<float*>(out[1]),
                                 reinterpret_cast<float*>(out[2]), reinterpret_cast<sea::Extent*>(out[3]),
                                 reinterpret_cast<int32_t*>(out[4])};
  sea::rasterize(in, output, reinterpret_cast<void*>(out[5]), nullptr);
}

inline void bind_regions(pybind11::module_& module) {
  module.def("rasterize_float32", &rasterize<float>);
  module.def("rasterize_float64", &rasterize<double>);
  module.def("raster_scratch", [](int64_t boxes, int64_t num_classes, int64_t levels, uintptr_t present) {
    sea::RasterInput<float> in{};
    in.boxes.count = boxes, in.num_classes = num_classes, in.levels = levels;
    in.present = reinterpret_cast<const bool*>(present);
    return sea::raster_scratch(in);
  });
}

}  // namespace emulator
