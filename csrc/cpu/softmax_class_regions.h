// Softmax with a label map whose sums are kept per region, where every class has a map of regions:
// the sums of Dice and of cross-entropy of both outcomes.
//
// The voxels of a run of class c share its region and whether c is their label. They add
// p_c, and one loss: −log p_c, or −log q_c with q = 1 − p. With e_c = e^(x_c−largest) and
// rest_c = Σ_{j≠c} e_j, which is exact for the largest class as `exponentials` leaves that out,
//   p_c = e_c / Σe,  q_c = rest_c / Σe,  −log p_c = gap_c + log Σe,  −log q_c = log(1 + e_c/rest_c).
//
// In the gradient a_c is the derivative by p_c, and b_c that by the loss. That by log p_c is
//   t_c = a_c p_c − b_c for the label,  a_c p_c + b_c e_c/rest_c for other classes,
// and ∂L/∂x_c = t_c − p_c Σ_j t_j. At most one class d has p > ½; its rest is small and may be 0. If
// it is not the label, its second part is left out of t. That adds b_d p_d to the gradient of d, and
// −b_d p_c/rest_d e_d to that of c ≠ d, where e_c ≤ rest_d. As p_d = 1 cancels, with
// T = Σ_{j≠d} t_j the gradient of d is t_d q_d − p_d T.
#pragma once

#include "class_runs.h"
#include "softmax.h"

namespace {

// The place of Σ m among the sums; −1: not requested.
inline int32_t voxels_slot(const Job& job) {
  for (int32_t i = 0; i < job.slots.count; ++i) {
    const fastloss::Sum& sum = job.sums[i];
    if (sum.weight == fastloss::Weight::one && sum.function == Function::one && sum.field < 0)
      return i;
  }
  return -1;
}

// The sums that this path computes, beside that of `voxels_slot`.
constexpr uint32_t kClassRegionSums = fastloss::kReference | fastloss::kOverlap |
                                      fastloss::kPredicted | fastloss::kCrossEntropy |
                                      fastloss::kCrossEntropyRest;

inline bool suits_class_regions(const Job& job) {
  if (!job.regions_by_class || job.activation != Activation::softmax || job.dense ||
      job.classes < 2 || job.map != fastloss::MapKind::none || job.histograms || job.losses)
    return false;
  const int32_t voxels = voxels_slot(job);
  for (int32_t i = 0; i < job.slots.count; ++i)
    if (i != voxels && !(fastloss::name_of(job.sums[i]) & kClassRegionSums)) return false;
  return true;
}

// x becomes e^(x−largest), second largest − x, with rows of Σe − 1 and 1/Σe.
template <class T>
void class_exponentials(Tile<T>& t) {
  load_and_maximum(t);
  exponentials<true>(t, [](int64_t, int64_t, auto) {});
}

// e/rest of a class that is not above ½, and others at most: Σe − e is at least the largest's 1.
template <class T>
FL_INLINE Vec<T> odds(Vec<T> e, Vec<T> gap, Vec<T> rest) {
  return e / select<T>(gap == T(0), rest, (rest + T(1)) - e);
}

// x becomes m p_c and second m times the loss, of voxels whose label is c or not. `kSome`: there are
// both.
template <bool kSome, bool kLabel, bool kOnes, class T>
void class_rows(Tile<T>& t, int64_t c, bool logs, bool log_rests) {
  const T *m = t.row(kWeight), *inverse = t.row(kInverse), *rest = t.row(kRest);
  const T *log_sum = t.row(kLargest), *most = t.row(kA);
  const IVec<T> number = class_number<T>(c);
  const auto* label = t.labels();
  T *x = t.x + c * t.stride, *second = t.second + c * t.stride;
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    const Vec<T> e = load<T>(x + v), gap = load<T>(second + v);
    Vec<T> p = e * load<T>(inverse + v), own{}, other{};
    if ((kSome || kLabel) && logs) own = gap + load<T>(log_sum + v);
    if ((kSome || !kLabel) && log_rests) {
      const Vec<T> r = load<T>(rest + v);
      other = log_one_plus<T>(odds<T>(e, gap, r));
      other = select<T>((gap == T(0)) & (r < T(1)), load<T>(most + v), other);
    }
    Vec<T> loss = kLabel ? own : other;
    if (kSome) loss = select<T>(label_lanes<T>(label + v) == number, own, other);
    if (!kOnes) {
      const Vec<T> w = load<T>(m + v);
      p *= w;
      loss = product<T>(w, loss);
    }
    store<T>(x + v, p);
    store<T>(second + v, loss);
  }
}

// Adds a tile to the sums of its block.
template <class T>
void reduce_class_tile(Tile<T>& t, ClassRuns& runs, double* sums, double* weights) {
  const auto& s = t.job.slots;
  const int64_t classes = t.job.classes, per_row = (s.count + 1) * classes;
  const bool logs = s.cross_entropy >= 0, log_rests = s.cross_entropy_rest >= 0, ones = t.ones;
  auto slot = [&](int which) { return (which >= 0 ? which : s.count) * classes; };
  const int64_t reference = slot(s.reference), overlap = slot(s.overlap);
  const int64_t predicted = slot(s.predicted), voxels = slot(voxels_slot(t.job));
  const int64_t loss_of[2] = {slot(s.cross_entropy_rest), slot(s.cross_entropy)};
  class_exponentials(t);
  const T *m = t.row(kWeight), *rest = t.row(kRest);
  T *log_sum = t.row(kLargest), *most = t.row(kA);
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    const Vec<T> r = load<T>(rest + v), l = log_one_plus<T>(r);
    store<T>(log_sum + v, l);
    if (log_rests) store<T>(most + v, l - logarithm<T>(r));  // −log q of a class above ½
  }
  for (int64_t c = 0; c < classes; ++c) {
    runs.find(t, c);
    auto rows = [&](auto some, auto label) {
      constexpr bool kSome = decltype(some)::value, kLabel = decltype(label)::value;
      if (ones) class_rows<kSome, kLabel, true>(t, c, logs, log_rests);
      else class_rows<kSome, kLabel, false>(t, c, logs, log_rests);
    };
    using No = std::false_type;
    using Yes = std::true_type;
    if (runs.of_class == 0) rows(No{}, No{});
    else if (runs.of_class == t.n) rows(No{}, Yes{});
    else rows(Yes{}, No{});
    const T *p = t.x + c * t.stride, *loss = t.second + c * t.stride;
    runs.each([&](int64_t row, int is_class, int first, int count) {
      if (row < 0) return;
      double* to = sums + row * per_row + c;
      auto all = [&](const T* r) {
        return sum_run<T>(first, count,
                          [&](int v) __attribute__((always_inline)) { return load<T>(r + v); });
      };
      const double weight = ones ? double(count) : all(m), probability = all(p);
      if (c == 0) weights[row] += weight;
      to[voxels] += weight;
      to[predicted] += probability;
      to[loss_of[is_class]] += all(loss);
      if (!is_class) return;
      to[reference] += weight;
      to[overlap] += probability;
    });
  }
}

// Rows of a and b of class c, the derivatives by p and by the loss.
template <class T>
void fill_class_slopes(const Tile<T>& t, int64_t c, const ClassRuns& runs, T* a, T* b) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  runs.each([&](int64_t row, int is_class, int first, int count) {
    auto k = [&](int slot) {
      return row >= 0 && slot >= 0 ? T(t.job.coefficients_of(slot, t.sample, row)[c]) : T(0);
    };
    const T by_p = k(s.predicted) + (is_class ? k(s.overlap) : T(0));
    const T by_loss = k(is_class ? s.cross_entropy : s.cross_entropy_rest);
    // Vectors run over into the next run, which is filled after.
    for (int v = first; v < first + count; v += L) {
      store<T>(a + v, splat<T>(by_p));
      store<T>(b + v, splat<T>(by_loss));
    }
  });
}

// Writes the gradient of a tile; `spare` is another one, whose buffers are free.
template <class T>
void apply_class_tile(Tile<T>& t, ClassRuns& runs, Tile<T>& spare) {
  constexpr int L = lanes<T>;
  const int64_t classes = t.job.classes, stride = t.stride;
  class_exponentials(t);
  T *a = spare.x, *b = spare.second;
  for (int64_t c = 0; c < classes; ++c) {
    runs.find(t, c);
    fill_class_slopes(t, c, runs, a + c * stride, b + c * stride);
  }
  const T *m = t.row(kWeight), *inverse = t.row(kInverse), *rest = t.row(kRest);
  const auto* label = t.labels();
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const Vec<T> i = load<T>(inverse + v), r = load<T>(rest + v), w = load<T>(m + v);
    const IVec<T> y = label_lanes<T>(label + v);
    // Of the class above ½: t, and b if it is not the label.
    Vec<T> others{}, of_most{}, loss_of_most{};
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * stride + v;
      const Vec<T> e = load<T>(t.x + at), p = e * i, by_loss = load<T>(b + at);
      const IVec<T> most = p > T(0.5), is_label = y == class_number<T>(c);
      Vec<T> loss = drop<T>(most, by_loss * odds<T>(e, load<T>(t.second + at), r));
      loss = select<T>(is_label, -by_loss, loss);
      const Vec<T> turn = load<T>(a + at) * p + loss;
      others += drop<T>(most, turn);
      of_most += keep<T>(most, turn);
      loss_of_most += keep<T>(most & ~is_label, by_loss);
      store<T>(t.x + at, p);
      store<T>(a + at, turn);
    }
    const Vec<T> all = others + of_most, q = r * i, ratio = T(1) / r;
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * stride + v;
      const Vec<T> p = load<T>(t.x + at), turn = load<T>(a + at);
      const Vec<T> above = turn * q - p * (others - loss_of_most);
      const Vec<T> below = turn - p * all - drop<T>(p == T(0), p * ratio) * loss_of_most;
      store<T>(t.second + at, w * select<T>(p > T(0.5), above, below));
    }
  }
  write_rows(t, t.x, a, [&](const auto& row, const auto& put) {
    for (int64_t c = 0; c < classes; ++c) {
      const T* from = t.second + c * stride;
      auto to = row(c);
      for (int64_t v = 0, end = t.padded; v < end; v += L) put(to + v, load<T>(from + v));
    }
  });
}

template <class T>
void reduce_class_regions(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  Tile<T> tile(job, sample, scratch);
  ClassRuns runs;
  for (int64_t v = blocks.first; v < blocks.last; v += tile.n) {
    const int64_t block = blocks.of(v);
    tile.move(v, blocks.tile(v, tile.step), &blocks.faults[block]);
    reduce_class_tile(tile, runs, blocks.sums + block * job.rows * (job.slots.count + 1) * job.classes,
                      blocks.weights + block * job.rows);
  }
}

template <class T>
void apply_class_regions(const Job& job, int64_t sample, int64_t first, int64_t last,
                         void* scratch) {
  Tile<T> tile(job, sample, scratch), spare(job, sample, (char*)scratch + Tile<T>::bytes(job));
  ClassRuns runs;
  const int64_t lead = fastloss::voxels_to_line(job, sample);
  for (int64_t v = first; v < last; v += tile.n) {
    tile.move(v, tile_from(v, last, lead, tile.step), nullptr);
    apply_class_tile(tile, runs, spare);
  }
}

}  // namespace
