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
         s.predicted_squared < 0 && s.uniform < 0 && s.gammas == 0;
}

constexpr int kPrefetch = 256;  // voxels

// Fills two rows with d = x₁ − x₀ and e^−|d|. In a loop of its own, and what follows in another:
// the processor looks only so many operations ahead, and keeps busy if chains of them are short.
template <class T, class S>
void differences(const Tile<T>& t, const S* x0, const S* x1, T* difference, T* exponentials) {
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  for (int v = 0; v < t.padded; v += lanes<T>) {
    prefetch(x0 + v + kPrefetch);
    prefetch(x1 + v + kPrefetch);
    Vec<T> a = load_as<S, T>(x0 + v), b = load_as<S, T>(x1 + v);
    Vec<T> d = drop<T>(a == b, b - a);  // equal infinities share
    store<T>(difference + v, d);
    store<T>(exponentials + v, exponential<T>(from_bits<T>(bits<T>(d) | sign)));
  }
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

// Of one vector of voxels: the label's probability and the other's.
template <class T>
struct Pair {
  IVec<T> one;    // where the label is 1
  Vec<T> margin;  // the label's logit less the other
  Vec<T> own, other;
};

template <class T>
FL_INLINE Pair<T> pair(Vec<T> d, Vec<T> e, IVec<T> label) {
  const IVec<T> sign = bits<T>(splat<T>(T(-0.0)));
  Pair<T> r;
  r.one = label != IVec<T>{};
  r.margin = from_bits<T>(bits<T>(d) ^ (~r.one & sign));
  Vec<T> big = T(1) / (e + T(1)), little = e * big;
  IVec<T> right = r.margin > T(0);
  r.own = select<T>(right, big, little);
  r.other = select<T>(right, little, big);
  return r;
}

template <class T, bool kEven, bool kLogs>
void reduce_two_rows(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T* m = t.row(kWeight);
  T *difference = t.row(kA), *exponentials = t.row(kB);
  differences(t, difference, exponentials);
  // By label: voxels, probability of the label, probability of the other, loss.
  Vec<T> all{}, n1{}, own0{}, own1{}, other0{}, other1{}, loss0{}, loss1{};
  constexpr int kStep = 8 * L;
  for (int first = 0; first < t.padded; first += kStep) {
    int last = first + kStep < t.padded ? first + kStep : t.padded;
    // Σ log(1+e) = log Π(1+e), of which the product less 1 is exact where the e are small.
    Vec<T> product0{}, product1{};
    for (int v = first; v < last; v += L) {
      Vec<T> e = load<T>(exponentials + v);
      Pair<T> r = pair<T>(load<T>(difference + v), e, t.labels(v));
      if (kLogs) {
        Vec<T> loss = larger(splat<T>(0), -r.margin);
        if (kEven) {
          Vec<T> e0 = drop<T>(r.one, e), e1 = keep<T>(r.one, e);
          product0 = product0 * e0 + (product0 + e0);
          product1 = product1 * e1 + (product1 + e1);
        } else {
          loss = load<T>(m + v) * (loss + log_one_plus_small(e));
        }
        loss0 += drop<T>(r.one, loss);
        loss1 += keep<T>(r.one, loss);
      }
      if (kEven) {
        n1 += keep<T>(r.one, splat<T>(1));
      } else {
        Vec<T> w = load<T>(m + v);
        r.own *= w;
        r.other *= w;
        all += w;
        n1 += keep<T>(r.one, w);
      }
      own0 += drop<T>(r.one, r.own);
      own1 += keep<T>(r.one, r.own);
      other0 += drop<T>(r.one, r.other);
      other1 += keep<T>(r.one, r.other);
    }
    if (kLogs && kEven) {
      loss0 += log_one_plus<T>(product0);
      loss1 += log_one_plus<T>(product1);
    }
  }
  double n = kEven ? double(t.n) : total<T>(all), ones = total<T>(n1);
  *weight += n;
  auto add = [&](int slot, double a, double b) {
    if (slot < 0) return;
    sums[slot * 2] += a;
    sums[slot * 2 + 1] += b;
  };
  double o0 = total<T>(own0), o1 = total<T>(own1);
  add(s.reference, n - ones, ones);
  add(s.overlap, o0, o1);
  add(s.predicted, o0 + total<T>(other1), o1 + total<T>(other0));
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
  for (int v = 0; v < t.padded; v += L) {
    Pair<T> r = pair<T>(load<T>(difference + v), load<T>(exponentials + v), t.labels(v));
    // Label 1: p₀ (p₁ k − loss₁); label 0: p₁ (p₀ k + loss₀).
    Vec<T> g = r.other * (r.own * select<T>(r.one, if1, if0) + select<T>(r.one, loss1, loss0));
    if (!even) g *= load<T>(m + v);
    store<T>(gradient + v, g);
  }
  write_rows(t, t.second, t.x, [&](const auto& row, const auto& put) {
    auto *to0 = row(0), *to1 = row(1);
    for (int v = 0; v < t.padded; v += L) put(to0 + v, -load<T>(gradient + v));
    for (int v = 0; v < t.padded; v += L) put(to1 + v, load<T>(gradient + v));
  });
}

}  // namespace
