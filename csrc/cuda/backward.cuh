// The gradient of the student's maps from all parts of the loss: each map is read once and its gradient written once.
// Maps that take part in the distance loss go through distance_backward(), others through backward().
#pragma once
#include "distance.cuh"

namespace sea {

template <class T>
struct BackwardParams {
  Pyramid pyramid;
  Masks masks;
  Panel panel;
  bool copied;  // whether backward() copies the masks' words to shared memory
  // Upstream gradients on the device; null: the loss gives no gradient.
  const T* anchor;
  const T* distance;
  const T* localization;
  bool pooled;  // `difference` is the gradient of anchors, [masks, channels] of each pair, and nothing else is
  T distance_temperature, localization_temperature;
  T distance_exponent, localization_exponent;  // scales of the Exponentials
};

// What a pixel of a pair receives from its anchors and from the softmax over positions.
template <class T>
struct Receives {
  const Pair* of = nullptr;
  const float* area;                                  // [masks]
  const T *difference = nullptr, *through = nullptr;  // [masks, pitch]; null: nothing
  int64_t pitch;
  T difference_scale, through_scale, localization_scale, localization_exponent;
  bool localization;

  Receives() = default;
  // All threads must call it.
  __device__ Receives(const BackwardParams<T>& params, const Pair& pair)
      : of(&pair), area(params.masks.masks ? params.masks.area + pair.level * params.masks.masks : nullptr) {
    pitch = params.pooled ? pair.student.channels : pair.pitch();
    localization = params.localization && pair.parts & kLocalization;
    const T rows = static_cast<T>(pair.student.batch * pair.student.channels);
    localization_scale = localization ? *params.localization * params.localization_temperature / rows : T(0);
    localization_exponent = params.localization_exponent;
    if (params.pooled || (params.anchor && pair.parts & kAnchor)) difference = static_cast<const T*>(pair.difference);
    if (params.distance && pair.parts & kDistance) through = static_cast<const T*>(pair.through);
    const int present = difference ? count_masks(params.masks, pair.level) : 0;
    difference_scale = params.pooled ? T(1)
                       : difference  ? 2 * *params.anchor / (present * static_cast<T>(pair.student.channels))
                                     : T(0);
    through_scale = through ? *params.distance : T(0);
  }

  // Calls put(pixel, gradient) for the pixels of the tile, in one channel of the map; direct(pixel): what is added.
  template <class X, class D, class F>
  __device__ void each(const Tile<X> (&tile)[2], const TileMasks& masks, const Cursor& at, int column, int64_t channel,
                       D direct, F put) const {
    const Pair& pair = *of;
    const bool spreads = difference || through;
    const int64_t rows = pair.student.batch * pair.student.channels;
    Normalizer<X> softmax{};
    if (localization)
      softmax.read(static_cast<const T*>(pair.softmax), rows, at.image * pair.student.channels + channel);
    T spread = 0;
    for (int u = 0; u < at.count; ++u) {
      if (spreads && masks.starts_at(u)) {
        spread = 0;
        masks.each(u, [&](int mask) {
          const int64_t i = mask * pitch + channel;
          T value = 0;
          if (difference) value += difference_scale * difference[i];
          if (through) value += through_scale * through[i];
          spread += value / area[mask];
        });
      }
      T value = spread + direct(u);
      if (localization && masks.inside_at(u))
        value += localization_scale *
                 softmax(widen(*tile[0].at(column, u)), widen(*tile[1].at(column, u)), localization_exponent);
      put(u, value);
    }
  }
};

template <class X>
struct BackwardMemory {
  static __host__ __device__ int64_t bytes(int64_t masks, bool copied) {
    return 4 * PoolMemory<X>::kTile + TileMasks::bytes(copied ? masks : 0, kPoolPixels<X>);
  }
};

// Maps without distances, and anchors' gradients alone. Grid: slices, blocks of channels.
template <class X>
__global__ void __launch_bounds__(kPoolThreads, 3) backward(const __grid_constant__ BackwardParams<Compute<X>> params) {
  using T = Compute<X>;
  constexpr int kPixels = kPoolPixels<X>;
  constexpr int64_t kTile = PoolMemory<X>::kTile;
  const Pyramid& pyramid = params.pyramid;
  unsigned char* memory = shared_memory();
  TileMasks masks(memory + 4 * kTile, (present_masks(params.masks) + 31) / 32, kPixels, params.copied);
  const int64_t c0 = static_cast<int64_t>(blockIdx.y) * kPoolChannels;
  const int64_t begin = first_tile(pyramid, blockIdx.x), end = first_tile(pyramid, blockIdx.x + 1);
  const auto channels_of = [&](const Pair& pair) { return part_of(pair.student.channels - c0, kPoolChannels); };
  const auto tile_data = [&](int stage, int side) { return reinterpret_cast<X*>(memory + (2 * stage + side) * kTile); };
  Cursor next{}, at{};
  const auto reads = [&](const Pair& pair) { return params.localization && pair.parts & kLocalization; };
  const auto load = [&](int64_t tile, int stage) {
    next.seek(pyramid, tile, kPixels);
    const Pair& pair = pyramid.pairs[next.pair];
    for (int side = 0; side < 2 && reads(pair); ++side)
      load_tile(tile_data(stage, side), side ? pair.teacher : pair.student, next.image, next.first, next.count, kPixels,
                c0, channels_of(pair), kPoolChannels);
    copy_async_commit();
  };
  if (begin < end) load(begin, 0);
  Receives<T> receives;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int stage = static_cast<int>(tile - begin) % 2;
    if (tile + 1 < end) {
      load(tile + 1, 1 - stage);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    at.seek(pyramid, tile, kPixels);
    const Pair& pair = pyramid.pairs[at.pair];
    if (receives.of != &pair) receives = Receives<T>(params, pair);
    masks.load(params.masks, pair, at);
    __syncthreads();
    // A map that is not read has a tile all the same, for its gradient.
    const Tile<X> tiles[2] = {
        make_tile(tile_data(stage, 0), reads(pair) ? pair.student : pair.gradient, kPixels, kPoolChannels),
        make_tile(tile_data(stage, 1), reads(pair) ? pair.teacher : pair.gradient, kPixels, kPoolChannels)};
    const int column = threadIdx.x, channels = channels_of(pair);
    if (column < channels)
      receives.each(
          tiles, masks, at, column, c0 + column, [](int) { return T(0); },
          [&](int u, T value) { *tiles[0].at(column, u) = narrow<X>(value); });
    __syncthreads();
    if (channels > 0) store_tile(tiles[0], pair.gradient, at.image, at.first, at.count, c0, channels);
    __syncthreads();
  }
}

template <class X>
void run_backward_without_distances(BackwardParams<Compute<X>> params, cudaStream_t stream) {
  const int64_t masks = params.masks.masks;
  params.copied = BackwardMemory<X>::bytes(masks, true) <= shared_memory_limit();
  const dim3 grid(params.pyramid.slices, static_cast<unsigned>(divide_up(params.pyramid.most_channels, kPoolChannels)));
  launch(backward<X>, "backward", grid, kPoolThreads, BackwardMemory<X>::bytes(masks, params.copied), stream, params);
}

// Maps with distances, or features of cosines. Grid: slices, groups.
template <class X, bool kOfCosines>
__global__ void __launch_bounds__(kDistanceThreads, 1)
    distance_backward(const __grid_constant__ BackwardParams<Compute<X>> params) {
  using T = Compute<X>;
  // In float16 what is between -1 and 1 needs room below, and has some above.
  constexpr float kUnit = std::is_same_v<X, __half> ? 1024 : 1;
  const T scale = kOfCosines ? T(1) : params.distance_exponent;
  Distances<X> d(params.pyramid, params.masks, params.panel, kOfCosines ? 1 : 2, kOfCosines);
  typename Distances<X>::Directions directions{};
  Receives<T> receives;
  const auto work = [&](int64_t t) {
    T along = 0;
    d.each_chunk(
        t, 0, d.chunks, scale, [] {},
        [&](int p0, int rows) {
          const bool counts = d.counts(d.pixel);
          PixelSoftmax<X> q;
          if (counts && !kOfCosines) q = PixelSoftmax<X>(d.statistics());
          d.template write_coefficients<X>(rows, [&](int row) {
            if (!counts || !d.memory.valid[row]) return T(0);
            const T cosine = *d.cosine(0, d.pixel, row);
            T value;
            if constexpr (kOfCosines) {
              value = d.cosine_gradient(p0 + row);
            } else {
              value = q(cosine, *d.cosine(1, d.pixel, row)) * kUnit;
            }
            along += value * cosine;
            return value;
          });
          __syncthreads();
          d.add_directions(directions, rows);
        });
    along = sum_over_lanes<d.kLanes>(along) / scale;
    if (d.lane == 0) d.memory.along[d.pixel] = along;
    d.write_directions(directions);
    if (receives.of != &d.pair()) receives = Receives<T>(params, d.pair());
    __syncthreads();

    // w / temperature of this level
    T weight = 1;
    if (!kOfCosines)
      weight =
          *params.distance / (params.distance_temperature * kUnit * max(params.masks.counted[d.pair().level], 1.f));
    const int channels = d.own_channels(), column = threadIdx.x;
    if (column < channels)
      receives.each(
          d.tile, d.tile_masks, d.at, column, d.own_channel() + column,
          [&](int u) {
            if (!d.counts(u)) return T(0);
            const T inverse = d.memory.inverse_norm[u];
            const T direct = d.memory.out[column * DistanceMemory<X>::kOutPitch + u];
            return weight * inverse *
                   (direct - d.memory.along[u] * inverse * static_cast<T>(widen(*d.tile[0].at(column, u))));
          },
          [&](int u, T value) { *d.tile[0].at(column, u) = narrow<X>(value); });
    __syncthreads();
    if (channels > 0)
      store_tile(d.tile[0], d.pair().gradient, d.at.image, d.at.first, d.at.count, d.own_channel(), channels);
  };
  d.each_tile(work, [] {});
}

}  // namespace sea
