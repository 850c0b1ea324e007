// The gradient of the student's maps from all losses at once: each map is read once, and its gradient is written once.
//
// A pixel receives a gradient from the anchors of its masks (from the anchor loss, and from the distances through the
// student's anchors), from the softmax over positions, and directly from the distances. Maps without distances go
// through backward(); maps with distances go through distance_backward(), which computes the cosines again, since
// saving them would take more memory than the maps.
#pragma once
#include "distance.cuh"
#include "pool.cuh"

namespace sea {

// Gradients of the losses, on the device, and what they are scaled by. Null: the loss has none.
template <class T>
struct Upstream {
  const T *anchor, *distance, *localization;  // [] each
  T distance_temperature, localization_temperature;
  T distance_exponent, localization_exponent;  // scales of the Exponentials
};

// What the kernels of this file read for one map, besides the map itself.
struct SavedEntry {
  const void* difference;       // as in Pair
  const void* anchor_gradient;  // as in Pair; null: none
  const void* softmax;          // T [4, batch, channels]
  int64_t pitch;

  SavedEntry() = default;
  explicit SavedEntry(const Pair& pair)
      : difference(pair.difference),
        anchor_gradient(pair.anchor_gradient),
        softmax(pair.softmax),
        pitch(pair.table_pitch) {}
};

// The gradient that a pixel of a map receives from its anchors and from the softmax over positions.
template <class T>
struct Sources {
  const Entry* of = nullptr;
  const T *difference = nullptr, *anchor_gradient = nullptr;  // [masks, pitch]; null: nothing
  const float* area = nullptr;  // [masks] what anchor_gradient is still to be divided by; null: nothing
  const T* softmax = nullptr;   // [4, batch, channels]; null: nothing
  int pitch = 0;
  T difference_scale = 0, anchor_gradient_scale = 0, localization_scale = 0, localization_exponent = 0;

  Sources() = default;
  // All threads of the block call it.
  __device__ Sources(const Upstream<T>& upstream, const Masks& masks, const Entry& entry, const SavedEntry& saved)
      : of(&entry), pitch(static_cast<int>(saved.pitch)) {
    if (upstream.localization && entry.losses & kLocalization) {
      softmax = static_cast<const T*>(saved.softmax);
      localization_scale =
          *upstream.localization * upstream.localization_temperature / static_cast<T>(entry.batch * entry.channels);
      localization_exponent = upstream.localization_exponent;
    }
    if (upstream.anchor && entry.losses & kAnchor) {
      difference = static_cast<const T*>(saved.difference);
      difference_scale = *upstream.anchor;
    }
    anchor_gradient = static_cast<const T*>(saved.anchor_gradient);
    if (anchor_gradient && upstream.distance) {
      anchor_gradient_scale = *upstream.distance;
    } else if (anchor_gradient) {  // given by the caller of anchor_pool
      anchor_gradient_scale = 1;
      area = masks.area + entry.level * masks.masks;
    }
  }

  // Puts the gradient of the pixels from .. to - 1 of one channel of a tile in the place of the student's pixels.
  // direct(pixel, the student's pixels from there on, their gradients) adds to it, if it is not null.
  template <class X, class D>
  __device__ void write(const Tile<X> (&tile)[2], const TileMasks& masks, const WorkTile& at, int from, int to,
                        int column, int64_t channel, D direct) const {
    constexpr int kStep = Packed<X>::kSize;
    constexpr bool kDirect = !std::is_same_v<D, std::nullptr_t>;
    const bool spreads = difference || anchor_gradient;
    SavedSoftmax<X> q{};
    if (softmax) q.read(softmax, of->batch * of->channels, at.image * of->channels + channel);
    if (from >= to) return;
    RunCursor runs(masks, from);
    T spread = spreads ? spread_of(masks, runs.run(), channel) : T(0);  // from the anchors: the same for all of a run
    for (int u = from; u < to; u += kStep) {
      T gradient[kStep] = {};
      if (spreads)
        runs.advance<kStep>(
            u, [&](uint32_t pixels) { each_set<kStep>(pixels, [&](int k) { gradient[k] = spread; }); },
            [&](int run) {
              if (masks.begin[run + 1] < to) spread = spread_of(masks, run + 1, channel);
            });
      if (kDirect || softmax) {
        T x[2][kStep];
        read_pixels(tile[0], column, u, x[0]);
        if constexpr (kDirect) direct(u, x[0], gradient);
        if (softmax) {
          read_pixels(tile[1], column, u, x[1]);
          each_set<kStep>(masks.inside<kStep>(u), [&](int k) {
            gradient[k] += localization_scale * q(x[0][k], x[1][k], localization_exponent);
          });
        }
      }
      write_pixels(tile[0], column, u, gradient);
    }
  }

 private:
  // The gradient that each pixel of a run receives from the anchors.
  __device__ T spread_of(const TileMasks& masks, int run, int64_t channel) const {
    T from_loss = 0, from_distances = 0;
    masks.each(run, [&](int mask) {
      const int64_t i = static_cast<int64_t>(mask) * pitch + channel;
      if (difference) from_loss += difference[i];
      if (anchor_gradient) from_distances += area ? anchor_gradient[i] / area[mask] : anchor_gradient[i];
    });
    return difference_scale * from_loss + anchor_gradient_scale * from_distances;
  }
};

// -------------------------------------------------------------------------------------------------- without distances

struct BackwardEntry : Entry {
  TileMap maps[2];  // student, teacher
  TileMap gradient;
  SavedEntry saved;

  BackwardEntry() = default;
  explicit BackwardEntry(const Pair& pair)
      : Entry(pair), maps{TileMap(pair.student), TileMap(pair.teacher)}, gradient(pair.gradient), saved(pair) {}
};

template <class T>
struct BackwardParams {
  Pyramid<BackwardEntry> pyramid;
  Masks masks;
  Upstream<T> upstream;
};

// Grid: slices, blocks of channels.
template <class X>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
    backward(const __grid_constant__ BackwardParams<Compute<X>> params) {
  using T = Compute<X>;
  constexpr int kPixels = kPoolPixels<X>;
  const Pyramid<BackwardEntry>& pyramid = params.pyramid;
  Carver carver(shared_memory());
  PoolMemory<X> memory(carver);
  memory.masks.count = (present_masks(params.masks) + 31) / 32;
  const int64_t c0 = static_cast<int64_t>(blockIdx.y) * kPoolChannels;
  const int64_t begin = first_tile(pyramid, blockIdx.x), end = first_tile(pyramid, blockIdx.x + 1);
  const auto channels_of = [&](const Entry& entry) { return part_of(entry.channels - c0, kPoolChannels); };
  const int column = threadIdx.x % kPoolChannels, half = threadIdx.x / kPoolChannels;  // as in pool()
  WorkTile next, at;
  const auto reads = [&](const Entry& entry) { return params.upstream.localization && entry.losses & kLocalization; };
  const auto load = [&](int64_t tile, int stage) {
    next.seek(pyramid, tile, kPixels);
    const BackwardEntry& entry = pyramid.entries[next.entry];
    if (reads(entry))
      load_tile(memory.tile(stage, half), entry.maps[half], next.image, next.first, next.count, kPixels, c0,
                channels_of(entry), kPoolChannels, kPoolThreads / 2);
    copy_async_commit();
  };
  if (begin < end) load(begin, 0);
  Sources<T> sources;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int stage = static_cast<int>(tile - begin) % 2;
    at = next;
    if (tile + 1 < end) {
      load(tile + 1, 1 - stage);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const BackwardEntry& entry = pyramid.entries[at.entry];
    if (sources.of != &entry) sources = Sources<T>(params.upstream, params.masks, entry, entry.saved);
    memory.masks.load(params.masks, entry, at);
    __syncthreads();
    // A map that is not read has a tile all the same: its gradient is put together there.
    X* const data[2] = {memory.tile(stage, 0), memory.tile(stage, 1)};
    const bool student_rows = (reads(entry) ? entry.maps[0] : entry.gradient).pixel_rows;
    const bool teacher_rows = (reads(entry) ? entry.maps[1] : entry.gradient).pixel_rows;
    const auto work = [&](const Tile<X>(&tiles)[2]) {
      constexpr int kHalf = kPixels / 2;
      const int from = half * kHalf, channels = channels_of(entry);
      if (column < channels)
        sources.write(tiles, memory.masks, at, from, min(at.count, from + kHalf), column, c0 + column, nullptr);
      __syncthreads();
      if (channels > 0) store_tile(tiles[0], entry.gradient, at.image, at.first, at.count, c0, channels, kPoolThreads);
    };
    with_tiles(data, student_rows, teacher_rows, kPixels, kPoolChannels, work);
    __syncthreads();
  }
}

// Of slices: blocks take different times, which depend on the boxes. Nothing is summed up over tiles, so slices change
// no result.
constexpr int kBackwardWaves = 6;
// Shorter strips than pool(), which stores a softmax for each: the work of a pixel depends on the boxes even more.
constexpr int kBackwardStripBits = 8;

// The gradients of the maps of one launch, but for pairs with the losses `without`. slices: one for each
// multiprocessor.
template <class X>
void run_backward(const std::vector<Pair>& pairs, const Masks& masks, const Upstream<Compute<X>>& upstream, int without,
                  int slices, cudaStream_t stream) {
  const auto takes = [&](const Pair& pair) { return !(pair.losses & without); };
  int64_t channels = 1;
  for (const Pair& pair : pairs) channels = std::max(channels, takes(pair) ? pair.channels : 0);
  const BackwardParams<Compute<X>> params{
      make_pyramid<BackwardEntry>(pairs, kPoolPixels<X>, pool_slices<X>(slices, channels), takes, pool_work<X>,
                                  kBackwardWaves, kBackwardStripBits),
      masks, upstream};
  const dim3 grid(params.pyramid.slices, static_cast<unsigned>(divide_up(channels, kPoolChannels)));
  launch(backward<X>, "backward", grid, kPoolThreads, bytes_of<PoolMemory<X>>(), stream, params);
}

// Compiled in ops/pool.cu alone, not again where the losses call it.
extern template decltype(run_backward<double>) run_backward<double>;
extern template decltype(run_backward<float>) run_backward<float>;
extern template decltype(run_backward<__half>) run_backward<__half>;
extern template decltype(run_backward<__nv_bfloat16>) run_backward<__nv_bfloat16>;

// ----------------------------------------------------------------------------------------------------- with distances

// The gradient of all tiles of the block from the coefficients of their cosines. E derives from MainEntry and has
// `gradient`. at_pixel(valid) returns, for this thread's pixel, a function of a row of the chunk and its mask that
// gives the coefficient e_p, 0 if the mask is empty; weight() is the factor of the current entry, and sources() what
// else its pixels receive.
template <class X, class E, class AtPixel, class Weight, class GetSources>
__device__ inline void backward_of_cosines(MainLoop<X, E>& loop, Compute<X> scale, AtPixel at_pixel, Weight weight,
                                           GetSources get_sources) {
  using T = Compute<X>;
  typename MainLoop<X, E>::Directions directions{};
  Sources<T> sources;
  const auto work = [&](int64_t t) {
    T along = 0;
    loop.each_chunk(
        t, 0, loop.chunks, scale, [] {},
        [&](int p0, int rows) {
          const int pixel = loop.pixel();
          const bool valid = loop.valid(pixel);
          const auto coefficient = at_pixel(valid);
          loop.template write_coefficients<X>(rows, [&](int row, int) {
            const Packed<T, 2> cosines = loop.cosine_pair(0, pixel, row);
            Packed<T, 2> out;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              out.x[i] = valid ? coefficient(row + i, p0 + row + i) : T(0);
              along += valid ? out.x[i] * cosines.x[i] : T(0);
            }
            return out;
          });
          __syncthreads();
          loop.add_directions(directions, rows);
        });
    __syncthreads();
    along = sum_over_lanes<loop.kLanes>(along) / scale;
    if (loop.lane() == 0) {
      const int pixel = loop.pixel();
      const T factor = weight() * loop.memory.inverse_norm[pixel];
      loop.memory.direct[pixel] = factor;
      loop.memory.direct[loop.kM + pixel] = factor * along * loop.memory.inverse_norm[pixel];
    }
    loop.write_directions(directions);
    if (sources.of != &loop.entry()) sources = get_sources();
    __syncthreads();

    constexpr int kShare = loop.kM * kMaxBlockK / kMainThreads;  // pixels of a thread
    const int channels = loop.own_channels(), column = threadIdx.x % kMaxBlockK;
    const int from = threadIdx.x / kMaxBlockK * kShare;
    const auto direct = [&](int u, const T(&x)[Packed<X>::kSize], T(&gradient)[Packed<X>::kSize]) {
      each_set<Packed<X>::kSize>(loop.template valid_bits<Packed<X>::kSize>(u), [&](int k) {
        const T* factors = loop.memory.direct + u + k;
        gradient[k] += factors[0] * *loop.direction(column, u + k) - factors[loop.kM] * x[k];
      });
    };
    X* const data[2] = {loop.tile[0].matrix.data, loop.tile[1].matrix.data};
    const auto write = [&](const Tile<X>(&tiles)[2]) {
      if (column < channels)
        sources.write(tiles, loop.memory.masks, loop.at, from, min(loop.at.count, from + kShare), column,
                      loop.own_channel() + column, direct);
      __syncthreads();
      if (channels > 0)
        store_tile(tiles[0], loop.entry().gradient, loop.at.image, loop.at.first, loop.at.count, loop.own_channel(),
                   channels, kMainThreads);
    };
    with_tiles(data, loop.tile[0].pixel_rows, loop.tile[1].pixel_rows, loop.kM, loop.block.k, write);
  };
  loop.each_tile(work, [] {});
}

struct DistanceBackwardEntry : DistanceEntry {
  TileMap gradient;
  SavedEntry saved;

  DistanceBackwardEntry() = default;
  explicit DistanceBackwardEntry(const Pair& pair) : DistanceEntry(pair), gradient(pair.gradient), saved(pair) {}
};

template <class T>
struct DistanceBackwardParams {
  Pyramid<DistanceBackwardEntry> pyramid;
  Masks masks;
  BlockShape block;
  Upstream<T> upstream;
  int few;  // the kernels for few anchors handle launches with up to this many; -1: none
};

// What the gradients of an entry's pixels are multiplied by. unit: the factor that their coefficients already have.
template <class T>
__device__ inline T distance_weight(const DistanceBackwardParams<T>& params, const Entry& entry, T unit) {
  return *params.upstream.distance /
         (params.upstream.distance_temperature * unit * max(params.masks.valid_pixels[entry.level], 1.f));
}

// Keeps small coefficients above float16's underflow.
constexpr float kHalfUnit = 1024;

// Grid: slices, groups.
template <class X>
__global__ void __launch_bounds__(kMainThreads, 1)
    distance_backward(const __grid_constant__ DistanceBackwardParams<Compute<X>> params) {
  using T = Compute<X>;
  constexpr float kUnit = std::is_same_v<X, __half> ? kHalfUnit : 1;
  MainLoop<X, DistanceBackwardEntry> loop(params.pyramid, params.masks, params.block, 2, false, true);
  if (loop.count <= params.few) return;
  backward_of_cosines(
      loop, params.upstream.distance_exponent,
      [&](bool valid) {
        const PixelSoftmax<X> q = valid ? PixelSoftmax<X>(saved_softmax(loop, loop.pixel())) : PixelSoftmax<X>();
        return [q, &loop, pixel = loop.pixel()](int row, int) {
          return q(*loop.cosine(0, pixel, row), *loop.cosine(1, pixel, row)) * kUnit;
        };
      },
      [&] { return distance_weight(params, loop.entry(), static_cast<T>(kUnit)); },
      [&] { return Sources<T>(params.upstream, params.masks, loop.entry(), loop.entry().saved); });
}

}  // namespace sea
