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

template <class T>
struct Pair {
  Vec<T> d, e, inverse, p0, p1;
};

template <class T>
FL_INLINE Pair<T> pair(const T* x0, const T* x1) {
  Pair<T> r;
  Vec<T> a = load<T>(x0), b = load<T>(x1);
  r.d = drop<T>(a == b, b - a);  // equal infinities share
  r.e = exponential<T>(-absolute<T>(r.d));
  r.inverse = T(1) / (r.e + T(1));
  Vec<T> little = r.e * r.inverse;
  IVec<T> second = r.d > T(0);
  r.p1 = select<T>(second, r.inverse, little);
  r.p0 = select<T>(second, little, r.inverse);
  return r;
}

template <class T, bool kEven>
void reduce_two_rows(Tile<T>& t, const T* x0, const T* x1, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T *m = t.row(kWeight), *label = t.row(kLabel);
  Vec<T> g1{}, all{}, o0{}, o1{}, q0{}, q1{}, l0{}, l1{};
  bool logs = s.cross_entropy >= 0;
  for (int v = 0; v < t.padded; v += L) {
    Pair<T> r = pair<T>(x0 + v, x1 + v);
    Vec<T> w = kEven ? splat<T>(1) : load<T>(m + v);
    IVec<T> one = load<T>(label + v) != T(0);
    Vec<T> p0 = kEven ? r.p0 : r.p0 * w, p1 = kEven ? r.p1 : r.p1 * w;
    all += w;
    g1 += keep<T>(one, w);
    q0 += p0;
    q1 += p1;
    o0 += drop<T>(one, p0);
    o1 += keep<T>(one, p1);
    if (logs) {
      Vec<T> wrong = select<T>(one, -r.d, r.d);
      Vec<T> loss = larger(splat<T>(0), wrong) + log_one_plus_small(r.e);
      if (!kEven) loss = w * loss;
      l0 += drop<T>(one, loss);
      l1 += keep<T>(one, loss);
    }
  }
  double n = total<T>(all), n1 = total<T>(g1);
  *weight += n;
  double* reference = sums + s.reference * 2;
  reference[0] += n - n1;
  reference[1] += n1;
  auto add = [&](int slot, Vec<T> a, Vec<T> b) {
    if (slot < 0) return;
    sums[slot * 2] += total<T>(a);
    sums[slot * 2 + 1] += total<T>(b);
  };
  add(s.overlap, o0, o1);
  add(s.predicted, q0, q1);
  add(s.cross_entropy, l0, l1);
}

template <class T>
void reduce_two_classes(Tile<T>& t, double* sums, double* weight) {
  bool direct = t.direct();
  if (!direct) t.load_logits();
  const T* x0 = direct ? t.direct_row(0) : t.x;
  const T* x1 = direct ? t.direct_row(1) : t.x + t.stride;
  if (t.even)
    reduce_two_rows<T, true>(t, x0, x1, sums, weight);
  else
    reduce_two_rows<T, false>(t, x0, x1, sums, weight);
}

template <class T>
void apply_two_classes(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  bool direct = t.direct();
  if (!direct) t.load_logits();
  const T* x0 = direct ? t.direct_row(0) : t.x;
  const T* x1 = direct ? t.direct_row(1) : t.x + t.stride;
  auto k = [&](int slot, int c) { return slot >= 0 ? t.table[slot * 2 + c] : T(0); };
  T turn = k(s.predicted, 1) - k(s.predicted, 0);
  Vec<T> if0 = splat<T>(turn - k(s.overlap, 0)), if1 = splat<T>(turn + k(s.overlap, 1));
  Vec<T> loss0 = splat<T>(k(s.cross_entropy, 0)), loss1 = splat<T>(k(s.cross_entropy, 1));
  const T *m = t.row(kWeight), *label = t.row(kLabel);
  Writer<T> writer(t, t.second);
  T *to0 = writer.row(0), *to1 = writer.row(1);
  for (int v = 0; v < t.padded; v += L) {
    Pair<T> r = pair<T>(x0 + v, x1 + v);
    IVec<T> one = load<T>(label + v) != T(0);
    // Label 1: p₀ (p₁ k − loss₁); label 0: p₁ (p₀ k + loss₀).
    Vec<T> other = select<T>(one, r.p0, r.p1), own = select<T>(one, r.p1, r.p0);
    Vec<T> g = other * (own * select<T>(one, if1, if0) + select<T>(one, -loss1, loss0));
    if (!t.even) g = g * load<T>(m + v);
    writer.put(to1 + v, g);
    writer.put(to0 + v, -g);
  }
  writer.finish(t.x);
}

}  // namespace
