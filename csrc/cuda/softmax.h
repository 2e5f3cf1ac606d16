// Softmax over classes that threads, warps and rounds share.
//
// Each part has its largest logit and sums relative to it; parts merge in a fixed order.
// Exponentials are powers of two: e_c = 2^(z_c − L) with z_c = x_c log2 e and L = max z. A part
// whose maximum is L' enters a sum relative to L times 2^(L' − L). With own = e_y of the label y
// and rest = Σ_{c≠y} e_c, p_y = own / (rest + own) and
//   −log p_y = log(1 + rest / own) = ln 2 · (log2(rest + own) − (z_y − L)).
#pragma once

#include "block.h"
#include "voxel.h"

// 2^(part − whole) for part ≤ whole, and 1 where both are the same infinity: `smaller` turns the
// NaN of the difference into 0.
template <class T>
FL_DEVICE T rescale(T part, T whole) {
  return power_of_two(smaller(difference(part, whole), T(0)));
}

// x − largest, but 0 for equal infinities: such classes share the probability.
template <class T>
FL_DEVICE T below(T x, T largest) {
  return x == largest ? T(0) : x - largest;
}

// The part of some classes of a voxel, or of all: the largest logit in units of ln 2, and sums
// relative to it over the classes but the label. Without the label's exponential the sum of the
// others is exact where the label dominates, and so are 1 − p and log p.
template <class T>
struct LabelPart {
  T largest;      // log2 of the largest e^x
  T rest;         // Σ e, with e = e^x / 2^largest
  T dot, square;  // Σ k e and Σ 2 s e², apply only; k, s: the derivatives by Σ p_c and Σ p_c²
};

// Merges the parts of a group's warps; `exchanged` says how many of the numbers are used.
template <class In, int V, class T>
FL_DEVICE void exchange_labels(Block<In, V>& block, LabelPart<T> (&part)[V]) {
  const Call& call = block.call;
  const bool dot = CONST(exchanged) > 2, square = CONST(exchanged) > 3;
  T said[4][V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    said[0][j] = part[j].largest;
    said[1][j] = part[j].rest;
    said[2][j] = part[j].dot;
    said[3][j] = part[j].square;
    part[j] = {-infinity<T>(), T(0), T(0), T(0)};
  }
  block.exchange(said, [&](const T(&heard)[4][V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) part[j].largest = larger(part[j].largest, heard[0][j]);
  });
  block.hear_again(said, [&](const T(&heard)[4][V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T f = rescale(heard[0][j], part[j].largest);
      part[j].rest += heard[1][j] * f;
      if (dot) part[j].dot += heard[2][j] * f;
      if (square) part[j].square += heard[3][j] * (f * f);
    }
  });
}

// The same for the rounds of a warp.
template <class T>
FL_DEVICE void merge(LabelPart<T>& a, const LabelPart<T>& b) {
  T largest = larger(a.largest, b.largest);
  T fa = rescale(a.largest, largest), fb = rescale(b.largest, largest);
  a = {largest, a.rest * fa + b.rest * fb, a.dot * fa + b.dot * fb,
       a.square * (fa * fa) + b.square * (fb * fb)};
}

// Whether a logit times log2 e is so large, or infinite, that too few fractional bits remain.
template <class T>
FL_DEVICE bool is_far(T largest) {
  return !(largest < T(1e8) && largest > T(-1e8));
}

// log2(e^x) − largest for far logits; 0 where both are the same infinity.
template <class T>
FL_DEVICE T far_below(T x, T largest) {
  T scaled = x * log2_of_e<T>();
  return scaled == largest ? T(0) : scaled - largest;
}

// The same for any logit, rounded alike for all classes.
template <class T>
FL_DEVICE T scaled_below(T x, T largest) {
  T near = multiply_add(x, log2_of_e<T>(), -largest);
  return is_far(largest) ? far_below(x, largest) : near;
}

// Whether a thread holds all classes of its voxels, including the label's.
FL_DEVICE bool holds_label(const Call& call) { return CONST(warps) == 1 && CONST(rounds) == 1; }

// The label of a voxel, after all its classes are summed.
template <class T>
struct Label {
  T own;      // e of the label
  T below;    // log2 of it
  T inverse;  // 1 / Σ e
};

// `own` is the label's logit or, if `holds_label`, its `below`.
template <class T>
FL_DEVICE Label<T> label_of(const Call& call, const LabelPart<T>& part, T own) {
  T below = holds_label(call) ? own : scaled_below(own, part.largest);
  T e = power_of_two(below);
  return {e, below, inverse_of(part.rest + e)};
}

// −log p of the label. Where p ≥ ½, log(1 + rest / own) is exact even if 1 + rest / own rounds to
// 1. Below ½ the loss is at least ln 2 and own may underflow to 0: then the second form is used.
template <class T>
FL_DEVICE T label_loss(const LabelPart<T>& part, const Label<T>& label) {
  T ratio = part.rest * inverse_of(label.own);
  T unlikely = (log2_of(part.rest + label.own) - label.below) * log_of_2<T>();
  return ratio <= T(1) ? log_one_plus_small(ratio) : unlikely;
}

// A round of a thread's classes: x becomes e relative to the largest of the round, and `own`
// becomes log2 of the label's e if the label is among them.
template <class In, int V, int K, class By>
FL_DEVICE void label_round(const Block<In, V>& block,
                           const Voxels<typename ComputedIn<In>::type, V>& v, int round,
                           typename ComputedIn<In>::type (&x)[K][V],
                           LabelPart<typename ComputedIn<In>::type> (&here)[V],
                           typename ComputedIn<In>::type (&own)[V], const By& by) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  T most[V], center[V];
#pragma unroll
  for (int j = 0; j < V; ++j) most[j] = -infinity<T>();
  block.load_round(v, round, x);
#pragma unroll
  for (int k = 0; k < CONST(per_thread); ++k) {
    if (!block.exists(round, k)) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) most[j] = larger(most[j], x[k][j]);
  }
  bool any_far = false;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    center[j] = most[j] * log2_of_e<T>();
    here[j] = {center[j], T(0), T(0), T(0)};
    any_far = any_far || is_far(center[j]);
  }
  if (FL_UNLIKELY(any_far)) {
    // Classes at an infinite maximum share the probability.
#pragma unroll
    for (int j = 0; j < V; ++j) {
      bool far = is_far(center[j]);
#pragma unroll
      for (int k = 0; k < CONST(per_thread); ++k)
        if (block.exists(round, k))
          x[k][j] = far ? far_below(x[k][j], center[j]) * log_of_2<T>() : x[k][j];
      center[j] = far ? T(0) : center[j];
    }
  }
  int own_k[V];
#pragma unroll
  for (int j = 0; j < V; ++j) own_k[j] = v.y[j] - block.first_class(round);
#pragma unroll
  for (int k = 0; k < CONST(per_thread); ++k) {
    if (!block.exists(round, k)) continue;
    int c = block.first_class(round) + k;
    T predicted = by.predicted(c, k), squared = by(CONST(slot_predicted_squared), c);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T below = multiply_add(x[k][j], log2_of_e<T>(), -center[j]), e = power_of_two(below);
      T other = own_k[j] == k ? T(0) : e;
      if (holds_label(call)) own[j] = own_k[j] == k ? below : own[j];
      here[j].rest += other;
      if (By::kWanted && CONST(slot_predicted) >= 0) here[j].dot += predicted * other;
      if (By::kWanted && CONST(slot_predicted_squared) >= 0)
        here[j].square += T(2) * squared * (other * other);
      x[k][j] = e;
    }
  }
}

// No coefficients, for the reduce pass.
template <class T>
struct NoCoefficients {
  static constexpr bool kWanted = false;
  FL_DEVICE T operator()(int, int) const { return T(0); }
  FL_DEVICE T predicted(int, int) const { return T(0); }
};

// Runs all rounds and computes the part of the whole voxel. With one round, x times `factor` is e.
// `own` is the argument of `label_of`.
template <class In, int V, int K, class By>
FL_DEVICE void label_parts(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                           typename ComputedIn<In>::type (&x)[K][V],
                           LabelPart<typename ComputedIn<In>::type> (&part)[V],
                           typename ComputedIn<In>::type (&factor)[V],
                           typename ComputedIn<In>::type (&own)[V], const By& by) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  if (holds_label(call)) {
    // An ignored voxel has no label, and its loss must be finite.
#pragma unroll
    for (int j = 0; j < V; ++j) own[j] = T(0);
  } else {
    block.load_own(v, own);
  }
  label_round(block, v, 0, x, part, own, by);
  for (int round = 1; round < CONST(rounds); ++round) {
    LabelPart<T> here[V];
    label_round(block, v, round, x, here, own, by);
#pragma unroll
    for (int j = 0; j < V; ++j) merge(part[j], here[j]);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) factor[j] = part[j].largest;
  if (CONST(warps) > 1) exchange_labels(block, part);
#pragma unroll
  for (int j = 0; j < V; ++j)
    factor[j] = CONST(rounds) == 1 && CONST(warps) > 1 ? rescale(factor[j], part[j].largest) : T(1);
}

// The part of some classes of a voxel with any target.
template <class T>
struct Part {
  T largest;
  T rest;  // Σ e^(x − largest) over the classes below the largest
  T ties;  // classes at the largest
};

template <class T>
FL_DEVICE Part<T> no_part() {
  return {-infinity<T>(), T(0), T(0)};
}

template <class T>
FL_DEVICE void merge(Part<T>& a, const Part<T>& b) {
  T largest = larger(a.largest, b.largest);
  T fa = exponential(below(a.largest, largest)), fb = exponential(below(b.largest, largest));
  T rest = (a.largest == largest ? a.rest : (a.rest + a.ties) * fa) +
           (b.largest == largest ? b.rest : (b.rest + b.ties) * fb);
  a.ties = (a.largest == largest ? a.ties : T(0)) + (b.largest == largest ? b.ties : T(0));
  a.rest = rest;
  a.largest = largest;
}

// Softmax of a whole voxel, from its Part. With rest = Σe − 1, p_c = e_c / (1 + rest),
//   1 − p_c = rest / (1 + rest) at the largest and (1 + rest − e_c) / (1 + rest) elsewhere,
//   −log p_c = largest − x_c + log(1 + rest).
template <class T>
struct Whole {
  T largest, rest, inverse, log_sum;
};

template <class T>
FL_DEVICE Whole<T> whole_of(const Part<T>& part, bool logs) {
  T rest = part.rest + (part.ties - T(1));
  return {part.largest, rest, inverse_of(part.rest + part.ties), logs ? log_one_plus(rest) : T(0)};
}

template <class T>
FL_DEVICE Probability<T> activate(const Call& call, T x, const Whole<T>& whole, bool logs) {
  Probability<T> f;
  if (CONST(activation) == kSoftmax) {
    T gap = -below(x, whole.largest);
    T e = exponential(-gap);
    f.p = e * whole.inverse;
    f.q = (gap == T(0) ? whole.rest : (whole.rest + T(1)) - e) * whole.inverse;
    f.loss = gap + whole.log_sum;
    f.loss_rest = T(0);
  } else if (CONST(activation) == kSigmoid) {
    T e = exponential(-size_of(x)), big = inverse_of(e + T(1)), little = e * big;
    f.p = x > T(0) ? big : little;
    f.q = x > T(0) ? little : big;
    T l = logs ? log_one_plus_small(e) : T(0);
    f.loss = larger(-x, T(0)) + l;  // for NaN, l is NaN
    f.loss_rest = larger(x, T(0)) + l;
    if (!logs && x != x) f.loss = f.loss_rest = x;
  } else {
    f.p = x;
    f.q = T(1) - x;
    f.loss = logs ? -logarithm(x) : T(0);
    f.loss_rest = T(0);
  }
  return f;
}

// Loads the logits of a thread's classes; x holds those of the last round. For softmax also
// computes the Whole of each voxel.
template <class In, int V, int K>
FL_DEVICE void softmax_parts(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                             typename ComputedIn<In>::type (&x)[K][V],
                             Whole<typename ComputedIn<In>::type> (&whole)[V], bool logs) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  Part<T> part[V];
#pragma unroll
  for (int j = 0; j < V; ++j) part[j] = no_part<T>();
  for (int round = 0; round < CONST(rounds); ++round) {
    block.load_round(v, round, x);
    if (CONST(activation) != kSoftmax) continue;
    Part<T> here[V];
#pragma unroll
    for (int j = 0; j < V; ++j) here[j] = no_part<T>();
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      if (!block.exists(round, k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) here[j].largest = larger(here[j].largest, x[k][j]);
    }
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      if (!block.exists(round, k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        bool top = x[k][j] == here[j].largest;
        T e = exponential(below(x[k][j], here[j].largest));
        here[j].rest += top ? T(0) : e;
        here[j].ties += top ? T(1) : T(0);
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) merge(part[j], here[j]);
  }
  if (CONST(activation) != kSoftmax) return;
  if (CONST(warps) > 1) {
    T said[3][V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      said[0][j] = part[j].largest;
      said[1][j] = part[j].rest;
      said[2][j] = part[j].ties;
      part[j] = no_part<T>();
    }
    block.exchange(said, [&](const T(&heard)[3][V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        Part<T> other = {heard[0][j], heard[1][j], heard[2][j]};
        merge(part[j], other);
      }
    });
  }
#pragma unroll
  for (int j = 0; j < V; ++j) whole[j] = whole_of(part[j], logs);
}
