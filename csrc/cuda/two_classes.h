// Softmax of two classes with a label map: one exponential and one reciprocal per voxel.
//
// With d = x₁ − x₀ and e = e^−|d| ≤ 1 the probabilities are 1 / (1 + e) and e / (1 + e), and
//   −log p_label = max(0, x_other − x_label) + log(1 + e).
// As ∂p₁/∂x₁ = p₀ p₁ = −∂p₀/∂x₁, with k_c the derivative by p_c and l_c that by −log p_c,
//   ∂L/∂x₁ = p₀ p₁ (k₁ − k₀) + p₁ l₀ − p₀ l₁ = −∂L/∂x₀,
// where only the label's l is not 0.
#pragma once

#include "block.h"

FL_DEVICE bool is_of_two_classes(const Call& call) { return CONST(path) == kTwoClasses; }

// d, e^−|d|, and the greater and the smaller probability.
template <class T>
struct TwoClasses {
  T difference, e, big, little;

  FL_DEVICE TwoClasses(T x0, T x1) {
    difference = x0 == x1 ? T(0) : x1 - x0;  // equal infinities: p = ½
    e = exponential(-size_of(difference));
    big = inverse_of(T(1) + e);
    little = e * big;
  }
};

// A tile of the reduce pass.
template <class In, int V, int K, class Sums>
FL_DEVICE void reduce_two_classes(const Block<In, V>& block,
                                  const Voxels<typename ComputedIn<In>::type, V>& v, Sums& sums) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  if (!v.inside) return;
  T x[K < 2 ? 2 : K][V];  // never runs for K = 1
  block.load_round(v, 0, x);
  if (counts_all(call)) sums.weight += T(V);
  const int by_predicted = CONST(slot_predicted), by_overlap = CONST(slot_overlap);
  const int by_reference = CONST(slot_reference), by_loss = CONST(slot_cross_entropy);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    TwoClasses<T> two(x[0][j], x[1][j]);
    const bool one = v.y[j] == 1;
    const T m = counts_all(call) ? T(1) : v.m[j];
    T p0 = m * (two.difference < T(0) ? two.big : two.little);
    T p1 = m * (two.difference < T(0) ? two.little : two.big);
    T gap = larger(one ? -two.difference : two.difference, T(0)), factor = T(0);
    if (counts_all(call)) factor = two.e;
    else gap = m * (gap + log_one_plus_small(two.e));
    if (!counts_all(call)) sums.weight += m;
    sums.add(by_predicted, 0, 0, p0);
    sums.add(by_predicted, 0, 1, p1);
    if (one) {
      sums.add(by_overlap, 0, 1, p1);
      sums.add(by_reference, 0, 1, m);
      sums.add(by_loss, 0, 1, gap);
      sums.product[1] = multiply_add(sums.product[1], T(1) + factor, factor);
    } else {
      sums.add(by_overlap, 0, 0, p0);
      sums.add(by_reference, 0, 0, m);
      sums.add(by_loss, 0, 0, gap);
      sums.product[0] = multiply_add(sums.product[0], T(1) + factor, factor);
    }
  }
}

// A sample's coefficients by label: the gradient by x₁ is other · (own · region + loss), where own
// is the label's probability and other = 1 − own.
template <class T>
struct TwoClassSlopes {
  T region[2] = {}, loss[2] = {};

  template <class By>
  FL_DEVICE TwoClassSlopes(const Call& call, const By& by) {
    if (!is_of_two_classes(call)) return;
    T turn = by(CONST(slot_predicted), 1) - by(CONST(slot_predicted), 0);
    region[0] = turn - by(CONST(slot_overlap), 0);
    region[1] = turn + by(CONST(slot_overlap), 1);
    loss[0] = by(CONST(slot_cross_entropy), 0);
    loss[1] = -by(CONST(slot_cross_entropy), 1);
  }
};

// A tile of the apply pass.
template <class In, int V, int K, class T>
FL_DEVICE void apply_two_classes(const Block<In, V>& block, const Voxels<T, V>& v,
                                 const TwoClassSlopes<T>& slopes) {
  const Call& call = block.call;
  T x[K < 2 ? 2 : K][V];  // never runs for K = 1
  block.load_round(v, 0, x);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    TwoClasses<T> two(x[0][j], x[1][j]);
    const bool one = v.y[j] == 1;
    T away = one ? -two.difference : two.difference;
    T own = away > T(0) ? two.little : two.big, other = away > T(0) ? two.big : two.little;
    T region = one ? slopes.region[1] : slopes.region[0];
    T loss = one ? slopes.loss[1] : slopes.loss[0];
    T gradient = other * multiply_add(own, region, loss);
    x[1][j] = counts_all(call) ? gradient : v.m[j] * gradient;
    x[0][j] = -x[1][j];
  }
  if (block.stores_rows()) return block.store_rows(v, x);
  block.store_voxels(v, block.at_class(v, kOut, 0), x[0]);
  block.store_voxels(v, block.at_class(v, kOut, 1), x[1]);
}
