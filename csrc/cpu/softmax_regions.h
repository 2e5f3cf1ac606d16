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
    if (row >= 0 && two) {
      reduce_two_classes(t, sums, weight);
      return Few::done;
    }
    if (t.label_bytes) t.widen_labels();
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
    if (t.label_bytes) t.widen_labels();
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
