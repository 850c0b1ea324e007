// The losses, step by step: which kernels run, in which order, and where their intermediate results lie.
//
//   pool:      pool, pool_finish                         maps -> anchors, softmax of the channels
//   compare:   compare, distance, finish                 maps, anchors -> losses, gradient of the student's anchors
//   backward:  backward, distance_backward(_few)         gradients of the losses -> gradients of the maps
//
// The forward operators are pool, compare, or both. All maps go through each launch together, kMaxEntries at most.
#pragma once
#include "distance_backward_few.cuh"
#include "distance_few.cuh"

namespace sea {

// The pairs of sets of maps, which all have the same number of levels. losses: the loss flags of each set. teacher and
// gradient have as many maps as student, or none.
inline std::vector<Pair> make_pairs(const std::vector<Map>& student, const std::vector<Map>& teacher,
                                    const std::vector<Map>& gradient, const std::vector<int64_t>& losses) {
  std::vector<Pair> pairs;
  const size_t levels = student.size() / losses.size();
  int64_t first_pixel = 0, first_run = 0;
  for (size_t i = 0; i < student.size(); ++i) {
    Pair pair{};
    const Map& map = pair.student = student[i];
    if (!teacher.empty()) pair.teacher = teacher[i];
    if (!gradient.empty()) pair.gradient = gradient[i];
    pair.batch = map.batch, pair.channels = map.channels, pair.height = map.height, pair.width = map.width;
    pair.losses = static_cast<int32_t>(losses[i / levels]);
    pair.level = static_cast<int32_t>(i % levels);
    if (pair.level == 0) first_pixel = first_run = 0;
    pair.first_pixel = first_pixel;
    pair.first_run = first_run;
    first_pixel += map.pixels();
    first_run += pair.batch * divide_up(pair.image(), 32);
    pairs.push_back(pair);
  }
  return pairs;
}

// -------------------------------------------------------------------------------------------------------------- memory

struct LossOptions {
  double distance_temperature, localization_temperature;
  bool save;             // the pixels' softmax for backward
  bool anchor_gradient;  // from the distances
  int slices;
};

// Numbers of elements of T that the operators pass to each other. They follow from shapes alone, and Python computes
// the same numbers.
//   anchors: of each set with distances [2 sides, levels, masks, channels], of others with anchors their difference,
//     [levels, masks, channels].
//   saved: of each pair with distances the unit anchors of both sides, of each pair with anchors their difference; then
//     of each pair with distances its pixels' softmax.
//   gradients: of each pair with distances that of the student's anchors.
//   softmax: of each pair with localization that of its channels.
//   terms: of each pair with localization its terms of the loss. They are doubles, and Python does not know of them.
struct LossSizes {
  int64_t anchors = 0, saved = 0, gradients = 0, softmax = 0, terms = 0;
};

template <class T>
struct LossMemory {
  T *anchors = nullptr, *saved = nullptr, *gradients = nullptr, *softmax = nullptr;
  double* terms = nullptr;
};

// Points the pairs to their shares of memory. If the memory is null, its elements are only counted. Without
// for_backward the pixels' softmax is not saved.
template <class X>
LossSizes lay_out(std::vector<Pair>& pairs, int64_t levels, int64_t masks, bool for_backward,
                  LossMemory<Compute<X>> memory = {}) {
  LossSizes sizes;
  const auto take = [](auto* base, int64_t& used, int64_t count) {
    auto* out = base ? base + used : nullptr;
    used += count;
    return out;
  };
  for (Pair& pair : pairs) {
    const int64_t table = masks * pair.pitch(), anchors = masks * pair.channels;
    const int sides = pair.losses & kDistance ? 2 : pair.losses & kAnchor ? 1 : 0;
    for (int side = 0; side < sides && memory.anchors; ++side)
      pair.anchors[side] = memory.anchors + sizes.anchors + (side * levels + pair.level) * anchors;
    if (pair.level == levels - 1) sizes.anchors += sides * levels * anchors;
    pair.anchor_pitch = pair.channels;
    pair.table_pitch = pair.pitch();
    if (pair.losses & kDistance) pair.units = take(memory.saved, sizes.saved, 2 * table);
    if (pair.losses & kAnchor) pair.difference = take(memory.saved, sizes.saved, table);
    if (pair.losses & kDistance) pair.anchor_gradient = take(memory.gradients, sizes.gradients, table);
    if (pair.losses & kLocalization) {
      pair.softmax = take(memory.softmax, sizes.softmax, 4 * pair.batch * pair.channels);
      pair.localization_terms = take(memory.terms, sizes.terms, pair.batch * divide_up(pair.channels, kAnchorThreads));
    }
  }
  for (Pair& pair : pairs)
    if (pair.losses & kDistance && for_backward)
      pair.pixel_softmax = take(memory.saved, sizes.saved, pair.batch * pair.image() * PixelSoftmax<X>::kSize);
  return sizes;
}

// ------------------------------------------------------------------------------------------------------------- forward

template <class X>
struct FinishParams {
  using T = Compute<X>;
  Masks masks;
  // Terms of the losses. The first tables hold those of the pairs that take part, in their order.
  const double* anchor;                      // [anchor_count, masks]
  const double* localization;                // [localization_count]
  const double* distance;                    // [slices + entries] of the pyramid
  int64_t anchor_count, localization_count;  // pairs, terms
  T* losses[3];                              // [] anchor, distance, localization; null: not asked for
  bool add;                                  // to what is there already
  Pyramid<ProjectEntry> pyramid;             // of the distances
  const T* moments;                          // [slices + entries, masks, max_channels]; null: none
  T inverse_temperature;                     // of the distances
};

// The losses as the sums of their terms. All threads of the block call it.
template <class X>
__device__ inline void sum_losses(const FinishParams<X>& params) {
  double sum[3] = {0, 0, 0};
  const int64_t masks = params.masks.masks;
  for (int64_t i = threadIdx.x; i < params.anchor_count * masks; i += kAnchorThreads) sum[0] += params.anchor[i];
  for (int i = threadIdx.x / 32; i < params.pyramid.count; i += kAnchorThreads / 32) {  // a warp for each entry
    const float pixels = params.masks.valid_pixels[params.pyramid.entries[i].level];
    const SliceRange range = slices_of(params.pyramid, i);
    for (int64_t s = range.first + threadIdx.x % 32; s <= range.last && pixels > 0; s += 32)
      sum[1] += params.distance[s + i] / pixels;
  }
  for (int64_t i = threadIdx.x; i < params.localization_count; i += kAnchorThreads) sum[2] += params.localization[i];
  for (int i = 0; i < 3; ++i) {
    const double total = sum_over_block(sum[i], reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0 && params.losses[i])
      *params.losses[i] = static_cast<typename FinishParams<X>::T>(total + (params.add ? *params.losses[i] : 0));
  }
}

// Two jobs that share a launch, since they need the same inputs to be ready. Grid: 1 for the losses, then for the
// gradient of the anchors one for each mask of each entry.
template <class X>
__global__ void __launch_bounds__(kAnchorThreads) finish(const __grid_constant__ FinishParams<X> params) {
  using T = Compute<X>;
  if (blockIdx.x == 0) {
    sum_losses(params);
  } else {
    const int64_t masks = params.masks.masks, i = (blockIdx.x - 1) / masks, mask = (blockIdx.x - 1) % masks;
    const int64_t level = params.pyramid.entries[i].level;
    const T divisor = static_cast<T>(params.masks.valid_pixels[level]) * params.masks.area[level * masks + mask];
    project<X>(params.pyramid, i, params.masks, mask, params.moments, params.inverse_temperature, divisor,
               reinterpret_cast<T*>(shared_memory()));
  }
}

// The first half of the forward pass: pools the pairs' anchors and softmax, and finds the localization's terms. A
// counting Carver launches nothing.
template <class X>
void run_loss_pool(const std::vector<Pair>& pairs, const Masks& masks, double localization_temperature, int slices,
                   Carver& scratch, cudaStream_t stream) {
  each_launch(pairs, [&](const std::vector<Pair>& part) {
    scratch.rewind(0);
    run_pool<X>(part, masks, 2, Exponential<X>::scale(localization_temperature), slices, scratch, stream);
  });
}

// The localization loss alone, from the terms of all pairs.
template <class X>
void run_localization(const Masks& masks, const double* terms, int64_t count, Compute<X>* loss, cudaStream_t stream) {
  FinishParams<X> params{masks};
  params.localization = terms;
  params.localization_count = count;
  params.losses[2] = loss;
  launch(finish<X>, "finish", dim3(1), kAnchorThreads, kReduceBytes, stream, params);
}

// The second half for the pairs of one launch. losses: anchor, distance, localization; null: not asked for.
template <class X>
void compare_launch(std::vector<Pair> pairs, const Masks& masks, const LossOptions& options,
                    Compute<X>* const (&losses)[3], bool add, Carver& scratch, cudaStream_t stream) {
  using T = Compute<X>;
  FinishParams<X> last{masks};
  for (Pair& pair : pairs) {
    last.anchor_count += pair.losses & kAnchor ? 1 : 0;
    if (pair.losses & kDistance) pair.inverse_norm = scratch.take<T>(masks.masks);
    if (!losses[2] || !(pair.losses & kLocalization)) continue;
    if (last.localization_count == 0) last.localization = pair.localization_terms;
    last.localization_count += pair.batch * divide_up(pair.channels, kAnchorThreads);
  }
  double* anchor_terms = scratch.take<double>(last.anchor_count * masks.masks);
  last.anchor = anchor_terms;
  for (Pair& pair : pairs)
    if (pair.losses & kAnchor && !scratch.counts())
      pair.anchor_terms = std::exchange(anchor_terms, anchor_terms + masks.masks);
  const auto has_distances = [](const Pair& pair) { return pair.losses & kDistance; };
  const auto distances =
      make_pyramid<DistanceEntry>(pairs, kBlockM<X>, options.slices, has_distances, distance_work<X>);
  double* distance_terms = scratch.take<double>(distances.slices + distances.count);
  const bool gradient = distances.count > 0 && options.anchor_gradient;
  T* moments =
      scratch.take<T>(gradient ? (distances.slices + distances.count) * masks.masks * distances.max_channels : 0);
  if (scratch.counts()) return;

  const CompareParams compared{
      make_pyramid<CompareEntry>(
          pairs, kPoolPixels<X>, options.slices, [](const Pair& pair) { return pair.losses & (kAnchor | kDistance); },
          [](const Pair&) { return TileWork{}; }),
      masks};
  launch(compare<X>, "compare", dim3(static_cast<unsigned>(masks.masks), compared.pyramid.count), kAnchorThreads,
         kReduceBytes, stream, compared);
  if (distances.count > 0) {
    DistanceParams<X> params{distances,
                             masks,
                             choose_few_block<X, DistanceFewMemory<X>>(masks.masks, distances.max_channels),
                             Exponential<X>::scale(options.distance_temperature),
                             gradient ? moments : nullptr,
                             distance_terms,
                             options.save};
    params.few = params.block.n > 0 ? kFewAnchors : -1;
    if constexpr (sizeof(X) == 2)
      if (params.few > 0)
        launch(distance_few<X>, "distance_few", dim3(distances.slices), kMainThreads,
               bytes_of<DistanceFewMemory<X>>(params.block), stream, params);
    if (masks.masks > params.few) {
      params.block = choose_block<X>(masks.masks, distances.max_channels);
      const int64_t groups = gradient ? divide_up(distances.max_channels, params.block.k) : 1;
      launch(distance<X>, "distance", dim3(distances.slices, static_cast<unsigned>(groups)), kMainThreads,
             bytes_of<MainMemory<X>>(params.block), stream, params);
    }
    last.pyramid = make_pyramid<ProjectEntry>(pairs, kBlockM<X>, options.slices, has_distances, distance_work<X>);
    last.distance = distance_terms;
    last.moments = moments;
    last.inverse_temperature = static_cast<T>(1 / options.distance_temperature);
  }
  std::copy(losses, losses + 3, last.losses);
  last.add = add;
  const int64_t blocks = 1 + (gradient ? distances.count * masks.masks : 0);
  launch(finish<X>, "finish", dim3(static_cast<unsigned>(blocks)), kAnchorThreads, kReduceBytes, stream, last);
}

// The second half of the forward pass: compares the anchors, and the pixels with them. A counting Carver launches
// nothing.
template <class X>
void run_loss_compare(const std::vector<Pair>& pairs, const Masks& masks, const LossOptions& options,
                      Compute<X>* const (&losses)[3], Carver& scratch, cudaStream_t stream) {
  bool add = false;
  each_launch(pairs, [&](const std::vector<Pair>& part) {
    scratch.rewind(0);
    compare_launch<X>(part, masks, options, losses, add, scratch, stream);
    add = true;
  });
}

// ------------------------------------------------------------------------------------------------------------ backward

// The gradients of the student's maps. pairs: as lay_out() leaves them, with gradients. upstream: anchor, distance,
// localization; null: that loss has no gradient.
template <class X>
void run_loss_backward(std::vector<Pair> pairs, const Masks& masks, const LossOptions& options,
                       const Compute<X>* const (&upstream)[3], cudaStream_t stream) {
  using T = Compute<X>;
  for (Pair& pair : pairs) {
    pair.losses &= (upstream[0] ? kAnchor : 0) | (upstream[1] ? kDistance : 0) | (upstream[2] ? kLocalization : 0);
    if (!(pair.losses & kDistance)) pair.anchor_gradient = nullptr;
  }
  const Upstream<T> given{upstream[0],
                          upstream[1],
                          upstream[2],
                          static_cast<T>(options.distance_temperature),
                          static_cast<T>(options.localization_temperature),
                          Exponential<X>::scale(options.distance_temperature),
                          Exponential<X>::scale(options.localization_temperature)};
  each_launch(pairs, [&](const std::vector<Pair>& part) {
    run_backward<X>(part, masks, given, kDistance, options.slices, stream);
    DistanceBackwardParams<T> params{
        make_pyramid<DistanceBackwardEntry>(
            part, kBlockM<X>, options.slices, [](const Pair& pair) { return pair.losses & kDistance; },
            distance_work<X>, kBackwardWaves),
        masks,
        {},
        given};
    const auto& pyramid = params.pyramid;
    if (pyramid.count == 0) return;
    params.few = -1;
    if constexpr (sizeof(X) == 2) {
      const auto launch_few = [&](auto kernel, const char* name, auto tiles) {
        using Memory = FewMemory<X, tiles>;
        params.block = choose_few_block<X, Memory>(masks.masks, pyramid.max_channels);
        if (params.block.n == 0) return;
        launch(kernel, name, dim3(pyramid.slices), kMainThreads, bytes_of<Memory>(params.block), stream, params);
        params.few = Memory::kRows - 1;
      };
      launch_few(distance_backward_few<X>, "distance_backward_few", std::integral_constant<int, 2>());
      if (0 < params.few && params.few < masks.masks)
        launch_few(distance_backward_some<X>, "distance_backward_some", std::integral_constant<int, 1>());
    }
    if (masks.masks <= params.few) return;
    params.block = choose_block<X>(masks.masks, pyramid.max_channels);
    launch(distance_backward<X>, "distance_backward",
           dim3(pyramid.slices, static_cast<unsigned>(divide_up(pyramid.max_channels, params.block.k))), kMainThreads,
           bytes_of<MainMemory<X>>(params.block), stream, params);
  });
}

// -------------------------------------------------------------------------------------------------------- anchor_pool

// pairs: the features as students, with the flag kAnchor and anchors [masks, channels]. A counting Carver launches
// nothing.
template <class X>
void run_anchor_pool(const std::vector<Pair>& pairs, const Masks& masks, int slices, Carver& scratch,
                     cudaStream_t stream) {
  each_launch(pairs, [&](const std::vector<Pair>& part) {
    scratch.rewind(0);
    run_pool<X>(part, masks, 1, Compute<X>(0), slices, scratch, stream);
  });
}

// pairs: with gradients and anchor_gradient [masks, channels]; the students lend their shapes.
template <class X>
void run_anchor_pool_backward(const std::vector<Pair>& pairs, const Masks& masks, int slices, cudaStream_t stream) {
  each_launch(pairs, [&](const std::vector<Pair>& part) { run_backward<X>(part, masks, {}, 0, slices, stream); });
}

}  // namespace sea
