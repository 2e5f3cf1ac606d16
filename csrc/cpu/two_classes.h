// Softmax of two classes with a label map: one exponential a voxel, all in registers.
//
// With d = x₁ − x₀ the probabilities are 1/(1+e^−|d|) and e^−|d|/(1+e^−|d|), and the gradient by x₀
// is the negative of that by x₁.
#pragma once

#include "tile.h"

namespace {

inline bool suits_two_classes(const Job& job) {
  const auto& s = job.slots;
  return job.activation == Activation::softmax && !job.dense && job.classes == 2 &&
         s.predicted_squared < 0 && s.uniform < 0 && s.gammas == 0 && s.top_k < 0;
}

constexpr int kPrefetch = 256;  // voxels

// Fills two rows with d = x₁ − x₀ and e^−|d|. In a loop of its own, and what follows in another:
// the processor looks only so many operations ahead, and keeps busy if chains of them are short.
template <class T, class S>
void differences(const Tile<T>& t, const S* x0, const S* x1, T* difference, T* exponentials) {
  constexpr int L = lanes<T>, U = 64 / int(sizeof(S)) / L;  // vectors of a cache line
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  auto one = [&](int64_t v) {
    Vec<T> a = load_as<S, T>(x0 + v), b = load_as<S, T>(x1 + v);
    Vec<T> d = drop<T>(a == b, b - a);  // equal infinities share
    store<T>(difference + v, d);
    store<T>(exponentials + v, exponential<T>(from_bits<T>(bits<T>(d) | sign)));
  };
  int64_t v = 0, end = t.padded;
  for (; v + U * L <= end; v += U * L) {
    prefetch(x0 + v + kPrefetch);
    prefetch(x1 + v + kPrefetch);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) one(v + u * L);
  }
  for (; v < end; v += L) one(v);
}

// Calls f(x0, x1) with the two rows of logits, as they lie in memory or loaded.
template <class T, class F>
void with_two_rows(Tile<T>& t, const F& f) {
  if (t.contiguous()) {
    with_storage<T>(t.job.logits.dtype, [&](auto number) {
      using S = decltype(number);
      f(t.template source_row<S>(0), t.template source_row<S>(1));
    });
  } else {
    t.load_logits();
    f((const T*)t.x, (const T*)t.x + t.stride);
  }
}

template <class T>
void differences(Tile<T>& t, T* difference, T* exponentials) {
  with_two_rows(
      t, [&](const auto* x0, const auto* x1) { differences(t, x0, x1, difference, exponentials); });
}

// The probabilities, of one class where the mask is set and of the other where it is not.
template <class T>
struct Pair {
  Vec<T> set, unset;
};

// `less` is set where the class is the less probable one.
template <class T>
FL_INLINE Pair<T> probabilities(Vec<T> e, IVec<T> less) {
  const Vec<T> big = T(1) / (e + T(1)), little = e * big;
  return {select<T>(less, little, big), select<T>(less, big, little)};
}

template <class T, bool kEven, bool kLogs>
void reduce_two_rows(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T* m = t.row(kWeight);
  T *difference = t.row(kA), *exponentials = t.row(kB);
  differences(t, difference, exponentials);
  const auto* label = t.labels();
  // Voxels, those of label 0, both probabilities, those of the label, loss by label. Two loops:
  // the sums of one would not all stay in registers.
  Vec<T> all{}, n0{}, predicted0{}, predicted1{}, own0{}, own1{}, loss0{}, loss1{};
  IVec<T> count0{};
  const int64_t end = t.padded;
  for (int64_t v = 0; v < end; v += L) {
    const IVec<T> zero = label_lanes<T>(label + v) == IVec<T>{};
    auto [p1, p0] =
        probabilities<T>(load<T>(exponentials + v), bits<T>(load<T>(difference + v)) < 0);
    if (kEven) {
      count0 -= zero;
    } else {
      const Vec<T> w = load<T>(m + v);
      p0 *= w;
      p1 *= w;
      all += w;
      n0 += keep<T>(zero, w);
    }
    predicted0 += p0;
    predicted1 += p1;
    own0 += keep<T>(zero, p0);
    own1 += drop<T>(zero, p1);
  }
  constexpr int kStep = 8 * L;
  for (int64_t first = 0; kLogs && first < end; first += kStep) {
    int64_t last = first + kStep < end ? first + kStep : end;
    // Σ log(1+e) = log Π(1+e), of which the product less 1 is exact where the e are small.
    Vec<T> product0{}, product1{};
    for (int64_t v = first; v < last; v += L) {
      const Vec<T> d = load<T>(difference + v), e = load<T>(exponentials + v);
      const IVec<T> zero = label_lanes<T>(label + v) == IVec<T>{};
      // −log p is the logit's gap to the larger one, and log(1+e).
      Vec<T> gap0 = larger(splat<T>(0), d), gap1 = larger(splat<T>(0), -d);
      if (kEven) {
        const Vec<T> e0 = keep<T>(zero, e), e1 = drop<T>(zero, e);
        product0 = product0 * (e0 + T(1)) + e0;
        product1 = product1 * (e1 + T(1)) + e1;
      } else {
        Vec<T> rest = log_one_plus_small(e), w = load<T>(m + v);
        gap0 = w * (gap0 + rest);
        gap1 = w * (gap1 + rest);
      }
      loss0 += keep<T>(zero, gap0);
      loss1 += drop<T>(zero, gap1);
    }
    if (kEven) {
      loss0 += log_one_plus<T>(product0);
      loss1 += log_one_plus<T>(product1);
    }
  }
  if (kEven) n0 = __builtin_convertvector(count0, Vec<T>);
  double n = kEven ? double(t.n) : total<T>(all), zeros = total<T>(n0);
  *weight += n;
  auto add = [&](int slot, double a, double b) {
    if (slot < 0) return;
    sums[slot * 2] += a;
    sums[slot * 2 + 1] += b;
  };
  add(s.reference, zeros, n - zeros);
  add(s.overlap, total<T>(own0), total<T>(own1));
  add(s.predicted, total<T>(predicted0), total<T>(predicted1));
  add(s.cross_entropy, total<T>(loss0), total<T>(loss1));
}

template <class T>
void reduce_two_classes(Tile<T>& t, double* sums, double* weight) {
  bool logs = t.job.slots.cross_entropy >= 0;
  auto run = logs ? (t.even ? reduce_two_rows<T, true, true> : reduce_two_rows<T, false, true>)
                  : (t.even ? reduce_two_rows<T, true, false> : reduce_two_rows<T, false, false>);
  run(t, sums, weight);
}

template <class T>
void apply_two_classes(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  auto k = [&](int slot, int c) { return slot >= 0 ? t.table[slot * 2 + c] : T(0); };
  T turn = k(s.predicted, 1) - k(s.predicted, 0);
  Vec<T> if0 = splat<T>(turn - k(s.overlap, 0)), if1 = splat<T>(turn + k(s.overlap, 1));
  Vec<T> loss0 = splat<T>(k(s.cross_entropy, 0)), loss1 = splat<T>(-k(s.cross_entropy, 1));
  const T* m = t.row(kWeight);
  bool even = t.even;
  // The gradient by x₁. Computed for the whole tile first: stores to the result between the loads
  // of the logits would hold those up wherever both have the same place in a page.
  T *difference = t.row(kA), *exponentials = t.row(kB), *gradient = t.row(kC);
  differences(t, difference, exponentials);
  const auto* label = t.labels();
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const IVec<T> zero = label_lanes<T>(label + v) == IVec<T>{};
    const IVec<T> less = bits<T>(load<T>(difference + v)) ^ zero;  // its sign alone counts
    // Label 1: p₀ (p₁ k − loss₁); label 0: p₁ (p₀ k + loss₀).
    auto [own, other] = probabilities<T>(load<T>(exponentials + v), less < 0);
    Vec<T> g = other * (own * select<T>(zero, if0, if1) + select<T>(zero, loss0, loss1));
    if (!even) g *= load<T>(m + v);
    store<T>(gradient + v, g);
  }
  write_rows(t, t.second, t.x, [&](const auto& row, const auto& put) {
    put.opposites(gradient, t.padded, row(1), row(0));
  });
}

}  // namespace
