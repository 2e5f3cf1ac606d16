// Softmax of two classes: one exponential a voxel, all in registers.
//
// With d = x₁ − x₀ the probabilities are 1/(1+e^−|d|) and e^−|d|/(1+e^−|d|), and the gradient by x₀
// is the negative of that by x₁.
#pragma once

#include "tile.h"

namespace {

inline bool suits_two_classes(const Job& job) {
  const auto& s = job.slots;
  return job.activation == Activation::softmax && job.classes == 2 && s.predicted_squared < 0 &&
         s.uniform < 0 && s.gammas == 0 && s.top_k < 0;
}

constexpr int kPrefetch = kVectorBytes < 64 ? 256 : 512;  // voxels

// Fills two rows with d = x₁ − x₀ and e^−|d|; pair(v) has the logits. In a loop of its own, and
// what follows in another: the processor looks only so many operations ahead, and keeps busy if
// chains of them are short. `ahead(v)` prefetches, once per U vectors.
template <int U, class T, class Load, class Ahead>
FL_INLINE void fill_differences(Tile<T>& t, const Load& pair, const Ahead& ahead) {
  constexpr int L = lanes<T>;
  T *difference = t.row(kA), *exponentials = t.row(kB);
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  auto one = [&](int64_t v) {
    auto [a, b] = pair(v);
    Vec<T> d = drop<T>(a == b, b - a);  // equal infinities share
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

// p of a class and of the other one; `less`: where the class is the less probable.
template <class T>
FL_INLINE Pair<T> probabilities(Vec<T> e, IVec<T> less) {
  const Vec<T> big = T(1) / (e + T(1)), little = e * big;
  return {select<T>(less, little, big), select<T>(less, big, little)};
}

// Adds what two vectors hold to the sums of both classes in a slot, if it is wanted.
template <class T>
FL_INLINE void add_totals(double* sums, int slot, Vec<T> a, Vec<T> b) {
  if (slot < 0) return;
  sums[slot * 2] += total<T>(a);
  sums[slot * 2 + 1] += total<T>(b);
}

// Of a tile whose voxels all have the label kLabel, or any for −1: where it is 0, and what two
// vectors hold of such voxels, and of the others.
template <class T, int kLabel>
struct TwoLabels {
  IVec<T> zero{};

  FL_INLINE TwoLabels(const typename Types<T>::Int* label) {
    if (kLabel < 0) zero = label_lanes<T>(label) == IVec<T>{};
  }
  FL_INLINE Vec<T> of0(Vec<T> v) const {
    return kLabel == 0 ? v : kLabel == 1 ? Vec<T>{} : keep<T>(zero, v);
  }
  FL_INLINE Vec<T> of1(Vec<T> v) const {
    return kLabel == 1 ? v : kLabel == 0 ? Vec<T>{} : drop<T>(zero, v);
  }
  FL_INLINE Vec<T> choose(Vec<T> if0, Vec<T> if1) const {
    return kLabel == 0 ? if0 : kLabel == 1 ? if1 : select<T>(zero, if0, if1);
  }
};

template <class T, bool kEven, bool kLogs, int kLabel>
void reduce_two_rows(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  using Labels = TwoLabels<T, kLabel>;
  const auto& s = t.job.slots;
  const T* m = t.row(kWeight);
  const T *difference = t.row(kA), *exponentials = t.row(kB);
  differences(t);
  const auto* label = t.labels();
  // Voxels, those of label 0, both probabilities, those of the label, loss by label. Two loops:
  // the sums of one would not all stay in registers.
  Vec<T> all{}, n0{}, predicted0{}, predicted1{}, own0{}, own1{}, loss0{}, loss1{};
  IVec<T> count0{};
  const int64_t end = t.padded;
  for (int64_t v = 0; v < end; v += L) {
    const Labels labels(label + v);
    auto [p1, p0] =
        probabilities<T>(load<T>(exponentials + v), bits<T>(load<T>(difference + v)) < 0);
    if (kEven) {
      if (kLabel < 0) count0 -= labels.zero;
    } else {
      const Vec<T> w = load<T>(m + v);
      p0 *= w;
      p1 *= w;
      all += w;
      n0 += labels.of0(w);
    }
    predicted0 += p0;
    predicted1 += p1;
    own0 += labels.of0(p0);
    own1 += labels.of1(p1);
  }
  constexpr int kStep = 8 * L;
  for (int64_t first = 0; kLogs && first < end; first += kStep) {
    int64_t last = first + kStep < end ? first + kStep : end;
    // Σ log(1+e) = log Π(1+e), of which the product less 1 is exact where the e are small.
    Vec<T> product0{}, product1{};
    for (int64_t v = first; v < last; v += L) {
      const Labels labels(label + v);
      const Vec<T> d = load<T>(difference + v), e = load<T>(exponentials + v);
      // −log p is the logit's gap to the larger one, and log(1+e).
      Vec<T> gap0 = larger(splat<T>(0), d), gap1 = larger(splat<T>(0), -d);
      if (kEven) {
        const Vec<T> e0 = labels.of0(e), e1 = labels.of1(e);
        if (kLabel != 1) product0 = product0 * (e0 + T(1)) + e0;
        if (kLabel != 0) product1 = product1 * (e1 + T(1)) + e1;
      } else {
        Vec<T> rest = log_one_plus_small(e), w = load<T>(m + v);
        gap0 = w * (gap0 + rest);
        gap1 = w * (gap1 + rest);
      }
      loss0 += labels.of0(gap0);
      loss1 += labels.of1(gap1);
    }
    if (kEven) {
      if (kLabel != 1) loss0 += log_one_plus<T>(product0);
      if (kLabel != 0) loss1 += log_one_plus<T>(product1);
    }
  }
  double n = kEven ? double(t.n) : total<T>(all), zeros = total<T>(n0);
  if (kEven)
    zeros = kLabel < 0 ? total<T>(__builtin_convertvector(count0, Vec<T>)) : kLabel == 0 ? n : 0;
  *weight += n;
  sums[s.reference * 2] += zeros;
  sums[s.reference * 2 + 1] += n - zeros;
  add_totals<T>(sums, s.overlap, own0, own1);
  add_totals<T>(sums, s.predicted, predicted0, predicted1);
  add_totals<T>(sums, s.cross_entropy, loss0, loss1);
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
    // −log p is the logit's gap to the larger one, and log(1+e).
    loss0 += product<T>(a, larger(splat<T>(0), d) + rest);
    loss1 += product<T>(b, larger(splat<T>(0), -d) + rest);
  }
  *weight += kEven ? double(t.n) : total<T>(all);
  add_totals<T>(sums, s.reference, n0, n1);
  add_totals<T>(sums, s.overlap, own0, own1);
  add_totals<T>(sums, s.predicted, predicted0, predicted1);
  add_totals<T>(sums, s.cross_entropy, loss0, loss1);
}

template <class T, bool kEven, bool kLogs>
void reduce_two(Tile<T>& t, double* sums, double* weight) {
  if (t.job.dense) return reduce_two_dense_rows<T, kEven, kLogs>(t, sums, weight);
  const int32_t only = t.only_label();
  if (only == 0) reduce_two_rows<T, kEven, kLogs, 0>(t, sums, weight);
  else if (only == 1) reduce_two_rows<T, kEven, kLogs, 1>(t, sums, weight);
  else reduce_two_rows<T, kEven, kLogs, -1>(t, sums, weight);
}

template <class T>
void reduce_two_classes(Tile<T>& t, double* sums, double* weight) {
  bool logs = t.job.slots.cross_entropy >= 0;
  auto run = logs ? (t.even ? reduce_two<T, true, true> : reduce_two<T, false, true>)
                  : (t.even ? reduce_two<T, true, false> : reduce_two<T, false, false>);
  run(t, sums, weight);
}

// The gradient by x₁ to a row, of a dense target: p₀ p₁ (k₁ − k₀) + p₁ l₀ − p₀ l₁, where k is the
// derivative by p and l the cross-entropy's coefficient times the target.
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

// The same of a label map.
template <class T, int kLabel>
void two_label_gradients(Tile<T>& t, T* gradient) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  auto k = [&](int slot, int c) { return slot >= 0 ? t.table[slot * 2 + c] : T(0); };
  T turn = k(s.predicted, 1) - k(s.predicted, 0);
  Vec<T> if0 = splat<T>(turn - k(s.overlap, 0)), if1 = splat<T>(turn + k(s.overlap, 1));
  Vec<T> loss0 = splat<T>(k(s.cross_entropy, 0)), loss1 = splat<T>(-k(s.cross_entropy, 1));
  const T *difference = t.row(kA), *exponentials = t.row(kB), *m = t.row(kWeight);
  const bool even = t.even;
  const auto* label = t.labels();
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const TwoLabels<T, kLabel> labels(label + v);
    const IVec<T> zero = kLabel < 0 ? labels.zero : class_number<T>(kLabel == 0 ? -1 : 0);
    const IVec<T> less = bits<T>(load<T>(difference + v)) ^ zero;  // its sign alone counts
    // Label 1: p₀ (p₁ k − loss₁); label 0: p₁ (p₀ k + loss₀).
    auto [own, other] = probabilities<T>(load<T>(exponentials + v), less < 0);
    Vec<T> g = other * (own * labels.choose(if0, if1) + labels.choose(loss0, loss1));
    if (!even) g *= load<T>(m + v);
    store<T>(gradient + v, g);
  }
}

template <class T>
void apply_two_classes(Tile<T>& t) {
  // Computed for the whole tile first: stores to the result between the loads of the logits would
  // hold those up wherever both have the same place in a page.
  T* gradient = t.row(kC);
  differences(t);
  const int32_t only = t.job.dense ? -1 : t.only_label();
  if (t.job.dense) two_dense_gradients(t, gradient);
  else if (only == 0) two_label_gradients<T, 0>(t, gradient);
  else if (only == 1) two_label_gradients<T, 1>(t, gradient);
  else two_label_gradients<T, -1>(t, gradient);
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

}  // namespace
