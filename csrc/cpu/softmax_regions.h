// Softmax with a label map whose sums are kept per region: the sums of Dice and cross-entropy.
//
// The work per voxel is that of softmax_labels.h. Then the voxels of a run, which share a region,
// are summed together; and the gradient takes its coefficients from rows that are filled run by
// run. Regions are Voronoi cells or lesions, so that most runs are tens of voxels.
#pragma once

#include "softmax_labels.h"

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

// The first `count` lanes.
template <class T>
FL_INLINE IVec<T> first_lanes(int count) {
  static const typename Types<T>::Int number[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                    8, 9, 10, 11, 12, 13, 14, 15};
  return label_lanes<T>(number) < typename Types<T>::Int(count);
}

// Σ term(v) over the `count` voxels from `first` on. Rows are read beyond, up to a whole vector.
template <class T, class F>
FL_INLINE double sum_run(int first, int count, const F& term) {
  constexpr int L = lanes<T>;
  Vec<T> a{};
  const int end = first + count;
  int v = first;
  for (; v + L <= end; v += L) a += term(v);
  if (v < end) a += keep<T>(first_lanes<T>(end - v), term(v));
  return total<T>(a);
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

template <class T>
void reduce_softmax_regions(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  const bool logs = job.slots.cross_entropy >= 0;
  auto move = [&](Tile<T>& t, int64_t v) {
    t.move(v, blocks.tile(v, t.step), &blocks.faults[blocks.of(v)]);
  };
  auto finish_tile = [&](Tile<T>& t, Tile<T>*) {
    const int64_t block = blocks.of(t.voxel);
    double all = 0;  // of which each region has its own part
    with_constant(t.ones,
                  [&](auto ones) { reduce_voxels<decltype(ones)::value, false>(t, logs, &all); });
    add_runs(t, logs, blocks.sums + block * job.rows * (job.slots.count + 1) * job.classes,
             blocks.weights + block * job.rows);
  };
  auto few = [](Tile<T>&) { return Few::unsuited; };
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
    for (int v = 0, first = 0; v < t.n; first = v) {
      while (v < t.n && t.region[v] == t.region[first]) ++v;
      run(t.region[first], first, v);
    }
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
  auto move = [&](Tile<T>& t, int64_t v) { t.move(v, tile_from(v, last, lead, t.step), nullptr); };
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
  auto few = [](Tile<T>&) { return Few::unsuited; };
  over_tiles<false, T>(job, sample, first, last, scratch, false, move, few, finish_tile);
}

}  // namespace
