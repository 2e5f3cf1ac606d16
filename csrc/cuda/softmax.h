// Softmax over classes that threads, warps and rounds share.
//
// Each part knows its largest logit and sums relative to it; parts merge in a fixed order.
#pragma once

#include "block.h"

// e^(part − whole), and 1 where both are the same infinity.
template <class T>
FL_DEVICE T rescale(T part, T whole) {
  return part == whole ? T(1) : exponential(part - whole);
}

// x − largest, and 0 where both are the same infinity: such classes share the probability.
template <class T>
FL_DEVICE T below(T x, T largest) {
  return x == largest ? T(0) : x - largest;
}

// Of a label map's voxel. The label's own exponential is kept apart: the sum of the others is then
// exact to the last bit where the label dominates, and with it 1 − p and log p are.
template <class T>
struct LabelPart {
  T largest;
  T rest;         // Σ e^(x − largest) over the classes but the label
  T own;          // e^(x − largest) of the label, in the part that has it
  T own_x;        // its logit, in the part that has it
  T dot, square;  // Σ k e and Σ k e² over the classes but the label, apply only
};

template <class T>
FL_DEVICE LabelPart<T> no_label_part() {
  return {-infinity<T>(), T(0), T(0), T(0), T(0), T(0)};
}

template <class T>
FL_DEVICE void merge(LabelPart<T>& a, const LabelPart<T>& b) {
  T largest = b.largest > a.largest ? b.largest : a.largest;
  T fa = rescale(a.largest, largest), fb = rescale(b.largest, largest);
  a.rest = a.rest * fa + b.rest * fb;
  a.own = a.own * fa + b.own * fb;
  a.own_x += b.own_x;
  a.dot = a.dot * fa + b.dot * fb;
  a.square = a.square * fa * fa + b.square * fb * fb;
  a.largest = largest;
}

// The parts of a group's warps, merged. What an apply pass does not need is not told.
template <class In, int V, class T>
FL_DEVICE void exchange_labels(Block<In, V>& block, LabelPart<T> (&part)[V]) {
  const Call& call = block.call;
  const bool dot = CONST(exchanged) > 4;
  const bool square = CONST(exchanged) > 5;
  T said[6][V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    said[0][j] = part[j].largest;
    said[1][j] = part[j].rest;
    said[2][j] = part[j].own;
    said[3][j] = part[j].own_x;
    said[4][j] = dot ? part[j].dot : T(0);
    said[5][j] = square ? part[j].square : T(0);
    part[j] = no_label_part<T>();
  }
  block.exchange(said, [&](const T(&heard)[6][V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      LabelPart<T> other = {heard[0][j],
                            heard[1][j],
                            heard[2][j],
                            heard[3][j],
                            dot ? heard[4][j] : T(0),
                            square ? heard[5][j] : T(0)};
      merge(part[j], other);
    }
  });
}

// −log p of the label.
template <class T>
FL_DEVICE T label_loss(const LabelPart<T>& part) {
  T gap = -below(part.own_x, part.largest);
  return gap + (gap == T(0) ? log_one_plus(part.rest) : logarithm(part.rest + part.own));
}

// Of any voxel.
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
  T largest = b.largest > a.largest ? b.largest : a.largest;
  T fa = rescale(a.largest, largest), fb = rescale(b.largest, largest);
  T rest = (a.largest == largest ? a.rest : (a.rest + a.ties) * fa) +
           (b.largest == largest ? b.rest : (b.rest + b.ties) * fb);
  a.ties = (a.largest == largest ? a.ties : T(0)) + (b.largest == largest ? b.ties : T(0));
  a.rest = rest;
  a.largest = largest;
}

// p, 1 − p, −log p and −log(1 − p) of a class.
template <class T>
struct Fields {
  T p, q, loss, loss_rest;
};

// What softmax needs of a whole voxel, from its Part.
template <class T>
struct Whole {
  T largest, rest, inverse, log_sum;  // rest: the sum without one of the largest
};

template <class T>
FL_DEVICE Whole<T> whole_of(const Call& call, const Part<T>& part, bool logs) {
  T rest = part.rest + (part.ties - T(1));
  return {part.largest, rest, T(1) / (part.rest + part.ties), logs ? log_one_plus(rest) : T(0)};
}

template <class T>
FL_DEVICE Fields<T> activate(const Call& call, T x, const Whole<T>& whole, bool logs) {
  Fields<T> f;
  if (CONST(activation) == kSoftmax) {
    T gap = -below(x, whole.largest);
    T e = exponential(-gap);
    f.p = e * whole.inverse;
    f.q = (gap == T(0) ? whole.rest : (whole.rest + T(1)) - e) * whole.inverse;
    f.loss = gap + whole.log_sum;
    f.loss_rest = T(0);
  } else if (CONST(activation) == kSigmoid) {
    T size = x < T(0) ? -x : x;
    T e = exponential(-size), big = T(1) / (e + T(1)), little = e * big;
    f.p = x > T(0) ? big : little;
    f.q = x > T(0) ? little : big;
    T l = logs ? log_one_plus(e) : T(0);
    f.loss = (x < T(0) ? -x : T(0)) + l;
    f.loss_rest = (x > T(0) ? x : T(0)) + l;
    if (x != x) f.p = f.q = f.loss = f.loss_rest = x;
  } else {
    f.p = x;
    f.q = T(1) - x;
    f.loss = logs ? -logarithm(x) : T(0);
    f.loss_rest = T(0);
  }
  return f;
}

// The logits of a thread's classes, where one round sees all, and what softmax needs of the voxels.
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
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      int c = block.first_class(round) + k;
      if (block.exists(c)) block.load_class(v, c, x[k]);
    }
    if (CONST(activation) != kSoftmax) continue;
    Part<T> here[V];
#pragma unroll
    for (int j = 0; j < V; ++j) here[j] = no_part<T>();
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      if (!block.exists(block.first_class(round) + k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (x[k][j] > here[j].largest) here[j].largest = x[k][j];
    }
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      if (!block.exists(block.first_class(round) + k)) continue;
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
  for (int j = 0; j < V; ++j) whole[j] = whole_of(call, part[j], logs);
}
