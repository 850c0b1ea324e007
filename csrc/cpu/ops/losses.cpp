// The losses, fused: any number of sets of maps, each with the parts of the loss it takes part in. One set after the
// other goes through all its steps, so that what they need in between is held for one set alone and is still near the
// processor.
#include "tensors.h"

namespace sea {
namespace {

// One set: student and teacher maps of all levels.
struct Set {
  std::vector<Map> student, teacher;
  int64_t parts;

  int64_t channels() const { return student[0].channels; }
  bool has(Part part) const { return parts & part; }
  bool pools() const { return parts & (kAnchor | kDistance); }
};

std::vector<Set> make_sets(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                           const std::vector<int64_t>& parts) {
  std::vector<Set> sets;
  const size_t levels = student.size() / parts.size();
  for (size_t s = 0; s < parts.size(); ++s) {
    sets.push_back({{}, {}, parts[s]});
    for (size_t l = s * levels; l < (s + 1) * levels; ++l) {
      sets[s].student.push_back(make_map(student[l]));
      sets[s].teacher.push_back(make_map(teacher[l]));
    }
  }
  return sets;
}

int64_t tiles(const Map& map) { return (map.pixels() + kTilePixels - 1) / kTilePixels; }

// Where the parts of a set lie in what is saved for backward. All sizes come from shapes alone.
struct Layout {
  // kept: coefficients of the distances, then anchors, each with a row more than masks, so that one number tells
  // whether both are small enough to be kept; empty where they are not, and computed again. gradient: of the student's
  // anchors, from the distances. softmax: of the localisation.
  // pooled: anchors of several processes, one set after the other, and a last entry that ends them: [sides, L, P, C] of
  // each, both sides where there are distances, else the difference alone, which is less to send.
  std::vector<int64_t> coefficients, anchors, gradient, softmax, pooled{0};
  int64_t kept = 0, gradients = 0, sums = 0;

  Layout(const std::vector<Set>& sets, int64_t masks) {
    for (const Set& set : sets) {
      const int64_t levels = static_cast<int64_t>(set.student.size());
      const int64_t sides = set.has(kDistance) ? 2 : set.has(kAnchor) ? 1 : 0;
      pooled.push_back(pooled.back() + sides * levels * masks * set.channels());
      coefficients.push_back(kept);
      for (const Map& map : set.student) kept += set.has(kDistance) ? (masks + 1) * tiles(map) * kTilePixels : 0;
      anchors.push_back(kept);
      kept += set.pools() ? 2 * levels * (masks + 1) * set.channels() : 0;
      gradient.push_back(gradients);
      gradients += set.has(kDistance) ? levels * masks * set.channels() : 0;
      softmax.push_back(sums);
      for (const Map& map : set.student) sums += set.has(kLocalization) ? 4 * map.batch * map.channels : 0;
    }
  }
};

template <class T>
struct Options {
  T distance_temperature, localization_temperature;
};

// Memory of the number of elements that Python computed, which must be what is needed, or 0 where nothing is saved.
template <class T>
Tensor make_saved(const char* name, int64_t elements, int64_t needed) {
  STD_TORCH_CHECK(elements == needed || elements == 0, "sea_kernels: ", name, " is ", elements, "; expected ", needed,
                  ", or 0 where it is not saved");
  return make({elements}, kScalarType<T>);
}

// Pools one set and, where softmax is given, does its localisation in the same pass.
template <class T>
void pool(const Set& set, const Regions& regions, const Options<T>& options,
          T* student_anchors,    // [L, P, C]; null: not pooled
          T* teacher_anchors,    // [L, P, C]
          T* softmax,            // [L][4, B, C]; null: no localisation
          double* divergence) {  // [L, C]
  const int64_t masks = regions.masks(), channels = set.channels();
  std::vector<Pool<T>> pools;
  for (size_t l = 0; l < set.student.size(); ++l) {
    Pool<T> task{};
    task.student = set.student[l];
    task.teacher = set.teacher[l];
    if (student_anchors) {
      task.runs = regions.runs(l);
      task.area = regions.area(l);
      task.masks = masks;
      task.student_anchors = student_anchors + l * masks * channels;
      task.teacher_anchors = teacher_anchors + l * masks * channels;
    }
    if (softmax) {
      task.extents = regions.extents(l);
      task.softmax = softmax;
      task.divergence = divergence + l * channels;
      task.inverse_temperature = 1 / options.localization_temperature;
      softmax += 4 * set.student[l].batch * channels;
    }
    pools.push_back(task);
  }
  run(pools);
}

// mean_{p: area > 0} mean_c (aS - aT)^2 of one level; no teacher: the student's are the differences.
template <class T>
double anchor_loss(const std::vector<int32_t>& present, int64_t channels, const T* student, const T* teacher) {
  double sum = 0;
  for (const int32_t p : present)
    for (int64_t c = p * channels; c < (p + 1) * channels; ++c) {
      const double difference = static_cast<double>(student[c]) - (teacher ? teacher[c] : 0);
      sum += difference * difference;
    }
  return present.empty() || channels == 0 ? 0 : sum / static_cast<double>(present.size() * channels);
}

template <class T>
std::vector<Distance<T>> make_distances(const Set& set, const Regions& regions, const PreparedAnchors<T>& student,
                                        const PreparedAnchors<T>& teacher, const Options<T>& options) {
  std::vector<Distance<T>> out;
  for (size_t l = 0; l < set.student.size(); ++l) {
    const float counted = regions.counted(l);
    out.push_back({set.student[l], set.teacher[l], regions.runs(l), student[l], teacher[l],
                   counted > 0 ? 1 / static_cast<T>(counted) : 0, 1 / options.distance_temperature});
  }
  return out;
}

// Distances of one set; the gradient of its anchors is accumulated in the same pass.
template <class T>
double distance_loss(const Set& set, const Regions& regions, const PreparedAnchors<T>& student,
                     const PreparedAnchors<T>& teacher, const Options<T>& options,
                     T* kept,        // [L][tiles, rows + 1, kTilePixels]; null: nothing is kept
                     T* gradient) {  // [L, P, C]; null: none
  const std::vector<Distance<T>> distances = make_distances(set, regions, student, teacher, options);
  const int64_t masks = regions.masks(), channels = set.channels(), levels = static_cast<int64_t>(distances.size());
  // Blocks of 8 tiles, larger ones where the partial sums of the anchors' gradient would take more than a sixteenth of
  // the map.
  std::vector<Block> blocks;
  std::vector<int64_t> moment_offset;
  int64_t moments_size = 0, size = 0;
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t moment = distances[l].student_anchors.rows * padded(channels),
                  elements = set.student[l].pixels() * channels;
    const int64_t most = std::max(tiles(set.student[l]) / 96 + 1,
                                  std::min(tiles(set.student[l]) / 8 + 1, elements / (16 * (moment + 1))));
    const int64_t span = (tiles(set.student[l]) + most - 1) / most * kTilePixels;
    if (regions.counted(l) > 0)
      for (int64_t begin = 0; begin < set.student[l].pixels(); begin += span) {
        blocks.push_back({l, begin, std::min(begin + span, set.student[l].pixels())});
        moment_offset.push_back(moments_size);
        moments_size += gradient ? moment : 0;
      }
    size = std::max(size, distances[l].scratch());
  }
  const std::vector<int64_t> first = first_blocks(blocks, levels);
  std::vector<int64_t> kept_offset(1, 0);
  for (const Map& map : set.student) kept_offset.push_back(kept_offset.back() + (masks + 1) * tiles(map) * kTilePixels);

  Buffer<T> moments(moments_size);
  std::vector<double> sums(blocks.size());
  parallel<T>(blocks.size(), size, [&](int64_t task, T* scratch) {
    const auto [l, begin, end] = blocks[task];
    T* own = gradient ? moments.get() + moment_offset[task] : nullptr;
    if (own) std::fill_n(own, distances[l].student_anchors.rows * padded(channels), T(0));
    sums[task] = loops<T>().distance(distances[l], begin, end, kept ? kept + kept_offset[l] : nullptr, own, scratch);
  });
  double total = 0;
  for (size_t i = 0; i < blocks.size(); ++i) total += sums[i] / regions.counted(blocks[i].level);
  if (gradient)
    parallel(levels, [&](int64_t l) {
      T* out = gradient + l * masks * channels;
      std::fill_n(out, masks * channels, T(0));
      const int64_t count = first[l + 1] - first[l];
      if (count > 0)
        loops<T>().project(distances[l].student_anchors, moments.get() + moment_offset[first[l]], count,
                           distances[l].student_anchors.rows * padded(channels), out);
    });
  return total;
}

// The losses of all sets, each added up in double.
struct Losses {
  double anchor = 0, distance = 0, localization = 0;
};

// The anchors of one set, and its localisation loss.
template <class T>
void pool_set(const Set& set, const Regions& regions, const Options<T>& options,
              T* anchors,  // [2 sides, L, P, C]
              T* softmax,  // [L][4, B, C]
              Losses& losses) {
  const int64_t channels = set.channels(), levels = static_cast<int64_t>(set.student.size());
  std::vector<double> divergence(levels * channels);
  pool(set, regions, options, set.pools() ? anchors : nullptr, anchors + levels * regions.masks() * channels,
       set.has(kLocalization) ? softmax : nullptr, divergence.data());
  if (!set.has(kLocalization)) return;
  for (int64_t l = 0; l < levels; ++l) {
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += divergence[l * channels + c];
    const double rows = static_cast<double>(set.student[l].batch * channels);
    if (rows > 0)
      losses.localization += sum * options.localization_temperature * options.localization_temperature / rows;
  }
}

// Anchor and distance loss of one set.
template <class T>
void compare_set(
    const Set& set, const Regions& regions, const Options<T>& options,
    const T* anchors,          // [L, P, C] of the student
    const T* teacher_anchors,  // [L, P, C]; null: `anchors` are the differences, and there are no distances
    T* kept,                   // as of distance_loss()
    T* gradient,               // likewise
    Losses& losses) {
  const int64_t channels = set.channels(), levels = static_cast<int64_t>(set.student.size());
  const int64_t table = regions.masks() * channels;
  if (set.has(kAnchor))
    for (int64_t l = 0; l < levels; ++l)
      losses.anchor += anchor_loss(regions.present(l), channels, anchors + l * table,
                                   teacher_anchors ? teacher_anchors + l * table : nullptr);
  if (set.has(kDistance)) {
    const PreparedAnchors<T> student(anchors, set.student, regions), teacher(teacher_anchors, set.teacher, regions);
    losses.distance += distance_loss(set, regions, student, teacher, options, kept, gradient);
  }
}

template <class T>
Tensor scalar(double value) {
  Tensor out = make({}, kScalarType<T>);
  *data<T>(out) = static_cast<T>(value);
  return out;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

// Sizes of what is saved, as the operators are handed them.
struct SavedElements {
  int64_t saved, gradients, softmax;
};

// pooled: as in Layout; null: pooled here, and the localisation done in the same pass.
template <class T>
Outputs forward(const std::vector<Set>& sets, const std::vector<Tensor>& regions_, const Options<T>& options,
                const T* pooled, const SavedElements& elements) {
  const Regions regions(regions_, sets[0].student);
  const int64_t masks = regions.masks();
  const Layout layout(sets, masks);
  Tensor saved = make_saved<T>("saved_elements", elements.saved, layout.kept);
  Tensor gradients = make_saved<T>("gradient_elements", elements.gradients, layout.gradients);
  Tensor softmax = make_saved<T>("softmax_elements", elements.softmax, pooled ? 0 : layout.sums);
  const Buffer<T> own_softmax(pooled || elements.softmax > 0 ? 0 : layout.sums);
  T* const sums = elements.softmax > 0 ? data<T>(softmax) : own_softmax.get();
  const bool keep = elements.saved > 0;
  Losses losses;
  for (size_t s = 0; s < sets.size(); ++s) {
    const Set& set = sets[s];
    const int64_t table = static_cast<int64_t>(set.student.size()) * masks * set.channels();
    Buffer<T> own(keep || pooled || !set.pools() ? 0 : 2 * table);
    const T *anchors, *teacher_anchors = nullptr;
    if (pooled) {
      anchors = pooled + layout.pooled[s];
      if (set.has(kDistance)) teacher_anchors = anchors + table;
    } else {
      T* const here = keep ? data<T>(saved) + layout.anchors[s] : own.get();
      pool_set(set, regions, options, here, sums + layout.softmax[s], losses);
      anchors = here;
      teacher_anchors = here + table;
    }
    compare_set(set, regions, options, anchors, teacher_anchors,
                keep ? data<T>(saved) + layout.coefficients[s] : nullptr,
                elements.gradients > 0 ? data<T>(gradients) + layout.gradient[s] : nullptr, losses);
  }
  return {scalar<T>(losses.anchor),
          scalar<T>(losses.distance),
          scalar<T>(losses.localization),
          {saved, gradients, softmax}};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_pool(const std::vector<Set>& sets, const std::vector<Tensor>& regions_,
                                                const Options<T>& options, int64_t anchor_elements,
                                                int64_t softmax_elements) {
  const Regions regions(regions_, sets[0].student);
  const Layout layout(sets, regions.masks());
  STD_TORCH_CHECK(anchor_elements == layout.pooled.back(), "sea_kernels: anchor_elements is ", anchor_elements,
                  "; expected ", layout.pooled.back());
  Tensor anchors = make({anchor_elements}, kScalarType<T>);
  Tensor softmax = make_saved<T>("softmax_elements", softmax_elements, layout.sums);
  const Buffer<T> own_softmax(softmax_elements > 0 ? 0 : layout.sums);
  T* const sums = softmax_elements > 0 ? data<T>(softmax) : own_softmax.get();
  Losses losses;
  for (size_t s = 0; s < sets.size(); ++s) {
    T* const out = data<T>(anchors) + layout.pooled[s];
    const int64_t size = layout.pooled[s + 1] - layout.pooled[s];
    const bool difference = sets[s].pools() && !sets[s].has(kDistance);
    Buffer<T> both(difference ? 2 * size : 0);
    pool_set(sets[s], regions, options, difference ? both.get() : out, sums + layout.softmax[s], losses);
    for (int64_t i = 0; difference && i < size; ++i) out[i] = both.get()[i] - both.get()[size + i];
  }
  return {anchors, scalar<T>(losses.localization), softmax};
}

// The gradients of the three losses; a loss that nothing was computed from has none.
struct Upstream {
  std::optional<Tensor> anchor, distance, localization;
};

template <class T>
T scale(const std::optional<Tensor>& scalar) {
  return scalar ? *data<T>(*scalar) : 0;
}

template <class T>
void backward(const std::vector<Set>& sets, const std::vector<std::vector<Map>>& gradient_maps,
              const Upstream& upstream, const std::vector<Tensor>& regions_, const std::vector<Tensor>& saved,
              const Options<T>& options) {
  const Regions regions(regions_, sets[0].student);
  const int64_t masks = regions.masks(), levels = static_cast<int64_t>(sets[0].student.size());
  const Layout layout(sets, masks);
  const bool keep = saved[0].numel() > 0;
  const T* const pooled = saved.size() > 3 ? data<T>(saved[3]) : nullptr;
  const T anchor_scale = scale<T>(upstream.anchor), distance_scale = scale<T>(upstream.distance);
  for (size_t s = 0; s < sets.size(); ++s) {
    Set set = sets[s];
    set.parts &= (upstream.anchor ? kAnchor : 0) | (upstream.distance ? kDistance : 0) |
                 (upstream.localization ? kLocalization : 0);
    const int64_t channels = set.channels(), stride = masks * channels, table = set.pools() ? levels * stride : 0;
    const bool again = set.pools() && !keep && !pooled;
    Buffer<T> own_anchors(again ? 2 * table : 0);
    if (again) pool<T>(set, regions, options, own_anchors.get(), own_anchors.get() + table, nullptr, nullptr);
    const T* student_anchors = pooled ? pooled + layout.pooled[s]
                               : keep ? data<T>(saved[0]) + layout.anchors[s]
                                      : own_anchors.get();
    const T* teacher_anchors = pooled && !(sets[s].parts & kDistance) ? nullptr : student_anchors + table;

    // What every pixel of a mask receives: the anchor's gradient over the area.
    Buffer<T> spread(table);
    const T* through_anchors =
        set.has(kDistance) && saved[1].numel() > 0 ? data<T>(saved[1]) + layout.gradient[s] : nullptr;
    if (set.pools())
      parallel(levels, [&](int64_t l) {
        const double count = static_cast<double>(regions.present(l).size() * channels);
        const T scale =
            set.has(kAnchor) && count > 0 ? static_cast<T>(2 * static_cast<double>(anchor_scale) / count) : 0;
        for (const int32_t p : regions.present(l))
          for (int64_t i = l * stride + p * channels; i < l * stride + (p + 1) * channels; ++i) {
            T value = set.has(kAnchor) ? scale * (student_anchors[i] - (teacher_anchors ? teacher_anchors[i] : 0)) : 0;
            if (through_anchors) value += distance_scale * through_anchors[i];
            spread.get()[i] = value / static_cast<T>(regions.area(l)[p]);
          }
      });

    std::vector<Distance<T>> distances(levels);
    Buffer<T> directions(set.has(kDistance) ? table : 0);
    std::optional<PreparedAnchors<T>> student, teacher;
    if (set.has(kDistance)) {
      student.emplace(student_anchors, set.student, regions);
      teacher.emplace(teacher_anchors, set.teacher, regions);
      distances = make_distances(set, regions, *student, *teacher, options);
      parallel(levels, [&](int64_t l) {
        loops<T>().directions(distances[l].student_anchors, distance_scale, directions.get() + l * stride);
      });
    }

    std::vector<Backward<T>> tasks;
    int64_t kept_offset = layout.coefficients[s], sums_offset = layout.softmax[s], size = 0;
    for (int64_t l = 0; l < levels; ++l) {
      const Map& map = set.student[l];
      Backward<T> task{};
      task.student = map;
      task.teacher = set.teacher[l];
      task.gradient = gradient_maps[s][l];
      task.runs = regions.runs(l);
      task.spread = set.pools() ? spread.get() + l * stride : nullptr;
      task.distance = distances[l];
      task.with_distance = set.has(kDistance) && regions.counted(l) > 0;
      if (task.with_distance) {
        task.direction = directions.get() + l * stride;
        task.kept = keep ? data<T>(saved[0]) + kept_offset : nullptr;
        task.distance_scale = distance_scale;
      }
      task.extents = regions.extents(l);
      task.softmax = set.has(kLocalization) ? data<T>(saved[2]) + sums_offset : nullptr;
      task.localization_scale =
          scale<T>(upstream.localization) * options.localization_temperature / static_cast<T>(map.batch * channels);
      task.inverse_temperature = 1 / options.localization_temperature;
      kept_offset += (masks + 1) * tiles(map) * kTilePixels;
      sums_offset += 4 * map.batch * channels;
      size = std::max(size, task.scratch());
      tasks.push_back(task);
    }
    const std::vector<Block> blocks = make_blocks(set.student, 4);
    parallel<T>(blocks.size(), size, [&](int64_t task, T* scratch) {
      const auto [l, begin, end] = blocks[task];
      for (int64_t n = begin; n < end; n += kTilePixels)
        loops<T>().backward(tasks[l], n, std::min(n + kTilePixels, end), scratch);
    });
  }
}

// Calls f with a zero of the type to compute in.
template <class F>
auto with_computed_type(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, F f) {
  return any_double(student) || any_double(teacher) ? f(0.) : f(0.f);
}

Outputs sea_loss(std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<int64_t> losses,
                 std::vector<Tensor> regions, double distance_temperature, double localization_temperature,
                 int64_t saved_elements, int64_t gradient_elements, int64_t softmax_elements) {
  return with_computed_type(student, teacher, [&](auto zero) {
    using T = decltype(zero);
    const Options<T> options{static_cast<T>(distance_temperature), static_cast<T>(localization_temperature)};
    return forward<T>(make_sets(student, teacher, losses), regions, options, nullptr,
                      {saved_elements, gradient_elements, softmax_elements});
  });
}

std::tuple<Tensor, Tensor, Tensor> sea_loss_pool(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                 std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                 double localization_temperature, int64_t anchor_elements,
                                                 int64_t softmax_elements) {
  return with_computed_type(student, teacher, [&](auto zero) {
    using T = decltype(zero);
    const Options<T> options{1, static_cast<T>(localization_temperature)};
    return forward_pool<T>(make_sets(student, teacher, losses), regions, options, anchor_elements, softmax_elements);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sea_loss_compare(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                            std::vector<int64_t> losses, std::vector<Tensor> regions,
                                                            Tensor anchors, double distance_temperature,
                                                            int64_t saved_elements, int64_t gradient_elements) {
  return with_computed_type(student, teacher, [&](auto zero) {
    using T = decltype(zero);
    const Options<T> options{static_cast<T>(distance_temperature), 1};
    const auto [anchor, distance, localization, saved] =
        forward<T>(make_sets(student, teacher, losses), regions, options, data<T>(anchors),
                   {saved_elements, gradient_elements, 0});
    return std::make_tuple(anchor, distance, saved[0], saved[1]);
  });
}

std::vector<Tensor> sea_loss_backward(std::optional<Tensor> anchor, std::optional<Tensor> distance,
                                      std::optional<Tensor> localization, std::vector<Tensor> student,
                                      std::vector<Tensor> teacher, std::vector<int64_t> losses,
                                      std::vector<Tensor> regions, std::vector<Tensor> saved,
                                      double distance_temperature, double localization_temperature) {
  const std::vector<Set> sets = make_sets(student, teacher, losses);
  std::vector<Tensor> gradients;
  for (const Tensor& map : student) gradients.push_back(make_gradient(map));
  std::vector<std::vector<Map>> maps(sets.size());
  for (size_t i = 0; i < gradients.size(); ++i)
    maps[i * sets.size() / gradients.size()].push_back(make_map(gradients[i]));
  with_computed_type(student, teacher, [&](auto zero) {
    using T = decltype(zero);
    const Options<T> options{static_cast<T>(distance_temperature), static_cast<T>(localization_temperature)};
    backward<T>(sets, maps, {anchor, distance, localization}, regions, saved, options);
  });
  return gradients;
}

}  // namespace
}  // namespace sea

STABLE_TORCH_LIBRARY_IMPL(sea_kernels, CPU, library) {
  library.impl("sea_loss", TORCH_BOX(&sea::sea_loss));
  library.impl("sea_loss_pool", TORCH_BOX(&sea::sea_loss_pool));
  library.impl("sea_loss_compare", TORCH_BOX(&sea::sea_loss_compare));
  library.impl("sea_loss_backward", TORCH_BOX(&sea::sea_loss_backward));
}
