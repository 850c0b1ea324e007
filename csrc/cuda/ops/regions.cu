// The operator rasterize: regions from boxes on a GPU.
#include <cuda/regions.cuh>

#include "tensors.h"

namespace sea {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> regions(
    Tensor boxes, Tensor labels, std::optional<Tensor> batch_index, std::vector<int64_t> counts,
    std::optional<Tensor> ignore_boxes, std::optional<Tensor> ignore_batch_index, std::vector<int64_t> ignore_counts,
    std::optional<Tensor> image_sizes, std::vector<int64_t> image_size_list, int64_t batch_size,
    std::vector<int64_t> level_shapes, std::vector<double> strides, int64_t num_classes, double center_ratio,
    std::optional<Tensor> present) {
  const OnDevice on(boxes);
  return with_compute_type(any_double(boxes), [&](auto zero) {
    using T = decltype(zero);
    const auto list = [](const std::vector<int64_t>& x) { return x.empty() ? nullptr : x.data(); };
    RasterInput<T> in{};
    in.boxes = {data<T>(boxes), labels.numel(), data<int64_t>(batch_index), batch_index ? nullptr : list(counts)};
    if (ignore_boxes)
      in.ignored = {data<T>(*ignore_boxes), ignore_boxes->size(0), data<int64_t>(ignore_batch_index),
                    ignore_batch_index ? nullptr : list(ignore_counts)};
    in.labels = data<int64_t>(labels);
    in.sizes = data<int64_t>(image_sizes);
    in.size_list = image_sizes ? nullptr : list(image_size_list);
    in.batch = batch_size;
    in.levels = static_cast<int64_t>(level_shapes.size()) / 2;
    in.shapes = level_shapes.data();
    in.strides = strides.data();
    in.num_classes = num_classes;
    in.center_ratio = center_ratio;
    in.present = data<bool>(present);

    const Tensor classes = make({in.capacity()}, ScalarType::Long, boxes);
    const Tensor area = make({in.levels, in.masks()}, ScalarType::Float, boxes);
    const Tensor counted = make({in.levels}, ScalarType::Float, boxes);
    const Tensor extent = make({in.levels, batch_size, 2}, ScalarType::Int, boxes);
    const Tensor bits = make({in.words() * in.pixels()}, ScalarType::Int, boxes);
    const Tensor runs = make({3 * in.run_words()}, ScalarType::Int, boxes);
    const RasterOutput out{data<int64_t>(classes), data<float>(area),   data<float>(counted),
                           data<Extent>(extent),   data<int32_t>(bits), data<RunWord>(runs)};
    with_scratch(boxes, [&](Carver& scratch) { rasterize(in, out, scratch, on.stream()); });
    return std::make_tuple(classes, area, counted, extent, bits, runs);
  });
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, SEA_DEVICE, library) { library.impl("rasterize", TORCH_BOX(&sea::regions)); }
