// Softmax with a label map whose sums are kept per region: the sums of Dice and cross-entropy.
//
// The work per voxel is that of softmax_labels.h. Then the voxels of a run, which share a region,
// are summed together; and the gradient takes its coefficients from rows that are filled run by
// run. Regions are Voronoi cells or lesions, so that most runs are tens of voxels.
#pragma once

#include "softmax_labels.h"
#include "two_classes.h"

namespace {

// The sums that this path computes.
constexpr uint32_t kRegionSums =
    fastloss::kReference | fastloss::kOverlap | fastloss::kPredicted | fastloss::kCrossEntropy;
constexpr int kMostRegionClasses = 64;

inline bool suits_softmax_regions(const Job& job) {
  return job.regions && job.activation == Activation::softmax && !job.dense &&
         job.map == fastloss::MapKind::none && (job.slots.kinds & ~kRegionSums) == 0 &&
         !job.losses && job.classes <= kMostRegionClasses;
}

// The label that all voxels of a run share, or −1.
template <class T>
FL_INLINE int64_t label_of_run(const typename Types<T>::Int* label, int first, int count) {
  constexpr int L = lanes<T>;
  const IVec<T> one = class_number<T>(label[first]);
  IVec<T> others{};
  const int end = first + count;
  int v = first;
  for (; v + L <= end; v += L) others |= label_lanes<T>(label + v) ^ one;
  if (v < end) others |= (label_lanes<T>(label + v) ^ one) & first_lanes<T>(end - v);
  return any<T>(others != IVec<T>{}) ? -1 : int64_t(label[first]);
}

// Adds a tile, of which `reduce_voxels` has filled the rows, to the sums of its block.
template <class T>
void add_runs(Tile<T>& t, bool logs, double* sums, double* weights) {
  const auto& s = t.job.slots;
  const int64_t classes = t.job.classes, per_row = (s.count + 1) * classes;
  const T *m = t.row(kWeight), *scale = t.row(kA), *value = t.row(kB), *loss = t.row(kC);
  const auto* label = t.labels();
  const bool ones = t.ones;
  auto slot = [&](int which) { return (which >= 0 ? which : s.count) * classes; };
  const int64_t reference = slot(s.reference), overlap = slot(s.overlap);
  const int64_t predicted = slot(s.predicted), losses = slot(s.cross_entropy);
  t.each_stretch([&](int64_t row, int first, int count) {
    double* to = sums + row * per_row;
    auto all = [&](const T* r) {
      return sum_run<T>(first, count,
                        [&](int v) __attribute__((always_inline)) { return load<T>(r + v); });
    };
    const double weight = ones ? double(count) : all(m);
    weights[row] += weight;
    for (int64_t c = 0; c < classes; ++c) {
      const T* x = t.x + c * t.stride;
      to[predicted + c] += sum_run<T>(first, count, [&](int v) __attribute__((always_inline)) {
        return load<T>(x + v) * load<T>(scale + v);
      });
    }
    const int64_t only = label_of_run<T>(label, first, count);
    if (only >= 0) {
      to[reference + only] += weight;
      to[overlap + only] += all(value);
      if (logs) to[losses + only] += all(loss);
      return;
    }
    for (int64_t c = 0; c < classes; ++c) {
      if (!t.present[c]) continue;
      const IVec<T> number = class_number<T>(c);
      auto of_class = [&](const T* r) {
        return sum_run<T>(first, count, [&](int v) __attribute__((always_inline)) {
          return keep<T>(label_lanes<T>(label + v) == number, load<T>(r + v));
        });
      };
      to[reference + c] += of_class(m);
      to[overlap + c] += of_class(value);
      if (logs) to[losses + c] += of_class(loss);
    }
  });
}

// The derivatives by the sums of one slot and region, (C,), in the working type; 0 for no region.
template <class T>
struct RegionTable {
  T number[kMostRegionClasses];

  RegionTable(const Job& job, int slot, int64_t sample, int64_t row) {
    for (int i = 0; i < lanes<T>; ++i) number[i] = T(0);
    const double* from = slot < 0 || row < 0 ? nullptr : job.coefficients_of(slot, sample, row);
    for (int64_t c = 0; c < job.classes; ++c) {
      const T k = from ? T(from[c]) : T(0);
      number[c] = k == k ? k : T(NAN);  // the caller's NaN may have any bits
    }
  }
};

// Of two classes, the rows of m p of the label, of the other class, and of the label's loss.
// Returns false if `kEven` and some voxel has a NaN or two equal infinities.
template <bool kEven, class T, class S, class Labels>
bool two_region_rows(Tile<T>& t, const S* x0, const S* x1, const Labels& labels, bool logs) {
  T *to_own = t.row(kA), *to_other = t.row(kB), *to_loss = t.row(kC);
  const T* m = t.row(kWeight);
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  const NearExponential<T> exponential;
  Vec<T> probe{};
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    prefetch(x0 + v + kPrefetch);
    prefetch(x1 + v + kPrefetch);
    const Vec<T> a = load_as<S, T>(x0 + v), b = load_as<S, T>(x1 + v);
    // z = x_other − x_label, and −log p_label = max(0, z) + log(1+e)
    Vec<T> z = choose<Labels, T>(labels.zero(v), b - a, a - b);
    if (!kEven) z = drop<T>(a == b, z);  // equal infinities: p = ½
    const Vec<T> e = exponential(larger(splat<T>(kNothing<T>), from_bits<T>(bits<T>(z) | sign)));
    const Vec<T> big = T(1) / (e + T(1)), little = e * big;
    const IVec<T> more = bits<T>(z) < 0;
    Vec<T> own = select<T>(more, big, little), other = select<T>(more, little, big);
    Vec<T> loss = logs ? log_one_plus_small(e) + larger(splat<T>(0), z) : Vec<T>{};
    if (kEven) {
      probe += own;
    } else {
      const Vec<T> w = load<T>(m + v);
      own *= w;
      other *= w;
      loss *= w;
    }
    store<T>(to_own + v, own);
    store<T>(to_other + v, other);
    store<T>(to_loss + v, loss);
  }
  return !any<T>(probe != probe);
}

// Adds a tile of two classes and several regions to the sums of its block.
template <class T>
void reduce_two_regions(Tile<T>& t, bool logs, double* sums, double* weights) {
  with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
    return two_region_rows<decltype(even)::value>(t, x0, x1, labels, logs);
  });
  int64_t of_tile = -1;
  if (!t.label_bytes) of_tile = t.only_label();
  else if (t.ones_among == 0 || t.ones_among == t.n) of_tile = t.ones_among > 0;
  else t.widen_labels();
  const auto& s = t.job.slots;
  const T *m = t.row(kWeight), *own = t.row(kA), *other = t.row(kB), *loss = t.row(kC);
  const auto* label = t.labels();
  const bool ones = t.ones;
  auto slot = [&](int which) { return (which >= 0 ? which : s.count) * 2; };
  const int64_t reference = slot(s.reference), overlap = slot(s.overlap);
  const int64_t predicted = slot(s.predicted), losses = slot(s.cross_entropy);
  t.each_stretch([&](int64_t row, int first, int count) {
    double* to = sums + row * (s.count + 1) * 2;
    auto add = [&](int64_t c, double size, double p, double rest, double lost) {
      weights[row] += size;
      to[reference + c] += size;
      to[overlap + c] += p;
      to[predicted + c] += p;
      to[predicted + 1 - c] += rest;
      to[losses + c] += lost;
    };
    const int64_t only = of_tile >= 0 ? of_tile : label_of_run<T>(label, first, count);
    if (only >= 0) {
      auto all = [&](const T* r) __attribute__((always_inline)) {
        return sum_run<T>(first, count,
                          [&](int v) __attribute__((always_inline)) { return load<T>(r + v); });
      };
      return add(only, ones ? double(count) : all(m), all(own), all(other), all(loss));
    }
    for (int64_t c = 0; c < 2; ++c) {
      const IVec<T> number = class_number<T>(c);
      auto all = [&](const T* r) __attribute__((always_inline)) {
        return sum_run<T>(first, count, [&](int v) __attribute__((always_inline)) {
          return keep<T>(label_lanes<T>(label + v) == number, load<T>(r + v));
        });
      };
      add(c, all(m), all(own), all(other), all(loss));
    }
  });
}

// Of two classes, the gradient by x₁; see `two_label_gradients`, whose four coefficients are rows
// here: `region` and `loss`, each for label 0 and, in the next row, for label 1.
template <bool kEven, class T, class S, class Labels>
bool two_region_gradients(Tile<T>& t, const S* x0, const S* x1, const Labels& labels, T* gradient) {
  const T *region0 = t.row(kD), *region1 = t.row(kE), *loss0 = t.row(kF), *loss1 = t.row(kG);
  const T* m = t.row(kWeight);
  const NearExponential<T> exponential;
  Vec<T> probe{};
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    prefetch(x0 + v + kPrefetch);
    prefetch(x1 + v + kPrefetch);
    const Vec<T> a = load_as<S, T>(x0 + v), b = load_as<S, T>(x1 + v);
    const IVec<T> zero = labels.zero(v);
    Vec<T> z = choose<Labels, T>(zero, b - a, a - b);
    if (!kEven) z = drop<T>(a == b, z);  // equal infinities: p = ½
    z = larger(splat<T>(kNothing<T>), smaller(splat<T>(-Numbers<T>::smallest_exponent), z));
    const Vec<T> e = exponential(z), own = T(1) / (e + T(1)), other = e * own;
    if (kEven) probe += own;
    const Vec<T> region = choose<Labels, T>(zero, load<T>(region0 + v), load<T>(region1 + v));
    const Vec<T> loss = choose<Labels, T>(zero, load<T>(loss0 + v), load<T>(loss1 + v));
    Vec<T> g = other * (own * region + loss);
    if (!kEven) g *= load<T>(m + v);
    store<T>(gradient + v, g);
  }
  return !any<T>(probe != probe);
}

// Writes the gradient of a tile of two classes and several regions.
template <class T>
void apply_two_regions(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  T* rows[4] = {t.row(kD), t.row(kE), t.row(kF), t.row(kG)};
  auto fill = [&](int64_t row, int first, int end) {
    const RegionTable<T> overlap(t.job, s.overlap, t.sample, row);
    const RegionTable<T> region(t.job, s.predicted, t.sample, row);
    const RegionTable<T> loss(t.job, s.cross_entropy, t.sample, row);
    const T turn = region.number[1] - region.number[0];
    const T numbers[4] = {turn - overlap.number[0], turn + overlap.number[1], loss.number[0],
                          -loss.number[1]};
    for (int i = 0; i < 4; ++i) {
      int v = first;
      // Vectors run over into the next run, which is filled after, but not into the next row.
      for (; v < end && v + L <= kMaxTile; v += L) store<T>(rows[i] + v, splat<T>(numbers[i]));
      for (; v < end; ++v) rows[i][v] = numbers[i];
    }
  };
  for (int i = 0; i < t.runs; ++i)
    fill(t.region[t.run_start[i]], t.run_start[i], t.run_start[i + 1]);
  if (t.n < t.padded) fill(-1, t.n, t.padded);
  T* gradient = t.row(kC);
  with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
    return two_region_gradients<decltype(even)::value>(t, x0, x1, labels, gradient);
  });
  write_rows(t, t.second, t.x, [&](const auto& row, const auto& put) {
    put.opposites(gradient, t.padded, row(1), row(0));
  });
}

// Whether a tile of one region is computed by the path of few classes.
template <class T>
bool few_of_region(const Job& job) {
  return kPicks<T> && (job.classes == 3 || job.classes == 4) && !job.weighted;
}

template <class T>
void reduce_softmax_regions(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  const bool logs = job.slots.cross_entropy >= 0;
  const bool two = job.classes == 2, suits_few = few_of_region<T>(job);
  const auto& s = job.slots;
  const int64_t per_row = (s.count + 1) * job.classes;
  auto move = [&](Tile<T>& t, int64_t v) {
    t.keeps_bytes = two && sizeof(T) == 4;
    t.move(v, blocks.tile(v, t.step), &blocks.faults[blocks.of(v)]);
  };
  // A tile of one region is like any of a sample that is one row.
  auto few = [&](Tile<T>& t) {
    const int64_t row = t.only_region(), block = blocks.of(t.voxel);
    double* sums = blocks.sums + (block * job.rows + row) * per_row;
    double* weight = blocks.weights + block * job.rows + row;
    if (two) {
      if (row >= 0) reduce_two_classes(t, sums, weight);
      else
        reduce_two_regions(t, logs, blocks.sums + block * job.rows * per_row,
                           blocks.weights + block * job.rows);
      return Few::done;
    }
    if constexpr (kPicks<T>)
      if (row >= 0 && suits_few) {
        auto to = [&](int slot) { return sums + (slot >= 0 ? slot : s.count) * job.classes; };
        const ClassSums of_class{to(s.reference), to(s.overlap), to(s.predicted),
                                 to(s.cross_entropy)};
        return reduce_few(t, of_class, logs, weight);
      }
    return Few::unsuited;
  };
  auto finish_tile = [&](Tile<T>& t, Tile<T>*) {
    const int64_t block = blocks.of(t.voxel);
    double all = 0;  // of which each region has its own part
    with_constant(t.ones,
                  [&](auto ones) { reduce_voxels<decltype(ones)::value, false>(t, logs, &all); });
    add_runs(t, logs, blocks.sums + block * job.rows * per_row, blocks.weights + block * job.rows);
  };
  over_tiles<false, T>(job, sample, blocks.first, blocks.last, scratch, false, move, few,
                       finish_tile);
}

// Fills the rows that `label_gradients` reads, with the coefficients of each voxel's region, and
// those of k_c in `second`. Vectors run over into the next run, which is filled after.
template <class T>
struct RunRows {
  Tile<T>& t;
  T *others, *own_overlap, *own_region, *own_loss;

  void fill() {
    std::memset(others, 0, sizeof(T) * size_t(t.padded));
    for (int i = 0; i < t.runs; ++i)
      run(t.region[t.run_start[i]], t.run_start[i], t.run_start[i + 1]);
    if (t.n < t.padded) run(-1, t.n, t.padded);
  }

 private:
  void run(int64_t row, int first, int end) {
    constexpr int L = lanes<T>;
    const Job& job = t.job;
    const auto& s = job.slots;
    const RegionTable<T> overlap(job, s.overlap, t.sample, row);
    const RegionTable<T> region(job, s.predicted, t.sample, row);
    const RegionTable<T> loss(job, s.cross_entropy, t.sample, row);
    const auto* label = t.labels();
    for (int64_t c = 0; c < job.classes; ++c) {
      const Vec<T> k = splat<T>(region.number[c]);
      const T* e = t.x + c * t.stride;
      T* slopes = t.second + c * t.stride;
      for (int v = first; v < end; v += L) store<T>(slopes + v, k);
      if (region.number[c] == T(0)) continue;
      const IVec<T> number = class_number<T>(c);
      auto add = [&](int v, auto counted) __attribute__((always_inline)) {
        const IVec<T> is_label = label_lanes<T>(label + v) == number;
        store<T>(others + v, load<T>(others + v) + counted(drop<T>(is_label, load<T>(e + v) * k)));
      };
      int v = first;
      for (; v + L <= end; v += L) add(v, [](Vec<T> x) { return x; });
      if (v < end) add(v, [&](Vec<T> x) { return keep<T>(first_lanes<T>(end - v), x); });
    }
    int v = first;
    if constexpr (kPicks<T>)
      if (job.classes <= L) {
        const Vec<T> o = load<T>(overlap.number), r = load<T>(region.number);
        const Vec<T> l = load<T>(loss.number);
        for (; v < end && v + L <= t.padded; v += L) {
          const IVec<T> y = label_lanes<T>(label + v);
          store<T>(own_overlap + v, pick(o, y));
          store<T>(own_region + v, pick(r, y));
          store<T>(own_loss + v, pick(l, y));
        }
      }
    for (; v < end; ++v) {
      const auto y = label[v];
      own_overlap[v] = overlap.number[y];
      own_region[v] = region.number[y];
      own_loss[v] = loss.number[y];
    }
  }
};

// For `GradientRows`: k_c of each voxel's region.
template <class T, int R>
struct RegionSlopes {
  const T* k[R];

  FL_INLINE RegionSlopes(const Tile<T>& t, int64_t c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) k[r] = t.second + (c + r) * t.stride;
  }
  FL_INLINE Vec<T> at(int r, int64_t v) const { return load<T>(k[r] + v); }
};

template <class T>
void apply_softmax_regions(const Job& job, int64_t sample, int64_t first, int64_t last,
                           void* scratch) {
  const int64_t lead = fastloss::voxels_to_line(job, sample);
  const bool two = job.classes == 2, suits_few = few_of_region<T>(job);
  auto move = [&](Tile<T>& t, int64_t v) {
    t.keeps_bytes = two && sizeof(T) == 4;
    t.move(v, tile_from(v, last, lead, t.step), nullptr);
  };
  auto few = [&](Tile<T>& t) {
    const int64_t row = t.only_region();
    if (row >= 0 && (two || suits_few)) {
      for (int32_t i = 0; i < job.slots.count; ++i) {
        const RegionTable<T> numbers(job, i, sample, row);
        std::memcpy(t.table + i * job.classes, numbers.number, sizeof(T) * size_t(job.classes));
      }
      if (two) {
        apply_two_classes(t);
        return Few::done;
      }
      if constexpr (kPicks<T>) return apply_few(t);
    }
    if (two) {
      apply_two_regions(t);
      return Few::done;
    }
    return Few::unsuited;
  };
  auto finish_tile = [&](Tile<T>& t, Tile<T>*) {
    T *others = other_slopes(t), *at_label = t.row(kB), *slope = t.row(kC), *turn = t.row(kD);
    T *overlap = t.row(kE), *region = t.row(kF), *loss = t.row(kLargest);
    RunRows<T>{t, others, overlap, region, loss}.fill();
    using Row = ByLabel<T, 0>;
    label_gradients<T, 0, false>(t, Row(t, nullptr, overlap), Row(t, nullptr, region),
                                 Row(t, nullptr, loss), T(0), others, at_label, turn, slope);
    const LabelGradients<T> gradients{nullptr, slope, turn, at_label};
    write_rows(t, t.x, t.second, [&](const auto& row, const auto& put) {
      using Put = std::remove_cv_t<std::remove_reference_t<decltype(put)>>;
      finish(t, [&](int64_t c, auto count, auto present) {
        constexpr int R = decltype(count)::value;
        using Rows =
            GradientRows<T, R, decltype(present)::value, decltype(row(0)), Put, RegionSlopes<T, R>>;
        return Rows(t, c, gradients, row, put, RegionSlopes<T, R>(t, c));
      });
    });
  };
  over_tiles<false, T>(job, sample, first, last, scratch, false, move, few, finish_tile);
}

}  // namespace
