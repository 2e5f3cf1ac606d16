// Softmax with a label map whose sums are kept per region: the sums of Dice and cross-entropy.
//
// The work per voxel is that of softmax_labels.h. Then the voxels of a run, which share a region,
// are summed together; and the gradient takes its coefficients from rows that are filled run by
// run. Regions are Voronoi cells or lesions, so that most runs are tens of voxels.
#pragma once

#include "region_runs.h"
#include "softmax_labels.h"
#include "two_classes.h"

namespace {

// The sums that this path computes.
constexpr uint32_t kRegionSums =
    fastloss::kReference | fastloss::kOverlap | fastloss::kPredicted | fastloss::kCrossEntropy;
constexpr int kMostRegionClasses = 64;

inline bool suits_softmax_regions(const Job& job) {
  return job.regions && !job.regions_by_class && job.activation == Activation::softmax &&
         !job.dense && job.map == fastloss::MapKind::none &&
         (job.slots.kinds & ~kRegionSums) == 0 && !job.losses && job.classes <= kMostRegionClasses;
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
template <bool kEven, bool kLogs, class T, class S, class Labels>
bool two_region_rows(Tile<T>& t, const S* x0, const S* x1, const Labels& labels) {
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
    Vec<T> loss = kLogs ? log_one_plus_small(e) + larger(splat<T>(0), z) : Vec<T>{};
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

template <class T>
void two_region_rows(Tile<T>& t) {
  with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
    constexpr bool kEven = decltype(even)::value;
    return t.job.slots.cross_entropy >= 0 ? two_region_rows<kEven, true>(t, x0, x1, labels)
                                          : two_region_rows<kEven, false>(t, x0, x1, labels);
  });
}

// Adds a tile of two classes and several regions to the sums of its block.
template <class T>
void reduce_two_regions(Tile<T>& t, double* sums, double* weights) {
  two_region_rows(t);
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

// The derivatives of two classes by the sums of each voxel's region, as rows: of a voxel of label
// 0, and of label 1. See `SharedTwo`.
template <class T>
struct RegionTwo {
  const T *region0, *region1, *loss0, *loss1;

  template <class Labels>
  FL_INLINE Pair<T> at(int64_t v, IVec<T> zero) const {
    return {choose<Labels, T>(zero, load<T>(region0 + v), load<T>(region1 + v)),
            choose<Labels, T>(zero, load<T>(loss0 + v), load<T>(loss1 + v))};
  }
};
// The same of each voxel's region and label.
template <class T>
struct RunTwo {
  const T *region, *loss;

  template <class Labels>
  FL_INLINE Pair<T> at(int64_t v, IVec<T>) const {
    return {load<T>(region + v), load<T>(loss + v)};
  }
};

#if defined(__AVX2__)
// The same looked up by each voxel's region, in tables of kVectors vectors.
template <int kVectors>
struct TableTwo {
  const RegionNumbers<4>& numbers;
  const uint8_t* region;

  template <class Labels>
  FL_INLINE Pair<float> at(int64_t v, IVec<float> zero) const {
    const IVec<float> row = label_lanes<float>(region + v);
    auto of = [&](int i) { return look_up<kVectors>(numbers.number[i], row); };
    return {choose<Labels, float>(zero, of(0), of(1)), choose<Labels, float>(zero, of(2), of(3))};
  }
};
#endif

// The numbers of `RegionTwo` of a region.
template <class T>
void two_numbers(const Job& job, int64_t sample, int64_t row, T* numbers) {
  const auto& s = job.slots;
  const RegionTable<T> overlap(job, s.overlap, sample, row);
  const RegionTable<T> region(job, s.predicted, sample, row);
  const RegionTable<T> loss(job, s.cross_entropy, sample, row);
  const T turn = region.number[1] - region.number[0];
  numbers[0] = turn - overlap.number[0];
  numbers[1] = turn + overlap.number[1];
  numbers[2] = loss.number[0];
  numbers[3] = -loss.number[1];
}

#if defined(__AVX2__)
// Writes the gradient of a tile of two classes, by tables of few regions.
inline void apply_two_tables(Tile<float>& t, const RegionNumbers<4>& numbers,
                             const uint8_t* region) {
  float* gradient = t.row(kC);
  auto run = [&](const auto& slopes) {
    with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
      return two_label_gradients<decltype(even)::value>(t, x0, x1, labels, slopes, gradient);
    });
  };
  if (numbers.small) run(TableTwo<kTableVectors / 2>{numbers, region});
  else run(TableTwo<kTableVectors>{numbers, region});
  write_opposites(t, gradient);
}
#endif

// Writes the gradient of a tile of two classes and several regions.
template <class T>
void apply_two_regions(Tile<T>& t) {
  constexpr int L = lanes<T>;
  T* rows[4] = {t.row(kD), t.row(kE), t.row(kF), t.row(kG)};
  auto fill = [&](int64_t row, int first, int end) {
    T numbers[4];
    two_numbers(t.job, t.sample, row, numbers);
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
  const RegionTwo<T> slopes{rows[0], rows[1], rows[2], rows[3]};
  with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
    return two_label_gradients<decltype(even)::value>(t, x0, x1, labels, slopes, gradient);
  });
  write_opposites(t, gradient);
}

// The places of a block's sums, (rows, S + 1, C) and (rows,).
struct RegionSums {
  double *sums, *weights;
  int64_t row;  // numbers
  int64_t reference, overlap, predicted, loss;

  RegionSums(const Job& job, const Blocks& blocks, int64_t block) {
    const auto& s = job.slots;
    auto slot = [&](int which) { return (which >= 0 ? which : s.count) * job.classes; };
    row = (s.count + 1) * job.classes;
    sums = blocks.sums + block * job.rows * row;
    weights = blocks.weights + block * job.rows;
    reference = slot(s.reference), overlap = slot(s.overlap);
    predicted = slot(s.predicted), loss = slot(s.cross_entropy);
  }
  ClassSums of(int64_t region) const {
    double* to = sums + region * row;
    return {to + reference, to + overlap, to + predicted, to + loss};
  }
};

// The sums over runs: of two classes of p of the label, p of the other class, and the label's loss;
// of three and four those of every class's p, and the loss.
constexpr int kRunSums = 5;

// Passes them on to the sums of a block.
struct PassRunSums {
  const RegionSums& to;
  int classes;

  void operator()(int row, int label, double voxels, const double* sums) const {
    const ClassSums here = to.of(row);
    to.weights[row] += voxels;
    here.reference[label] += voxels;
    const bool two = classes == 2;
    here.overlap[label] += sums[two ? 0 : label];
    here.loss[label] += sums[classes];
    if (two) {
      here.predicted[label] += sums[0];
      here.predicted[1 - label] += sums[1];
    }
    for (int c = 0; !two && c < classes; ++c) here.predicted[c] += sums[c];
  }
};

// Adds a tile of two classes, by its runs.
inline void reduce_two_runs(Tile<float>& t, const LabelRuns& runs, RunSums<kRunSums>& sums,
                            const PassRunSums& pass) {
  two_region_rows(t);
  const float* const rows[3] = {t.row(kA), t.row(kB), t.row(kC)};
  for (int i = 0; i < runs.count; ++i) {
    const int first = runs.start[i], count = runs.start[i + 1] - first;
    Vec<float> each[3];
    sum_rows<3>(rows, first, count, each);
    sums.add(runs.row[i], runs.label[i], count, each, pass);
  }
}

// Adds a tile of C classes, of which `few_class_rows` has filled the rows, by its runs.
template <int C>
void add_few_runs(Tile<float>& t, const LabelRuns& runs, RunSums<kRunSums>& sums,
                  const PassRunSums& pass) {
  const float* rows[C + 1];
  for (int c = 0; c < C; ++c) rows[c] = t.second + c * t.stride;
  rows[C] = t.row(kB);
  for (int i = 0; i < runs.count; ++i) {
    const int first = runs.start[i], count = runs.start[i + 1] - first;
    Vec<float> each[C + 1];
    sum_rows<C + 1>(rows, first, count, each);
    sums.add(runs.row[i], runs.label[i], count, each, pass);
  }
}

template <class T>
constexpr bool kRegionRuns = sizeof(T) == 4;

// Whether the path of few classes computes tiles of regions.
template <class T>
bool few_of_region(const Job& job) {
  return kPicks<T> && (job.classes == 3 || job.classes == 4);
}

// Finds the runs of a tile or, where it has none, its regions. Returns whether it has.
template <class T>
bool find_runs(Tile<T>& t, LabelRuns& runs) {
  if (runs.find(t)) return true;
  t.find_regions();
  return false;
}
// The same for the tile to which `move` goes.
template <class T, class Move>
bool move_to_runs(Tile<T>& t, LabelRuns& runs, const Move& move) {
  const bool suits = t.job.classes == 2 || few_of_region<T>(t.job);
  t.regions_later = suits && kRegionRuns<T>;
  move();
  return t.regions_later && find_runs(t, runs);
}

template <class T>
void reduce_softmax_regions(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  const bool logs = job.slots.cross_entropy >= 0, two = job.classes == 2;
  LabelRuns runs;
  bool in_runs = false;
  RunSums<kRunSums> sums;
  int64_t block = 0;
  auto pass_on = [&] {
    const RegionSums to(job, blocks, block);
    sums.finish(PassRunSums{to, int(job.classes)});
  };
  auto move = [&](Tile<T>& t, int64_t v) {
    if (blocks.of(v) != block) pass_on();
    block = blocks.of(v);
    t.keeps_bytes = two && sizeof(T) == 4;
    in_runs = move_to_runs(
        t, runs, [&] { t.move(v, blocks.tile(v, t.step), &blocks.faults[blocks.of(v)]); });
  };
  auto few = [&](Tile<T>& t) {
    const RegionSums to(job, blocks, block);
    [[maybe_unused]] const PassRunSums pass{to, int(job.classes)};
    if constexpr (kRegionRuns<T>)
      if (in_runs) {
        // A tile of one region is like any of a sample that is one row.
        const int64_t row = runs.region;
        if (two) {
          if (row >= 0) reduce_two_classes(t, to.sums + row * to.row, to.weights + row);
          else reduce_two_runs(t, runs, sums, pass);
          return Few::done;
        }
        if constexpr (kPicks<T>) {
          const Few known =
              row >= 0
                  ? reduce_few(t, to.of(row), logs, to.weights + row)
                  : few_classes(t, [&](auto number, auto count, auto one, auto flat, int only) {
                      constexpr int C = decltype(count)::value;
                      constexpr bool kOne = decltype(one)::value, kFlat = decltype(flat)::value;
                      if (!few_class_rows<decltype(number), C, kOne, kFlat>(t, only, logs))
                        return false;
                      add_few_runs<C>(t, runs, sums, pass);
                      return true;
                    });
          if (known != Few::done) t.find_regions();
          return known;
        }
      }
    if (!two) return Few::unsuited;
    reduce_two_regions(t, to.sums, to.weights);
    return Few::done;
  };
  auto finish_tile = [&](Tile<T>& t, Tile<T>*) {
    const RegionSums to(job, blocks, block);
    double all = 0;  // of which each region has its own part
    with_constant(t.ones,
                  [&](auto ones) { reduce_voxels<decltype(ones)::value, false>(t, logs, &all); });
    add_runs(t, logs, to.sums, to.weights);
  };
  over_tiles<false, T>(job, sample, blocks.first, blocks.last, scratch, 1, move, few, finish_tile);
  pass_on();
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
        store<T>(others + v, load<T>(others + v) + counted(drop<T>(is_label, load<T>(e + v))) * k);
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

// Rows of numbers that runs have, with room for vectors beyond the last one.
template <int R>
struct NumberRows {
  alignas(64) float number[R][kMaxTile + kBeyond];
};

// Writes the gradient of a tile of two classes, by its runs.
inline void apply_two_runs(Tile<float>& t, const LabelRuns& runs, KeptRows<4>& kept) {
  NumberRows<2> rows;
  float* const to[2] = {rows.number[0], rows.number[1]};
  for (int i = 0; i < runs.count; ++i) {
    const int64_t row = runs.row[i];
    const float* numbers = kept.of(row, [&](float* n) {
      two_numbers<float>(t.job, t.sample, row, n);
    }) + runs.label[i];
    fill_rows<2>(to, runs.start[i], runs.start[i + 1] - runs.start[i], {numbers[0], numbers[2]});
  }
  float* gradient = t.row(kC);
  const RunTwo<float> slopes{to[0], to[1]};
  with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
    return two_label_gradients<decltype(even)::value>(t, x0, x1, labels, slopes, gradient);
  });
  write_opposites(t, gradient);
}

#if defined(__AVX2__)
// The derivatives by the sums of each voxel's region, for `apply_few_classes`: rows of those by
// every class's p, and by overlap and cross-entropy of the label.
template <int C, bool kOne>
struct RunSlopes {
  const float *k[C], *overlap, *loss;

  RunSlopes(const NumberRows<6>& rows, const int64_t (&number)[C])
      : overlap(rows.number[4]), loss(rows.number[5]) {
    for (int c = 0; c < C; ++c) k[c] = rows.number[number[c]];
  }
  FL_INLINE Vec<float> of_class(int c, int64_t v) const { return load<float>(k[c] + v); }
  FL_INLINE Vec<float> at_overlap(int64_t v, IVec<float>) const { return load<float>(overlap + v); }
  template <class... More>
  FL_INLINE Vec<float> at_loss(int64_t v, IVec<float>, const More&...) const {
    return load<float>(loss + v);
  }
  FL_INLINE Vec<float> at_region(int64_t v, IVec<float> y) const {
    Vec<float> own = of_class(0, v);
#pragma GCC unroll 4
    for (int c = 1; c < C && !kOne; ++c)
      own = select<float>(y == class_number<float>(c), of_class(c, v), own);
    return own;
  }
};

// The same looked up by each voxel's region, in tables of kVectors vectors: by p, overlap and
// cross-entropy of up to four classes.
template <int C, bool kOne, int kVectors>
struct TableSlopes {
  const RegionNumbers<12>& numbers;
  const uint8_t* region;
  int64_t order[C];

  TableSlopes(const RegionNumbers<12>& n, const uint8_t* r, const int64_t (&number)[C])
      : numbers(n), region(r) {
    for (int c = 0; c < C; ++c) order[c] = number[c];
  }
  FL_INLINE Vec<float> of(int64_t i, int64_t v) const {
    return look_up<kVectors>(numbers.number[i], label_lanes<float>(region + v));
  }
  // By the label, of the table that starts at `first`.
  FL_INLINE Vec<float> of_label(int first, int64_t v, IVec<float> y) const {
    Vec<float> own = of(first + order[0], v);
#pragma GCC unroll 4
    for (int c = 1; c < C && !kOne; ++c)
      own = select<float>(y == class_number<float>(c), of(first + c, v), own);
    return own;
  }
  FL_INLINE Vec<float> of_class(int c, int64_t v) const { return of(order[c], v); }
  FL_INLINE Vec<float> at_region(int64_t v, IVec<float> y) const { return of_label(0, v, y); }
  FL_INLINE Vec<float> at_overlap(int64_t v, IVec<float> y) const { return of_label(4, v, y); }
  template <class... More>
  FL_INLINE Vec<float> at_loss(int64_t v, IVec<float> y, const More&...) const {
    return of_label(8, v, y);
  }
};

// The numbers of a region for those rows: by p, overlap and cross-entropy of up to four classes.
inline void few_numbers(const Job& job, int64_t sample, int64_t row, float* numbers) {
  const int slots[3] = {job.slots.predicted, job.slots.overlap, job.slots.cross_entropy};
  for (int i = 0; i < 3; ++i)
    std::memcpy(numbers + 4 * i, RegionTable<float>(job, slots[i], sample, row).number,
                sizeof(float) * 4);
}

// Writes the gradient of a tile of three or four classes, by tables of few regions.
template <int kVectors>
Few apply_few_tables(Tile<float>& t, const RegionNumbers<12>& numbers, const uint8_t* region) {
  return few_classes(t, [&](auto number, auto count, auto one, auto flat, int only) {
    constexpr int C = decltype(count)::value;
    constexpr bool kOne = decltype(one)::value, kFlat = decltype(flat)::value;
    auto slopes = [&](const int64_t (&order)[C]) {
      return TableSlopes<C, kOne, kVectors>(numbers, region, order);
    };
    return apply_few_classes<decltype(number), C, kOne, kFlat>(t, only, slopes);
  });
}

// Writes the gradient of a tile of three or four classes, by its runs.
inline Few apply_few_runs(Tile<float>& t, const LabelRuns& runs, KeptRows<12>& kept) {
  NumberRows<6> rows;
  float* to[6];
  for (int r = 0; r < 6; ++r) to[r] = rows.number[r];
  for (int i = 0; i < runs.count; ++i) {
    const int64_t row = runs.row[i];
    const float* n =
        kept.of(row, [&](float* numbers) { few_numbers(t.job, t.sample, row, numbers); });
    const int label = runs.label[i];
    fill_rows<6>(to, runs.start[i], runs.start[i + 1] - runs.start[i],
                 {n[0], n[1], n[2], n[3], n[4 + label], n[8 + label]});
  }
  return few_classes(t, [&](auto number, auto count, auto one, auto flat, int only) {
    constexpr int C = decltype(count)::value;
    constexpr bool kOne = decltype(one)::value, kFlat = decltype(flat)::value;
    auto slopes = [&](const int64_t (&order)[C]) { return RunSlopes<C, kOne>(rows, order); };
    return apply_few_classes<decltype(number), C, kOne, kFlat>(t, only, slopes);
  });
}
#endif

template <class T>
void apply_softmax_regions(const Job& job, int64_t sample, int64_t first, int64_t last,
                           void* scratch) {
  const int64_t lead = fastloss::voxels_to_line(job, sample);
  const bool two = job.classes == 2;
  LabelRuns runs;
  bool in_runs = false;
  KeptRows<4> kept_two;
  [[maybe_unused]] KeptRows<12> kept_few;
#if defined(__AVX2__)
  RegionNumbers<4> numbers_of_two;
  RegionNumbers<12> numbers_of_few;
  if (kRegionRuns<T> && two)
    numbers_of_two.fill(job,
                        [&](int64_t row, float* n) { two_numbers<float>(job, sample, row, n); });
  if (few_of_region<T>(job))
    numbers_of_few.fill(job, [&](int64_t row, float* n) { few_numbers(job, sample, row, n); });
  uint8_t buffer[kMaxTile];
  const uint8_t* region = nullptr;  // of the tile, if tables are looked up
#endif
  auto move = [&](Tile<T>& t, int64_t v) {
    t.keeps_bytes = two && sizeof(T) == 4;
    auto move_tile = [&] { t.move(v, tile_from(v, last, lead, t.step), nullptr); };
#if defined(__AVX2__)
    if constexpr (kRegionRuns<T>)
      if (numbers_of_two.fits || numbers_of_few.fits) {
        t.regions_later = true;
        move_tile();
        region = region_bytes(t, buffer);
        if (!region) in_runs = find_runs(t, runs);
        return;
      }
#endif
    in_runs = move_to_runs(t, runs, move_tile);
  };
  auto few = [&](Tile<T>& t) {
#if defined(__AVX2__)
    if constexpr (kRegionRuns<T>)
      if (region) {
        if (two) {
          apply_two_tables(t, numbers_of_two, region);
          return Few::done;
        }
        const Few known = numbers_of_few.small
                              ? apply_few_tables<kTableVectors / 2>(t, numbers_of_few, region)
                              : apply_few_tables<kTableVectors>(t, numbers_of_few, region);
        if (known != Few::done) t.find_regions();
        return known;
      }
#endif
    if constexpr (kRegionRuns<T>)
      if (in_runs) {
        const bool alone = runs.region >= 0;
        for (int32_t i = 0; alone && i < job.slots.count; ++i) {
          const RegionTable<T> numbers(job, i, sample, runs.region);
          std::memcpy(t.table + i * job.classes, numbers.number, sizeof(T) * size_t(job.classes));
        }
        if (two) {
          if (alone) apply_two_classes(t);
          else apply_two_runs(t, runs, kept_two);
          return Few::done;
        }
        if constexpr (kPicks<T>) {
          const Few known = alone ? apply_few(t) : apply_few_runs(t, runs, kept_few);
          if (known != Few::done) t.find_regions();
          return known;
        }
      }
    if (!two) return Few::unsuited;
    apply_two_regions(t);
    return Few::done;
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
  over_tiles<false, T>(job, sample, first, last, scratch, 1, move, few, finish_tile);
}

}  // namespace
