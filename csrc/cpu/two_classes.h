// Softmax of two classes: one exponential per voxel, all in registers.
//
// With d = x₁ − x₀ and e = e^−|d| ≤ 1 the probabilities are 1/(1+e) and e/(1+e), and
//   −log p_c = max(0, x_other − x_c) + log(1+e).
// As ∂p₁/∂x₁ = p₀ p₁ = −∂p₀/∂x₁, with k_c the derivative by p_c and l_c that by −log p_c,
//   ∂L/∂x₁ = p₀ p₁ (k₁ − k₀) + p₁ l₀ − p₀ l₁ = −∂L/∂x₀.
#pragma once

#include "tile.h"

namespace {

// The sums that this path computes.
constexpr uint32_t kTwoClassSums =
    fastloss::kReference | fastloss::kOverlap | fastloss::kPredicted | fastloss::kCrossEntropy;

inline bool suits_two_classes(const Job& job) {
  return job.activation == Activation::softmax && job.classes == 2 &&
         job.asks_only_for(kTwoClassSums) && !job.losses;
}

constexpr int kPrefetch = kVectorBytes < 64 ? 256 : 512;  // voxels

// Fills two rows with d = x₁ − x₀ and e^−|d|; pair(v) returns the logits. The next step has a loop
// of its own: short dependency chains fit the reorder buffer. `ahead(v)` prefetches, once per U
// vectors.
template <int U, class T, class Load, class Ahead>
FL_INLINE void fill_differences(Tile<T>& t, const Load& pair, const Ahead& ahead) {
  constexpr int L = lanes<T>;
  T *difference = t.row(kA), *exponentials = t.row(kB);
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  auto one = [&](int64_t v) {
    auto [a, b] = pair(v);
    Vec<T> d = drop<T>(a == b, b - a);  // equal infinities: p = ½
    store<T>(difference + v, d);
    store<T>(exponentials + v, exponential<T>(from_bits<T>(bits<T>(d) | sign)));
  };
  int64_t v = 0, end = t.padded;
  for (; v + U * L <= end; v += U * L) {
    ahead(v);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) one(v + u * L);
  }
  for (; v < end; v += L) one(v);
}

template <class T>
void differences(Tile<T>& t) {
  constexpr int L = lanes<T>;
  if (t.contiguous()) {
    with_storage<T>(t.job.logits.dtype, [&](auto number) {
      using S = decltype(number);
      const S *x0 = t.template source_row<S>(0), *x1 = t.template source_row<S>(1);
      fill_differences<64 / int(sizeof(S)) / L>(  // vectors of a cache line
          t, [&](int64_t v) { return Pair<T>{load_as<S, T>(x0 + v), load_as<S, T>(x1 + v)}; },
          [&](int64_t v) {
            prefetch(x0 + v + kPrefetch);
            prefetch(x1 + v + kPrefetch);
          });
    });
    return;
  }
  if constexpr (sizeof(T) == 4) {
    if (t.channels_last(t.job.logits, t.logit_runs) && t.n == t.padded && !t.holes) {
      with_storage<T>(t.job.logits.dtype, [&](auto number) {
        using S = decltype(number);
        const S* x = t.template source_row<S>(0);
        fill_differences<1>(
            t,
            [&](int64_t v) {
              return unzip(load_as<S, T>(x + 2 * v), load_as<S, T>(x + 2 * v + L));
            },
            [](int64_t) {});
      });
      return;
    }
  }
  t.load_logits();
  fill_differences<1>(
      t, [&](int64_t v) { return Pair<T>{load<T>(t.x + v), load<T>(t.x + t.stride + v)}; },
      [](int64_t) {});
}

// p of a class and of the other class; `less` masks where the class is the less probable one.
template <class T>
FL_INLINE Pair<T> probabilities(Vec<T> e, IVec<T> less) {
  const Vec<T> big = T(1) / (e + T(1)), little = e * big;
  return {select<T>(less, little, big), select<T>(less, big, little)};
}

// Adds the totals of two vectors to the sums of both classes in a slot; −1: no slot.
template <class T>
FL_INLINE void add_totals(double* sums, int slot, Vec<T> a, Vec<T> b) {
  if (slot < 0) return;
  sums[slot * 2] += total<T>(a);
  sums[slot * 2 + 1] += total<T>(b);
}

// zero(v) masks the voxels of label 0, in a tile that has both labels.
template <class T, class Number>
struct BothLabels {
  static constexpr bool k0 = true, k1 = true, kCounted = sizeof(Number) == 1;
  const Number* label;
  int ones = 0;  // if kCounted: the number of voxels of label 1
  FL_INLINE IVec<T> zero(int64_t v) const { return label_lanes<T>(label + v) == IVec<T>{}; }
};
// The same for a tile whose voxels all have the label kLabel.
template <class T, int kLabel>
struct OneLabel {
  static constexpr bool k0 = kLabel == 0, k1 = kLabel == 1, kCounted = true;
  int ones;
  FL_INLINE IVec<T> zero(int64_t) const { return IVec<T>{} + (kLabel - 1); }
};

// a where the label is 0, b where it is 1.
template <class Labels, class T>
FL_INLINE Vec<T> choose(IVec<T> zero, Vec<T> a, Vec<T> b) {
  return !Labels::k1 ? a : !Labels::k0 ? b : select<T>(zero, a, b);
}
// Adds v to the sum of each voxel's label.
template <class Labels, class T>
FL_INLINE void add(IVec<T> zero, Vec<T> v, Vec<T>& sum0, Vec<T>& sum1) {
  if (Labels::k0) sum0 = Labels::k1 ? select<T>(zero, sum0 + v, sum0) : sum0 + v;
  if (Labels::k1) sum1 = Labels::k0 ? select<T>(zero, sum1, sum1 + v) : sum1 + v;
}

// Loads the logits of a tile to x.
template <class T>
void load_two(Tile<T>& t) {
  if constexpr (sizeof(T) == 4)
    if (t.channels_last(t.job.logits, t.logit_runs) && t.n == t.padded && !t.holes) {
      constexpr int L = lanes<T>;
      T *x0 = t.x, *x1 = t.x + t.stride;
      return with_storage<T>(t.job.logits.dtype, [&](auto number) {
        using S = decltype(number);
        const S* x = t.template source_row<S>(0);
        for (int64_t v = 0, end = t.padded; v < end; v += L) {
          prefetch_lines<2 * L* int(sizeof(S))>(x + 2 * v + 2 * kPrefetch);
          auto [a, b] = unzip(load_as<S, T>(x + 2 * v), load_as<S, T>(x + 2 * v + L));
          store<T>(x0 + v, a);
          store<T>(x1 + v, b);
        }
      });
    }
  t.load_logits();
}

// Calls use(even, x0, x1, labels) for a tile with a label map. The logits are read in place where
// possible; if `use` then returns false, it is called again with loaded logits.
template <class T, class Use>
void with_labels(Tile<T>& t, const Use& use) {
  auto with_numbers = [&](auto even, const auto* x0, const auto* x1) {
    if constexpr (sizeof(T) == 4)
      if (t.label_bytes) {
        if (t.ones_among == 0) return use(even, x0, x1, OneLabel<T, 0>{0});
        if (t.ones_among == t.n) return use(even, x0, x1, OneLabel<T, 1>{t.n});
        return use(even, x0, x1, BothLabels<T, uint8_t>{t.label_bytes, t.ones_among});
      }
    const int32_t only = t.only_label();
    if (only == 0) return use(even, x0, x1, OneLabel<T, 0>{0});
    if (only == 1) return use(even, x0, x1, OneLabel<T, 1>{t.n});
    return use(even, x0, x1, BothLabels<T, typename Types<T>::Int>{t.labels()});
  };
  bool done = false;
  if (t.contiguous() && t.even) {
    with_storage<T>(t.job.logits.dtype, [&](auto number) {
      using S = decltype(number);
      done =
          with_numbers(std::true_type{}, t.template source_row<S>(0), t.template source_row<S>(1));
    });
    if (done) return;
  }
  load_two(t);
  const T *x0 = t.x, *x1 = t.x + t.stride;
  if (t.even && !done && with_numbers(std::true_type{}, x0, x1)) return;
  if (t.label_bytes) t.widen_labels();
  use(std::false_type{}, x0, x1, BothLabels<T, typename Types<T>::Int>{t.labels()});
}

// −127 ln 2 (−1023 ln 2), where 2^n becomes 0: `NearExponential` returns exactly 0.
template <class T>
constexpr T kNothing = sizeof(T) == 4 ? T(-88.029692) : T(-709.0895657128241);

// Adds the sums of a tile. Returns false and adds nothing if `kEven` and some voxel has a NaN or
// two equal infinities.
template <bool kEven, bool kLogs, class T, class S, class Labels>
bool reduce_two_labels(Tile<T>& t, const S* x0, const S* x1, const Labels& labels, double* sums,
                       double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T* m = t.row(kWeight);
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  const NearExponential<T> exponential;
  // Per label: the number of its voxels, Σ p of the label, Σ p of the other class, Σ loss.
  Vec<T> n0{}, n1{}, own0{}, own1{}, other0{}, other1{}, loss0{}, loss1{};
  // Σ log(1+e) = log(1+P) with P = Π(1+e) − 1: one logarithm for up to 64 voxels. The recurrence
  // P ← P (1+e) + e never adds 1, so that P is exact where all e are small.
  Vec<T> product0{}, product1{};
  IVec<T> count0{};
  auto one = [&](int64_t v) __attribute__((always_inline)) {
    const Vec<T> a = load_as<S, T>(x0 + v), b = load_as<S, T>(x1 + v);
    const IVec<T> zero = labels.zero(v);
    // z = x_other − x_label
    Vec<T> z = choose<Labels, T>(zero, b - a, a - b);
    if (!kEven) z = drop<T>(a == b, z);  // equal infinities: p = ½
    const Vec<T> e = exponential(larger(splat<T>(kNothing<T>), from_bits<T>(bits<T>(z) | sign)));
    const Vec<T> sum = e + T(1), big = T(1) / sum, little = e * big;
    const IVec<T> more = bits<T>(z) < 0;
    Vec<T> own = select<T>(more, big, little), other = select<T>(more, little, big);
    if (kEven) {
      if (!Labels::kCounted) count0 -= zero;
    } else {
      const Vec<T> w = load<T>(m + v);
      own *= w;
      other *= w;
      add<Labels, T>(zero, w, n0, n1);
    }
    add<Labels, T>(zero, own, own0, own1);
    add<Labels, T>(zero, other, other0, other1);
    if (!kLogs) return;
    // −log p_label = max(0, z) + log(1+e)
    const Vec<T> gap = larger(splat<T>(0), z);
    if (kEven) {
      add<Labels, T>(zero, gap, loss0, loss1);
      const Vec<T> next0 = product0 * sum + e, next1 = product1 * sum + e;
      if (Labels::k0) product0 = Labels::k1 ? select<T>(zero, next0, product0) : next0;
      if (Labels::k1) product1 = Labels::k0 ? select<T>(zero, product1, next1) : next1;
    } else {
      add<Labels, T>(zero, load<T>(m + v) * (log_one_plus_small(e) + gap), loss0, loss1);
    }
  };
  constexpr int U = kEven ? 64 / int(sizeof(S)) / L : 1;  // vectors of a cache line
  constexpr int kMost = 64 * L;                           // voxels whose product does not overflow
  int64_t v = 0;
  for (int64_t end = t.padded, last; v < end;) {
    last = kMost < kMaxTile && v + kMost < end ? v + kMost : end;
    for (; v + U * L <= last; v += U * L) {
      if (kEven) {
        prefetch(x0 + v + kPrefetch);
        prefetch(x1 + v + kPrefetch);
      }
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) one(v + u * L);
    }
    for (; v < last; v += L) one(v);
    if (kEven && kLogs) {
      if (Labels::k0) loss0 += log_one_plus<T>(product0);
      if (Labels::k1) loss1 += log_one_plus<T>(product1);
      product0 = product1 = Vec<T>{};
    }
  }
  if (kEven) {
    const Vec<T> all = (own0 + own1) + (other0 + other1);
    if (any<T>(all != all)) return false;
  }
  double zeros = total<T>(n0), ones = total<T>(n1);
  if (kEven) {
    if (Labels::kCounted) zeros = t.n - labels.ones;
    else zeros = total<T>(__builtin_convertvector(count0, Vec<T>));
    ones = t.n - zeros;
  }
  *weight += zeros + ones;
  sums[s.reference * 2] += zeros;
  sums[s.reference * 2 + 1] += ones;
  add_totals<T>(sums, s.overlap, own0, own1);
  add_totals<T>(sums, s.predicted, own0 + other1, own1 + other0);
  if (kLogs) add_totals<T>(sums, s.cross_entropy, loss0, loss1);
  return true;
}

template <class T, bool kEven, bool kLogs>
void reduce_two_dense_rows(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T* m = t.row(kWeight);
  const T *difference = t.row(kA), *exponentials = t.row(kB);
  differences(t);
  const T *g0 = t.target_numbers(0, t.row(kD)), *g1 = t.target_numbers(1, t.row(kE));
  Vec<T> all{}, n0{}, n1{}, predicted0{}, predicted1{}, own0{}, own1{}, loss0{}, loss1{};
  const int64_t end = t.padded;
  for (int64_t v = 0; v < end; v += L) {
    Vec<T> a = load<T>(g0 + v), b = load<T>(g1 + v);
    auto [p1, p0] =
        probabilities<T>(load<T>(exponentials + v), bits<T>(load<T>(difference + v)) < 0);
    if (!kEven) {
      const Vec<T> w = load<T>(m + v);
      p0 *= w;
      p1 *= w;
      all += w;
      n0 += w * a;
      n1 += w * b;
    } else {
      n0 += a;
      n1 += b;
    }
    predicted0 += p0;
    predicted1 += p1;
    own0 += p0 * a;
    own1 += p1 * b;
  }
  for (int64_t v = 0; kLogs && v < end; v += L) {
    const Vec<T> d = load<T>(difference + v), rest = log_one_plus_small(load<T>(exponentials + v));
    Vec<T> a = load<T>(g0 + v), b = load<T>(g1 + v);
    if (!kEven) {
      const Vec<T> w = load<T>(m + v);
      a *= w;
      b *= w;
    }
    loss0 += product<T>(a, larger(splat<T>(0), d) + rest);
    loss1 += product<T>(b, larger(splat<T>(0), -d) + rest);
  }
  *weight += kEven ? double(t.n) : total<T>(all);
  add_totals<T>(sums, s.reference, n0, n1);
  add_totals<T>(sums, s.overlap, own0, own1);
  add_totals<T>(sums, s.predicted, predicted0, predicted1);
  add_totals<T>(sums, s.cross_entropy, loss0, loss1);
}

template <class T>
void reduce_two_classes(Tile<T>& t, double* sums, double* weight) {
  const bool logs = t.job.slots.cross_entropy >= 0;
  if (t.job.dense) {
    auto run = logs ? (t.even ? reduce_two_dense_rows<T, true, true>
                              : reduce_two_dense_rows<T, false, true>)
                    : (t.even ? reduce_two_dense_rows<T, true, false>
                              : reduce_two_dense_rows<T, false, false>);
    return run(t, sums, weight);
  }
  with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
    constexpr bool kEven = decltype(even)::value;
    return logs ? reduce_two_labels<kEven, true>(t, x0, x1, labels, sums, weight)
                : reduce_two_labels<kEven, false>(t, x0, x1, labels, sums, weight);
  });
}

// Writes the gradient by x₁ to a row, for a dense target: p₀ p₁ (k₁ − k₀) + p₁ l₀ − p₀ l₁, where l
// is the cross-entropy's coefficient times the target.
template <class T>
void two_dense_gradients(Tile<T>& t, T* gradient) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  auto k = [&](int slot, int c) { return splat<T>(slot >= 0 ? t.table[slot * 2 + c] : T(0)); };
  const Vec<T> turn = k(s.predicted, 1) - k(s.predicted, 0);
  const Vec<T> overlap0 = k(s.overlap, 0), overlap1 = k(s.overlap, 1);
  const Vec<T> loss0 = k(s.cross_entropy, 0), loss1 = k(s.cross_entropy, 1);
  const T *difference = t.row(kA), *exponentials = t.row(kB), *m = t.row(kWeight);
  const T *g0 = t.target_numbers(0, t.row(kD)), *g1 = t.target_numbers(1, t.row(kE));
  const bool even = t.even;
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const Vec<T> a = load<T>(g0 + v), b = load<T>(g1 + v);
    auto [p1, p0] =
        probabilities<T>(load<T>(exponentials + v), bits<T>(load<T>(difference + v)) < 0);
    Vec<T> region = (turn + overlap1 * b - overlap0 * a) * p1 - loss1 * b;
    Vec<T> g = region * p0 + (loss0 * a) * p1;
    if (!even) g *= load<T>(m + v);
    store<T>(gradient + v, g);
  }
}

// The derivatives by region sums and by the cross-entropy that all voxels of a tile share: of a
// voxel of label 0, and of label 1.
template <class T>
struct SharedTwo {
  Vec<T> region0, region1, loss0, loss1;

  FL_INLINE explicit SharedTwo(const Tile<T>& t) {
    const auto& s = t.job.slots;
    auto k = [&](int slot, int c) { return slot >= 0 ? t.table[slot * 2 + c] : T(0); };
    const T turn = k(s.predicted, 1) - k(s.predicted, 0);
    region0 = splat<T>(turn - k(s.overlap, 0)), region1 = splat<T>(turn + k(s.overlap, 1));
    loss0 = splat<T>(k(s.cross_entropy, 0)), loss1 = splat<T>(-k(s.cross_entropy, 1));
  }
  template <class Labels>
  FL_INLINE Pair<T> at(int64_t, IVec<T> zero) const {
    return {choose<Labels, T>(zero, region0, region1), choose<Labels, T>(zero, loss0, loss1)};
  }
};

// The same for a label map. As only the label's l is not 0, with z = x_other − x_label,
// own = 1/(1+e^z) and other = e^z own, the gradient is
//   label 1: p₀ (p₁ k − l₁),  label 0: p₁ (p₀ k + l₀),  with k = k₁ − k₀.
// `Slopes` has what multiplies other · own and other: ±k and ±l, by label.
// Returns false if `kEven` and some voxel has a NaN or two equal infinities.
template <bool kEven, class T, class S, class Labels, class Slopes>
bool two_label_gradients(Tile<T>& t, const S* x0, const S* x1, const Labels& labels,
                         const Slopes& slopes, T* gradient) {
  constexpr int L = lanes<T>;
  const T* m = t.row(kWeight);
  const NearExponential<T> exponential;
  Vec<T> probe{};
  auto one = [&](int64_t v) __attribute__((always_inline)) {
    const Vec<T> a = load_as<S, T>(x0 + v), b = load_as<S, T>(x1 + v);
    const IVec<T> zero = labels.zero(v);
    Vec<T> z = choose<Labels, T>(zero, b - a, a - b);
    if (!kEven) z = drop<T>(a == b, z);  // equal infinities: p = ½
    z = larger(splat<T>(kNothing<T>), smaller(splat<T>(-Numbers<T>::smallest_exponent), z));
    const Vec<T> e = exponential(z), own = T(1) / (e + T(1)), other = e * own;
    if (kEven) probe += own;
    const Pair<T> k = slopes.template at<Labels>(v, zero);
    Vec<T> g = other * (own * k.first + k.second);
    if (!kEven) g *= load<T>(m + v);
    store<T>(gradient + v, g);
  };
  constexpr int U = kEven ? 64 / int(sizeof(S)) / L : 1;  // vectors of a cache line
  int64_t v = 0, end = t.padded;
  for (; v + U * L <= end; v += U * L) {
    if (kEven) {
      prefetch(x0 + v + kPrefetch);
      prefetch(x1 + v + kPrefetch);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) one(v + u * L);
  }
  for (; v < end; v += L) one(v);
  return !any<T>(probe != probe);
}

// Writes a row as the gradient by x₁, and its negative as that by x₀.
template <class T>
void write_opposites(Tile<T>& t, const T* gradient) {
  const auto& out = t.job.out;
  if (sizeof(T) == 4 && out.channel_stride == item_size(out.dtype) && t.n == t.padded) {
    t.find_out();
    if (t.channels_last(out, t.out_runs)) {
      with_storage<float>(out.dtype, [&](auto number) {
        using S = decltype(number);
        S* to = (S*)(t.out_base(0) + t.out_runs.run[0].offset);
        const float* from = (const float*)gradient;
        if (t.job.stream && uintptr_t(to) % 64 == 0) store_pairs<S, true>(from, t.padded, to);
        else store_pairs<S, false>(from, t.padded, to);
      });
      return;
    }
  }
  write_rows(t, t.second, t.x, [&](const auto& row, const auto& put) {
    put.opposites(gradient, t.padded, row(1), row(0));
  });
}

template <class T>
void apply_two_classes(Tile<T>& t) {
  // The whole tile is computed first: stores between the loads would stall them by 4 KiB aliasing.
  T* gradient = t.row(kC);
  if (t.job.dense) {
    differences(t);
    two_dense_gradients(t, gradient);
  } else {
    const SharedTwo<T> slopes(t);
    with_labels(t, [&](auto even, auto x0, auto x1, const auto& labels) {
      return two_label_gradients<decltype(even)::value>(t, x0, x1, labels, slopes, gradient);
    });
  }
  write_opposites(t, gradient);
}

}  // namespace
