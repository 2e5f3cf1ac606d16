// The loops over all logits of softmax with a label map. Each works on the rows of some classes of
// a tile. Two of them can run as one loop over two tiles, so that reading one tile overlaps with
// computing and writing the other.
#pragma once

#include "loops.h"
#include "tile.h"

namespace {

// Where |x| ≤ 36, Σ e^x and its quotients do not overflow without subtracting the maximum.
constexpr int kNear = 36;

// The coefficients of a slot, (C,), or null.
template <class T>
const T* coefficients(const Tile<T>& t, int slot) {
  return slot >= 0 ? t.table + slot * t.job.classes : nullptr;
}
// The row of Σ e_c · (derivative by p_c) over the classes but the label, excluding the overlap's
// part and m.
template <class T>
T* other_slopes(Tile<T>& t) {
  return t.row(kA);
}

// The row of the label's derivative by p, where derivatives vary from voxel to voxel.
template <class T>
T* own_slopes(Tile<T>& t) {
  return t.row(kF);
}

// The derivatives by p of R classes, the same for all voxels.
template <class T, int R>
struct EvenSlopes {
  static constexpr bool kVaries = false;
  Vec<T> k[R];

  FL_INLINE EvenSlopes(const T* slopes, int64_t c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) k[r] = splat<T>(slopes ? slopes[c + r] : T(0));
  }
  FL_INLINE Vec<T> at(int r, int64_t) const { return k[r]; }
  template <int>
  FL_INLINE void fetch(int64_t) const {}
};

// Steps of loops over exponentials: compute them from the logits, sum them per voxel, or both.
enum class Exponentials { made, added, both };

// For R classes from c on: x becomes e^x; the label's exponential goes to `own`, the others are
// added to `rest` and, with `kDot`, times the derivatives by p to a row of their own. Labels select
// by masks: a branch would be mispredicted at the borders of organs. Classes are added one by one,
// so that R changes no bit. S is the type of the logits. `kAll`: there are no other classes, and
// the sums start here. Slopes::at(r, v) is the derivative by p of the class c + r; if it varies,
// the label's goes to a row of its own.
template <class S, class T, int R, bool kPresent, bool kDot,
          Exponentials kWhat = Exponentials::both, bool kAll = false,
          class Slopes = EvenSlopes<T, R>>
struct ExponentialRows {
  static constexpr int L = lanes<T>;
  static constexpr bool kMade = kWhat != Exponentials::added, kAdded = kWhat != Exponentials::made;
  static constexpr bool kVaries = kDot && kPresent && Slopes::kVaries;
  Tile<T>& t;
  const S *from[R], *soon[R];
  const bool far;
  T* to[R];
  T *own, *rest, *dot, *own_slope;
  const typename Types<T>::Int* label;
  const Slopes slopes;
  Extent<S, T> extent;
  IVec<T> number[R];
  NearExponential<T> exponential;

  FL_INLINE ExponentialRows(Tile<T>& tile, int64_t c, const Slopes& by_p)
      : t(tile),
        far(!t.direct && t.ahead),
        own(t.row(kLabelExp)),
        rest(t.row(kRest)),
        dot(other_slopes(t)),
        own_slope(own_slopes(t)),
        label(t.labels()),
        slopes(by_p) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      to[r] = t.x + (c + r) * t.stride;
      from[r] = soon[r] = (const S*)to[r];
      if (kMade && t.direct) {
        from[r] = t.template source_row<S>(c + r);
        // The hardware prefetcher follows each row but cannot guess where the next one starts.
        soon[r] = t.template row_ahead<S>(c + r + kAhead);
        prefetch(soon[r] + t.padded - 1);  // one line more where rows are not aligned to lines
      } else if (kMade && far) {
        soon[r] = t.template part_ahead<S>(c + r);
      }
      number[r] = class_number<T>(c + r);
    }
  }
  FL_INLINE void finish() {
    if (kMade) t.near = t.near && extent.within(kNear);
  }

  // N vectors of each row.
  template <int N>
  FL_INLINE void step(int64_t first) {
    if (kMade)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (far) prefetch_lines<N * L* int(sizeof(S)), true>(soon[r] + first);
        else prefetch_lines<N * L* int(sizeof(S))>(soon[r] + first);
        extent.template stored<N>(from[r] + first);
      }
    if (kDot) slopes.template fetch<N * L>(first);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      Vec<T> sum{}, product{}, mine{}, my_slope{};
      IVec<T> y;
      if (kAdded) {
        if (!kAll) sum = load<T>(rest + v);
        if (!kAll && kDot) product = load<T>(dot + v);
        if (!kAll && kPresent) mine = load<T>(own + v);
        if (!kAll && kVaries) my_slope = load<T>(own_slope + v);
        if (kPresent) y = once(label_lanes<T>(label + v));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<T> e;
        if constexpr (!kMade) {
          e = once(load<T>(to[r] + v));
        } else {
          Vec<T> x = load_as<S, T>(from[r] + v);
          extent.loaded(x);
          e = exponential(x);
          store<T>(to[r] + v, e);
        }
        if (!kAdded) continue;
        Vec<T> k{};
        if (kDot) k = slopes.at(r, v);
        if (kPresent) {
          const IVec<T> is_label = y == number[r];
          mine = either<T>(mine, keep<T>(is_label, e));
          if (kVaries) my_slope = either<T>(my_slope, keep<T>(is_label, k));
          e = drop<T>(is_label, e);
        }
        sum += e;
        if (kDot) product += e * k;
      }
      if (!kAdded) continue;
      store<T>(rest + v, sum);
      if (kDot) store<T>(dot + v, product);
      if (kPresent) store<T>(own + v, mine);
      if (kVaries) store<T>(own_slope + v, my_slope);
    }
  }
};

// The sums over the tile's voxels of one set of slots, (C,) each.
struct ClassSums {
  double *reference, *overlap, *predicted, *loss, *focal = nullptr;
};

// Adds m g, m p g, m p and the loss to the sums of R classes, where m p = x · scale, and `value` is
// m p of the label. Without `kPresent` only m p is added.
template <class T, int R, bool kPresent>
struct SumRows {
  static constexpr int L = lanes<T>;
  const int64_t c;
  const ClassSums& to;
  const T *x[R], *m, *scale, *value, *loss;
  const typename Types<T>::Int* label;
  Vec<T> reference[R] = {}, overlap[R] = {}, predicted[R] = {}, losses[R] = {};
  IVec<T> number[R];

  FL_INLINE SumRows(const Tile<T>& t, int64_t first, const T* scales, const T* values,
                    const T* loss_row, const ClassSums& sums)
      : c(first), to(sums), scale(scales), value(values), loss(loss_row), label(t.labels()) {
    m = t.rows + kWeight * kMaxTile;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      number[r] = class_number<T>(c + r);
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      const Vec<T> k = once(load<T>(scale + v));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) predicted[r] += load<T>(x[r] + v) * k;
      if (!kPresent) continue;
      const IVec<T> y = once(label_lanes<T>(label + v));
      const Vec<T> w = load<T>(m + v), p = once(load<T>(value + v)), l = once(load<T>(loss + v));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const IVec<T> is_label = y == number[r];
        reference[r] += keep<T>(is_label, w);
        overlap[r] += keep<T>(is_label, p);
        losses[r] += keep<T>(is_label, l);
      }
    }
  }
  FL_INLINE void finish() {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      to.predicted[c + r] += total<T>(predicted[r]);
      if (!kPresent) continue;
      to.reference[c + r] += total<T>(reference[r]);
      to.overlap[c + r] += total<T>(overlap[r]);
      to.loss[c + r] += total<T>(losses[r]);
    }
  }
};

template <class F>
FL_INLINE void with_constant(bool value, const F& f) {
  if (value) f(std::true_type{});
  else f(std::false_type{});
}
// Calls f(S{}) with the type of the logits that the exponentials are computed from.
template <class T, class F>
FL_INLINE void with_source(const Tile<T>& t, const F& f) {
  if (t.direct || t.flat) with_storage<T>(t.job.logits.dtype, f);
  else f(T{});
}

// The label's part of a voxel's gradient, without the voxel weight. With k_c the derivative by p_c
// and o and l those by overlap and cross-entropy at the label y, the derivatives by log p_c are
// t_c = p_c k_c for c ≠ y and t_y = p_y (k_y + o) − l, and ∂L/∂x_c = t_c − p_c Σ_j t_j. Thus
//   turn = Σ_j t_j = rests + p_y k_y + (p_y o − l)  with rests = Σ_{c≠y} p_c k_c,
//   ∂L/∂x_c = p_c (k_c − turn) for c ≠ y,
//   ∂L/∂x_y = t_y (1 − p_y) − p_y rests = p_y (k_y q − rests) + (p_y o − l) q,
// where q = rest / Σe is exact however near 1 p_y is. `own` is e of the label, `rest` the sum of
// the others. `once` blocks FMA contraction, so that results are bit-identical across call sites.
template <class T>
struct LabelGradient {
  Vec<T> at_label, turn;

  FL_INLINE LabelGradient(Vec<T> own, Vec<T> rest, Vec<T> inverse, Vec<T> rests, Vec<T> by_overlap,
                          Vec<T> by_p, Vec<T> by_loss) {
    rests = once(rests);
    const Vec<T> q = rest * inverse, p = own * inverse, own_slope = p * by_overlap - by_loss;
    at_label = p * (by_p * q - rests) + once(own_slope * q);
    turn = rests + p * by_p + own_slope;
  }
};

// The label's part of the gradients of a tile: `at_label` is the gradient at the label's class, and
// e_c (slope · k_c − turn) that of another class c. k: the derivatives by p, or null for zeros.
template <class T>
struct LabelGradients {
  const T *k, *slope, *turn, *at_label;
};

// Writes the gradients of R classes, two vectors at a time: alternating between rows in smaller
// pieces is slower. Slopes::at(r, v) is k of the class c + r.
template <class T, int R, bool kPresent, class P, class Put, class Slopes = EvenSlopes<T, R>>
struct GradientRows {
  static constexpr int L = lanes<T>;
  const LabelGradients<T> by_label;
  const Put put;
  const T* x[R];
  P to[R];
  const typename Types<T>::Int* label;
  const Slopes slopes;
  IVec<T> number[R];

  template <class Row>
  FL_INLINE GradientRows(const Tile<T>& t, int64_t c, const LabelGradients<T>& g, const Row& row,
                         const Put& how, const Slopes& k)
      : by_label(g), put(how), label(t.labels()), slopes(k) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      to[r] = row(c + r);
      number[r] = class_number<T>(c + r);
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
    Vec<T> a[N], b[N], own[N], g[N];
    IVec<T> y[N];
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      a[u] = once(load<T>(by_label.slope + v)), b[u] = once(load<T>(by_label.turn + v));
      if (kPresent)
        own[u] = once(load<T>(by_label.at_label + v)), y[u] = once(label_lanes<T>(label + v));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) {
        const int64_t v = first + u * L;
        g[u] = load<T>(x[r] + v) * (a[u] * slopes.at(r, v) - b[u]);
        if (kPresent) g[u] = select<T>(y[u] == number[r], own[u], g[u]);
      }
      if constexpr (N == 2) put.two(to[r] + first, g[0], g[1]);
      else put(to[r] + first, g[0]);
    }
  }
  FL_INLINE void finish() {}
};

}  // namespace
