// The losses, step by step: which kernels run on which maps, and where what they hand each other lies.
#pragma once
#include <algorithm>
#include <vector>

#include "backward.cuh"
#include "cosine.cuh"

namespace sea {

// Memory handed out piece by piece; with no memory it counts what would be needed.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* out = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
    most_ = std::max(most_, used_);
    return out;
  }
  int64_t used() const { return used_; }
  int64_t most() const { return most_; }
  void release(int64_t used) { used_ = used; }

 private:
  char* base_;
  int64_t used_ = 0, most_ = 0;
};

// The pairs of sets of maps, each of `levels` maps; gradient may be empty.
inline std::vector<Pair> make_pairs(const std::vector<Map>& student, const std::vector<Map>& teacher,
                                    const std::vector<Map>& gradient, const std::vector<int64_t>& parts) {
  std::vector<Pair> pairs;
  const size_t levels = student.size() / parts.size();
  int64_t first_pixel = 0;
  for (size_t i = 0; i < student.size(); ++i) {
    Pair pair{};
    pair.student = student[i];
    if (!teacher.empty()) pair.teacher = teacher[i];
    if (!gradient.empty()) pair.gradient = gradient[i];
    pair.parts = parts[i / levels];
    pair.level = static_cast<int32_t>(i % levels);
    pair.first_pixel = first_pixel = pair.level == 0 ? 0 : first_pixel;
    first_pixel += pair.student.pixels();
    pairs.push_back(pair);
  }
  return pairs;
}

// The pyramid of those of up to kMostPairs pairs that take part.
template <class Takes>
Pyramid make_pyramid(const Pair* pairs, int64_t count, int tile_pixels, int slices, Takes takes) {
  Pyramid out{};
  for (int64_t i = 0; i < count; ++i) {
    if (!takes(pairs[i])) continue;
    if (pairs[i].image() > INT32_MAX - 128) throw std::runtime_error("sea_kernels: a map of 2^31 pixels or more");
    Pair& pair = out.pairs[out.count++] = pairs[i];
    pair.first_tile = out.tiles;
    out.batch = pair.student.batch;
    out.tiles += pair.student.batch * divide_up(pair.image(), tile_pixels);
    out.most_channels = std::max(out.most_channels, pair.student.channels);
  }
  out.slices = static_cast<int32_t>(std::min<int64_t>(out.tiles, slices));
  return out;
}

// Calls f(first pair, number of pairs) for as many launches as it takes.
template <class F>
void each_launch(const std::vector<Pair>& pairs, F f) {
  for (size_t i = 0; i < pairs.size(); i += kMostPairs)
    f(pairs.data() + i, static_cast<int64_t>(std::min<size_t>(kMostPairs, pairs.size() - i)));
}

struct LossOptions {
  double distance_temperature, localization_temperature;
  bool detach_anchors, save;
  int slices;
  Anchors anchors = Anchors::used;  // written: pooling and localization alone; given: without them
};

// What forward saves for backward, elements of T; its sizes come from shapes alone.
//   kept: of each pair with distances the unit anchors of both sides, of each pair with anchors their difference; then
//   of each pair with distances its pixels' softmax. gradients: of the student's anchors, from the distances. softmax:
//   of the localization.
template <class T>
struct Saved {
  T *kept, *gradients, *softmax;
};

struct SavedSizes {
  int64_t kept = 0, gradients = 0, softmax = 0;
};

// Points the pairs to their shares; with null pointers it counts.
template <class X>
SavedSizes lay_out(std::vector<Pair>& pairs, int64_t masks, const LossOptions& options, Saved<Compute<X>> saved) {
  SavedSizes sizes;
  const auto take = [](auto* base, int64_t& used, int64_t count) {
    auto* out = base ? base + used : nullptr;
    used += count;
    return out;
  };
  for (Pair& pair : pairs) {
    const int64_t table = masks * pair.pitch();
    if (pair.parts & kDistance) pair.units = take(saved.kept, sizes.kept, 2 * table);
    if (pair.parts & kAnchor) pair.difference = take(saved.kept, sizes.kept, table);
    if (pair.parts & kDistance && !options.detach_anchors) pair.through = take(saved.gradients, sizes.gradients, table);
    if (pair.parts & kLocalization)
      pair.softmax = take(saved.softmax, sizes.softmax, 4 * pair.student.batch * pair.student.channels);
  }
  for (Pair& pair : pairs)
    if (pair.parts & kDistance)
      pair.statistics = take(saved.kept, sizes.kept, pair.student.pixels() * PixelSoftmax<X>::kSize);
  return sizes;
}

// Points the pairs to the anchors of the sets that have any, one after the other: [sides, levels, masks, channels],
// both sides where there are distances, else the difference alone. Returns their number; with a null pointer it counts.
template <class T>
int64_t lay_out_anchors(std::vector<Pair>& pairs, int64_t levels, int64_t masks, T* anchors) {
  int64_t used = 0;
  for (Pair& pair : pairs) {
    const int sides = pair.parts & kDistance ? 2 : pair.parts & kAnchor ? 1 : 0;
    const int64_t table = masks * pair.student.channels;
    for (int side = 0; side < sides && anchors; ++side)
      pair.anchors[side] = anchors + used + (side * levels + pair.level) * table;
    if (pair.level == levels - 1) used += sides * levels * table;
  }
  return used;
}

// The losses as sums of their terms. Grid: one block.
template <class T>
struct FinishParams {
  Pyramid pyramid, distances;
  Masks masks;
  const double* anchor;        // [pairs, masks]
  const double* localization;  // [pairs, blocks]
  const double* distance;      // [slices + pairs] of the pyramid of the distances
  int64_t blocks;
  T* losses[3];  // null: not asked for
  bool add;
};

template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish(const __grid_constant__ FinishParams<T> params) {
  double sum[3] = {0, 0, 0};
  const int64_t masks = params.masks.masks;
  for (int i = 0; i < params.pyramid.count; ++i) {
    const Pair& pair = params.pyramid.pairs[i];
    if (params.losses[0] && pair.parts & kAnchor)
      for (int64_t p = threadIdx.x; p < masks; p += kFinishThreads) sum[0] += params.anchor[i * masks + p];
    if (params.losses[2] && pair.parts & kLocalization)
      for (int64_t k = threadIdx.x; k < params.blocks; k += kFinishThreads)
        sum[2] += params.localization[i * params.blocks + k];
  }
  const Pyramid& pyramid = params.distances;
  for (int i = 0; i < pyramid.count; ++i) {
    const float counted = params.masks.counted[pyramid.pairs[i].level];
    const int64_t end = i + 1 < pyramid.count ? pyramid.pairs[i + 1].first_tile : pyramid.tiles;
    if (!(counted > 0) || end == pyramid.pairs[i].first_tile) continue;
    for (int64_t s = slice_of(pyramid, pyramid.pairs[i].first_tile) + threadIdx.x; s <= slice_of(pyramid, end - 1);
         s += kFinishThreads)
      sum[1] += params.distance[s + i] / counted;
  }
  for (int i = 0; i < 3; ++i) {
    const double total = sum_over_block(sum[i], reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0 && params.losses[i])
      *params.losses[i] = static_cast<T>(total + (params.add ? *params.losses[i] : 0));
  }
}

// One launch's worth of pairs. losses: anchor, distance, localization.
template <class X>
void forward_part(const Pair* given, int64_t count, const Masks& masks, const LossOptions& options, Arena& arena,
                  Compute<X>* const* losses, bool add, bool dry, cudaStream_t stream) {
  using T = Compute<X>;
  std::vector<Pair> pairs(given, given + count);
  for (Pair& pair : pairs)
    if (pair.parts & kDistance) pair.inverse_norm = arena.take<T>(masks.masks);
  const Pyramid all =
      make_pyramid(pairs.data(), count, kPoolPixels<X>, options.slices, [](const Pair&) { return true; });
  const Pyramid distances =
      make_pyramid(pairs.data(), count, kDistancePixels<X>, options.slices,
                   [&](const Pair& pair) { return pair.parts & kDistance && options.anchors != Anchors::written; });
  const int64_t blocks = all.batch * divide_up(all.most_channels, kFinishThreads);
  FinishParams<T> last{all, distances, masks, {}, {}, {}, blocks, {losses[0], losses[1], losses[2]}, add};
  double* anchor = arena.take<double>(count * masks.masks);
  double* localization = arena.take<double>(count * blocks);
  double* distance_terms = arena.take<double>(distances.slices + distances.count);

  const int64_t start = arena.used();
  const bool pools = options.anchors != Anchors::given;
  PoolParams<T> pooling{all, masks, Exponential<X>::scale(options.localization_temperature), nullptr, nullptr,
                        2,   false};
  pooling.sums = arena.take<T>(pools ? (all.slices + all.count) * 2 * masks.masks * all.most_channels : 0);
  pooling.softmax = arena.take<T>(pools ? (all.slices + all.count * all.batch) * 5 * all.most_channels : 0);
  PoolFinishParams<X> finish_pool{};
  finish_pool.anchors = options.anchors;
  finish_pool.anchor = anchor;
  finish_pool.localization = localization;
  if (!dry) run_pool(pooling, finish_pool, stream);
  arena.release(start);  // what the distances need comes after it on the stream, and in its place

  const bool through = options.save && !options.detach_anchors;
  T* sums = arena.take<T>(through ? (distances.slices + distances.count) * masks.masks * distances.most_channels : 0);
  arena.release(start);
  if (dry) return;
  if (distances.count > 0) {
    const Panel panel = choose_panel<X>(masks.masks, distances.most_channels, shared_memory_limit());
    const T scale = Exponential<X>::scale(options.distance_temperature);
    const dim3 grid(distances.slices, static_cast<unsigned>(divide_up(distances.most_channels, panel.width)),
                    static_cast<unsigned>(divide_up(masks.masks, panel.rows)));
    const int64_t bytes = DistanceMemory<X>::bytes(panel);
    launch(distance<X>, "distance", dim3(grid.x, through ? grid.y : 1), kDistanceThreads, bytes, stream,
           DistanceParams<X>{distances, masks, panel, scale, through ? sums : nullptr, distance_terms, options.save});
    if (through) {
      if (grid.z > 1)
        launch(moments<X, false>, "moments", grid, kDistanceThreads, bytes, stream,
               MomentsParams<X>{distances, masks, panel, scale, sums});
      launch(project<X>, "project", dim3(static_cast<unsigned>(masks.masks), distances.count), kFinishThreads,
             32 * sizeof(T), stream,
             ProjectParams<X>{distances, masks, sums, static_cast<T>(1 / options.distance_temperature), nullptr});
    }
  }
  last.anchor = anchor;
  last.localization = localization;
  last.distance = distance_terms;
  launch(finish<T>, "finish", dim3(1), kFinishThreads, 32 * sizeof(double), stream, last);
}

// Bytes of scratch that forward needs.
template <class X>
int64_t forward_scratch(const std::vector<Pair>& pairs, const Masks& masks, const LossOptions& options) {
  Arena arena(nullptr);
  Compute<X>* const none[3] = {};
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    arena.release(0);
    forward_part<X>(first, count, masks, options, arena, none, false, true, nullptr);
  });
  return arena.most();
}

// pairs: as lay_out() leaves them.
template <class X>
void run_forward(const std::vector<Pair>& pairs, const Masks& masks, const LossOptions& options, void* scratch,
                 Compute<X>* const (&losses)[3], cudaStream_t stream) {
  Arena arena(scratch);
  bool add = false;
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    arena.release(0);
    forward_part<X>(first, count, masks, options, arena, losses, add, false, stream);
    add = true;
  });
}

// The gradients of the losses whose upstream gradients are given. pairs: as lay_out() leaves them, with gradients.
template <class X>
void run_backward(std::vector<Pair> pairs, const Masks& masks, const LossOptions& options,
                  const Compute<X>* const (&upstream)[3], cudaStream_t stream) {
  using T = Compute<X>;
  for (Pair& pair : pairs)
    pair.parts &= (upstream[0] ? kAnchor : 0) | (upstream[1] ? kDistance : 0) | (upstream[2] ? kLocalization : 0);
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    BackwardParams<T> params{};
    params.masks = masks;
    params.anchor = upstream[0];
    params.distance = upstream[1];
    params.localization = upstream[2];
    params.distance_temperature = static_cast<T>(options.distance_temperature);
    params.localization_temperature = static_cast<T>(options.localization_temperature);
    params.distance_exponent = Exponential<X>::scale(options.distance_temperature);
    params.localization_exponent = Exponential<X>::scale(options.localization_temperature);
    params.pyramid = make_pyramid(first, count, kPoolPixels<X>, 2 * options.slices,
                                  [](const Pair& pair) { return !(pair.parts & kDistance); });
    run_backward_without_distances<X>(params, stream);
    params.pyramid = make_pyramid(first, count, kDistancePixels<X>, options.slices,
                                  [](const Pair& pair) { return pair.parts & kDistance; });
    if (params.pyramid.count == 0) return;
    params.panel = choose_panel<X>(masks.masks, params.pyramid.most_channels, shared_memory_limit());
    launch(
        distance_backward<X, false>, "distance_backward",
        dim3(params.pyramid.slices, static_cast<unsigned>(divide_up(params.pyramid.most_channels, params.panel.width))),
        kDistanceThreads, DistanceMemory<X>::bytes(params.panel), stream, params);
  });
}

// ------------------------------------------------------------------------------------------------------- anchor_pool

template <class X>
int64_t pool_scratch(const std::vector<Pair>& pairs, const Masks& masks, int slices) {
  int64_t most = 0;
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    const Pyramid p = make_pyramid(first, count, kPoolPixels<X>, slices, [](const Pair&) { return true; });
    most =
        std::max(most, (p.slices + p.count) * masks.masks * p.most_channels * static_cast<int64_t>(sizeof(Compute<X>)));
  });
  return most;
}

// pairs: of students alone, with part kAnchor.
template <class X>
void run_pool_anchors(std::vector<Pair> pairs, const Masks& masks, int slices, void* scratch,
                      Compute<X>* anchors,  // [levels, masks, channels]
                      cudaStream_t stream) {
  using T = Compute<X>;
  for (Pair& pair : pairs) pair.anchors[0] = anchors + pair.level * masks.masks * pair.student.channels;
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    PoolParams<T> params{make_pyramid(first, count, kPoolPixels<X>, slices, [](const Pair&) { return true; }),
                         masks,
                         T(0),
                         static_cast<T*>(scratch),
                         nullptr,
                         1,
                         false};
    PoolFinishParams<X> finish{};
    finish.anchors = Anchors::written;
    run_pool(params, finish, stream);
  });
}

// The anchors' gradient to the maps.
template <class X>
void run_pool_backward(const std::vector<Map>& gradients, const Masks& masks, int slices,
                       Compute<X>* anchors,  // [levels, masks, channels]
                       cudaStream_t stream) {
  std::vector<Pair> pairs = make_pairs(gradients, {}, gradients, {kAnchor});
  for (Pair& pair : pairs) pair.difference = anchors + pair.level * masks.masks * pair.student.channels;
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    BackwardParams<Compute<X>> params{};
    params.pyramid = make_pyramid(first, count, kPoolPixels<X>, 2 * slices, [](const Pair&) { return true; });
    params.masks = masks;
    params.pooled = true;
    run_backward_without_distances<X>(params, stream);
  });
}

// ----------------------------------------------------------------------------------------------------- anchor_cosine

// Bytes of scratch of forward and of backward.
template <class T>
int64_t cosine_scratch(const std::vector<Pair>& pairs, const Masks& masks, int slices, bool gradient) {
  int64_t most = 0;
  each_launch(pairs, [&](const Pair* first, int64_t count) {
    const Pyramid p = make_pyramid(first, count, kDistancePixels<T>, slices, [](const Pair&) { return true; });
    const int64_t units = count * masks.masks * (first->pitch() + 4),
                  sums = gradient ? (p.slices + p.count) * masks.masks * p.most_channels : 0;
    most = std::max(most, (units + sums) * static_cast<int64_t>(sizeof(T)) + 16 * (2 * count + 1));
  });
  return most;
}

// Forward: pairs with the features as students and the cosines as gradients. Backward (anchor_gradient is given): the
// cosines' gradients as teachers, the features' as gradients.
template <class T>
void run_cosine(std::vector<Pair> pairs, const Masks& masks, int slices, void* scratch,
                const T* anchors,    // [levels, masks, channels]
                T* anchor_gradient,  // [levels, masks, channels]
                cudaStream_t stream) {
  Arena arena(scratch);
  for (size_t i = 0; i < pairs.size(); i += kMostPairs) {
    arena.release(0);
    const int64_t count = static_cast<int64_t>(std::min<size_t>(kMostPairs, pairs.size() - i));
    Pair* first = pairs.data() + i;
    for (Pair* pair = first; pair < first + count; ++pair) {
      pair->units = arena.take<T>(masks.masks * pair->pitch());
      pair->inverse_norm = arena.take<T>(masks.masks);
    }
    CosineParams<T> params{};
    params.pyramid = make_pyramid(first, count, kDistancePixels<T>, slices, [](const Pair&) { return true; });
    params.masks = masks;
    params.anchors = anchors;
    const Pyramid& pyramid = params.pyramid;
    const Panel panel = params.panel = choose_panel<T>(masks.masks, pyramid.most_channels, shared_memory_limit());
    const int64_t bytes = DistanceMemory<T>::bytes(panel);
    const dim3 per_mask(static_cast<unsigned>(masks.masks), static_cast<unsigned>(count));
    launch(prepare<T>, "prepare", per_mask, kFinishThreads, 32 * sizeof(double), stream, params);
    if (!anchor_gradient) {
      launch(cosine<T>, "cosine", dim3(pyramid.slices), kDistanceThreads, bytes, stream, params);
      continue;
    }
    const dim3 grid(pyramid.slices, static_cast<unsigned>(divide_up(pyramid.most_channels, panel.width)),
                    static_cast<unsigned>(divide_up(masks.masks, panel.rows)));
    BackwardParams<T> backward{};
    backward.pyramid = pyramid;
    backward.masks = masks;
    backward.panel = panel;
    launch(distance_backward<T, true>, "distance_backward", dim3(grid.x, grid.y), kDistanceThreads, bytes, stream,
           backward);
    T* sums = arena.take<T>((pyramid.slices + count) * masks.masks * pyramid.most_channels);
    launch(moments<T, true>, "moments", grid, kDistanceThreads, bytes, stream,
           MomentsParams<T>{pyramid, masks, panel, T(1), sums});
    launch(project<T>, "project", per_mask, kFinishThreads, 32 * sizeof(T), stream,
           ProjectParams<T>{pyramid, masks, sums, T(1),
                            anchor_gradient + first->level * masks.masks * first->student.channels});
  }
}

}  // namespace sea
