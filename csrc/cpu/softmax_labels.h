// Softmax with a label map: the case that training mostly is.
//
// All that a voxel's label decides is computed once per voxel, not once per class, and added to the
// sums of that class alone.
#pragma once

#include "tile.h"
#include "voxel.h"

namespace {

// Loads the logits to x and their maximum to a row; turns them into x − largest where infinite.
template <class T>
void load_and_maximum(Tile<T>& t) {
  constexpr int L = lanes<T>;
  T* largest = t.row(kLargest);
  int64_t classes = t.job.classes;
  if (t.direct()) {
    for (int64_t c = 0; c < classes; c += 2) {
      const T *from = t.direct_row(c), *next = t.direct_row(c + 1 < classes ? c + 1 : c);
      const T* before = c ? largest : from;
      T *to = t.x + c * t.stride, *to_next = c + 1 < classes ? to + t.stride : to;
      for (int v = 0; v < t.padded; v += L) {
        Vec<T> a = load<T>(from + v), b = load<T>(next + v);
        store<T>(to + v, a);
        store<T>(to_next + v, b);
        store<T>(largest + v, larger(b, larger(a, load<T>(before + v))));
      }
    }
  } else {
    t.load_logits();
    std::memcpy(largest, t.x, sizeof(T) * size_t(t.padded));
    for (int64_t c = 1; c < classes; ++c)
      for (int v = 0; v < t.padded; v += L)
        store<T>(largest + v, larger(load<T>(t.x + c * t.stride + v), load<T>(largest + v)));
  }
  IVec<T> infinite{};
  for (int v = 0; v < t.padded; v += L)
    infinite |= absolute<T>(load<T>(largest + v)) == T(INFINITY);
  if (any<T>(infinite)) {
    // Classes that share an infinite maximum share the probability; the others have none.
    for (int v = 0; v < t.padded; ++v) {
      T most = largest[v];
      if (!(std::fabs(most) == T(INFINITY))) continue;
      for (int64_t c = 0; c < classes; ++c) {
        T& x = t.x[c * t.stride + v];
        x = x == most ? T(0) : x == x ? T(-INFINITY) : x;
      }
      largest[v] = T(0);
    }
  }
}

// As `exponentials`, for the U vectors of voxels that start at v, whose sums stay in registers.
template <class T, int U, bool kDot>
FL_INLINE void exponential_columns(Tile<T>& t, int v, const T* slope, T* dot) {
  constexpr int L = lanes<T>;
  int64_t classes = t.job.classes;
  Vec<T> largest[U], rest[U] = {}, sum[U] = {};
  IVec<T> ties[U] = {};  // −(number of classes at the maximum)
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) largest[u] = load<T>(t.row(kLargest) + v + u * L);
  // Sums of many classes are made of sums of a few: rounding errors then do not pile up.
  for (int64_t first = 0; first < classes; first += kFewClasses) {
    int64_t last = first + kFewClasses < classes ? first + kFewClasses : classes;
    Vec<T> few_rest[U] = {}, few_sum[U] = {};
    T* x = t.x + first * t.stride + v;
    for (int64_t c = first; c < last; ++c, x += t.stride) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        Vec<T> d = load<T>(x + u * L) - largest[u];
        Vec<T> e = exponential<T>(d);
        IVec<T> top = d == T(0);
        store<T>(x + u * L, e);
        // The sum without its largest member is exact to the last bit where one class dominates,
        // and with it 1−p and log p are.
        few_rest[u] += drop<T>(top, e);
        ties[u] += top;
        if (kDot) few_sum[u] += e * slope[c];
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      rest[u] += few_rest[u];
      if (kDot) sum[u] += few_sum[u];
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    Vec<T> tied = from_bits<T>(Numbers<T>::round_bits - ties[u]) - Numbers<T>::round;
    store<T>(t.row(kInverse) + v + u * L, T(1) / (rest[u] + tied));
    store<T>(t.row(kRest) + v + u * L, rest[u] + (tied - T(1)));
    if (kDot) store<T>(dot + v + u * L, sum[u]);
  }
}

// x becomes e^(x−largest); rest, the sum below the largest, and 1 / sum. The label's e^(x−largest)
// and its gap to the largest are kept. With `kDot`, row `dot` gets Σ_c slope_c e^(x−largest).
template <class T, bool kDot>
void exponentials(Tile<T>& t, const T* slope, T* dot, bool labels) {
  constexpr int L = lanes<T>;
  if (labels) {
    T *largest = t.row(kLargest), *gap = t.row(kLabelGap);
    t.gather_rows(t.x, gap);
    for (int v = 0; v < t.padded; v += L)
      store<T>(gap + v, load<T>(largest + v) - load<T>(gap + v));
  }
  constexpr int U = kVectorBytes < 32 ? 4 : 2;
  int v = 0;
  for (; v + U * L <= t.padded; v += U * L) exponential_columns<T, U, kDot>(t, v, slope, dot);
  for (; v < t.padded; v += L) exponential_columns<T, 1, kDot>(t, v, slope, dot);
  if (labels) t.gather_rows(t.x, t.row(kLabelExp));
}

// 1 − p of the label.
template <class T>
FL_INLINE Vec<T> label_complement(Vec<T> e, Vec<T> gap, Vec<T> rest, Vec<T> inverse) {
  return select<T>(gap == T(0), rest, (rest + T(1)) - e) * inverse;
}

// sums[c] += Σ_v x[c][v] scale[v] for R classes.
template <class T, int R>
FL_INLINE void add_products(const Tile<T>& t, int64_t c, const T* scale, double* sums) {
  const T* x = t.x + c * t.stride;
  Vec<T> a[R] = {};
  for (int v = 0; v < t.padded; v += lanes<T>) {
    Vec<T> k = load<T>(scale + v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r] += load<T>(x + r * t.stride + v) * k;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sums[c + r] += total<T>(a[r]);
}

// The gradient of R classes from their e^(x−largest).
template <class T, int R, bool kStream>
FL_INLINE void write_gradient(const Tile<T>& t, const Writer<T>& writer, int64_t c, const T* k,
                              const T* slope, const T* turn, const T* at_label) {
  const T *x = t.x + c * t.stride, *label = t.rows + kLabel * kMaxTile;
  T* to[R];
  Vec<T> factor[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    to[r] = writer.row(c + r);
    factor[r] = splat<T>(k ? k[c + r] : T(0));
  }
  for (int v = 0; v < t.padded; v += lanes<T>) {
    Vec<T> a = load<T>(slope + v), b = load<T>(turn + v), own = load<T>(at_label + v);
    Vec<T> y = load<T>(label + v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec<T> g = load<T>(x + r * t.stride + v) * (a * factor[r] - b);
      g = select<T>(y == T(c + r), own, g);
      if (kStream)
        stream<T>(to[r] + v, g);
      else
        store<T>(to[r] + v, g);
    }
  }
}

template <class T>
void reduce_softmax_labels(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  int64_t classes = t.job.classes;
  load_and_maximum(t);
  exponentials<T, false>(t, nullptr, nullptr, true);
  T *m = t.row(kWeight), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T *label_e = t.row(kLabelExp), *gap = t.row(kLabelGap);

  if (s.predicted >= 0 || s.predicted_squared >= 0) {
    T* scale = t.row(kA);
    for (int v = 0; v < t.padded; v += L)
      store<T>(scale + v, load<T>(m + v) * load<T>(inverse + v));
    if (s.predicted >= 0) {
      double* to = sums + s.predicted * classes;
      int64_t c = 0;
      for (; c + 4 <= classes; c += 4) add_products<T, 4>(t, c, scale, to);
      for (; c < classes; ++c) add_products<T, 1>(t, c, scale, to);
    }
    if (s.predicted_squared >= 0)
      for (int64_t c = 0; c < classes; ++c) {
        const T* e = t.x + c * t.stride;
        Vec<T> a{};
        for (int v = 0; v < t.padded; v += L) {
          Vec<T> x = load<T>(e + v);
          a += (x * load<T>(scale + v)) * (x * load<T>(inverse + v));
        }
        sums[s.predicted_squared * classes + c] += total<T>(a);
      }
  }
  T *overlap = t.row(kB), *loss = t.row(kC), *lse = t.row(kE);  // lse: log Σ e^(x−largest)
  bool voxelwise = s.cross_entropy >= 0 || s.gammas > 0 || s.uniform >= 0;
  if (voxelwise)
    for (int v = 0; v < t.padded; v += L) {
      Vec<T> log_sum = log_one_plus<T>(load<T>(rest + v));
      store<T>(lse + v, log_sum);
      store<T>(loss + v, load<T>(gap + v) + log_sum);
    }

  if (s.overlap >= 0)
    for (int v = 0; v < t.padded; v += L)
      store<T>(overlap + v, load<T>(label_e + v) * load<T>(inverse + v) * load<T>(m + v));
  T* weighted_loss = t.row(kD);
  if (s.cross_entropy >= 0)
    for (int v = 0; v < t.padded; v += L) {
      // A voxel without weight has finite logits, so this product is never 0 · ∞.
      store<T>(weighted_loss + v, load<T>(m + v) * load<T>(loss + v));
    }
  t.scatter(m, sums + s.reference * classes);
  Vec<T> all{};
  for (int v = 0; v < t.padded; v += L) all += load<T>(m + v);
  *weight += total<T>(all);
  if (s.overlap >= 0) t.scatter(overlap, sums + s.overlap * classes);
  if (s.cross_entropy >= 0) t.scatter(weighted_loss, sums + s.cross_entropy * classes);
  if (s.reference_squared >= 0) t.scatter(m, sums + s.reference_squared * classes);

  for (int f = 0; f < s.gammas; ++f) {
    T* value = t.row(kD);
    for (int v = 0; v < t.padded; v += L) {
      Vec<T> q = label_complement<T>(load<T>(label_e + v), load<T>(gap + v), load<T>(rest + v),
                                     load<T>(inverse + v));
      Vec<T> focal =
          focal_value<Vec<T>>(power<T>(q, T(s.gamma[f])), load<T>(loss + v)) * load<T>(m + v);
      store<T>(value + v, focal);
    }
    t.scatter(value, sums + s.focal[f] * classes);
  }
  if (s.uniform >= 0) {
    // −log p_c = log Σe − (x_c − largest); the exponentials have replaced x, so it is loaded again.
    load_and_maximum(t);
    T* largest = t.row(kLargest);
    for (int64_t c = 0; c < classes; ++c) {
      const T* x = t.x + c * t.stride;
      Vec<T> a{};
      for (int v = 0; v < t.padded; v += L)
        a += load<T>(m + v) * (load<T>(lse + v) + (load<T>(largest + v) - load<T>(x + v)));
      sums[s.uniform * classes + c] += total<T>(a);
    }
  }
}

template <class T>
void apply_softmax_labels(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  int64_t classes = t.job.classes;
  auto coefficients = [&](int slot) { return slot >= 0 ? t.table + slot * classes : nullptr; };
  const T *by_overlap = coefficients(s.overlap), *by_predicted = coefficients(s.predicted);
  const T* by_squared = coefficients(s.predicted_squared);
  const T *by_loss = coefficients(s.cross_entropy), *by_uniform = coefficients(s.uniform);

  T *m = t.row(kWeight), *label = t.row(kLabel), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T *label_e = t.row(kLabelExp), *gap = t.row(kLabelGap);
  T* base = t.row(kA);  // Σ_c p_c · (derivative by p_c), without the overlap's, without m
  load_and_maximum(t);
  if (by_predicted) {
    exponentials<T, true>(t, by_predicted, base, true);
  } else {
    exponentials<T, false>(t, nullptr, nullptr, true);
    std::memset(base, 0, sizeof(T) * kMaxTile);
  }
  for (int v = 0; v < t.padded; v += L)
    store<T>(base + v, load<T>(base + v) * load<T>(inverse + v));
  if (by_squared)
    for (int64_t first = 0; first < classes; first += kFewClasses) {
      int64_t last = first + kFewClasses < classes ? first + kFewClasses : classes;
      for (int v = 0; v < t.padded; v += L) {
        Vec<T> few{};
        for (int64_t c = first; c < last; ++c) {
          Vec<T> p = load<T>(t.x + c * t.stride + v) * load<T>(inverse + v);
          few += (2 * by_squared[c]) * (p * p);
        }
        store<T>(base + v, load<T>(base + v) + few);
      }
    }
  double uniform_sum = 0;
  if (by_uniform)
    for (int64_t c = 0; c < classes; ++c) uniform_sum += double(by_uniform[c]);
  T uniform_total = T(uniform_sum);

  // What the label decides: the whole gradient at the label's class, and for the other classes
  // Σ_j t_j, where t_j is the derivative by log p_j.
  T *at_label = t.row(kB), *slope = t.row(kC), *turn = t.row(kD);
  T *label_overlap = t.row(kE), *label_rest = t.row(kF), *label_loss = t.row(kLargest);
  t.gather(by_overlap, label_overlap);
  t.gather(by_loss, label_loss);
  t.gather(by_predicted, label_rest);
  // Focal slopes replace the row of the cross-entropy's coefficient by its sum with theirs.
  for (int f = 0; f < s.gammas; ++f) {
    const T* k = t.table + s.focal[f] * classes;
    T gamma = T(s.gamma[f]);
    t.gather(k, turn);
    for (int v = 0; v < t.padded; v += L) {
      Vec<T> e = load<T>(label_e + v), r = load<T>(rest + v), i = load<T>(inverse + v);
      Vec<T> q = label_complement<T>(e, load<T>(gap + v), r, i), p = e * i;
      Vec<T> minus_log = load<T>(gap + v) + log_one_plus<T>(r);
      // p log p → 0 as p → 0, and (1−p)^(γ−1) log p → 0 as p → 1.
      Vec<T> p_log_p = drop<T>(p == T(0), -(p * minus_log));
      Vec<T> less = gamma == 0 ? Vec<T>{} : drop<T>(q == T(0), power<T>(q, gamma - 1));
      Vec<T> change = focal_slope<Vec<T>, T>(power<T>(q, gamma), less, p_log_p, gamma);
      store<T>(label_loss + v, load<T>(label_loss + v) + load<T>(turn + v) * change);
    }
  }
  T two = 2;
  if (by_squared)
    for (int v = 0; v < t.padded; ++v)
      label_rest[v] += two * by_squared[t.y[v]] * label_e[v] * inverse[v];
  for (int v = 0; v < t.padded; v += L) {
    Vec<T> i = load<T>(inverse + v), w = load<T>(m + v), e = load<T>(label_e + v);
    Vec<T> q = label_complement<T>(e, load<T>(gap + v), load<T>(rest + v), i), p = e * i;
    Vec<T> own = p * load<T>(label_overlap + v) - load<T>(label_loss + v);
    Vec<T> others = load<T>(base + v) - uniform_total;
    store<T>(at_label + v, w * (p * (load<T>(label_rest + v) - others) + own * q));
    store<T>(turn + v, w * i * (others + own));
    store<T>(slope + v, w * i);
  }
  if (by_uniform)
    for (int v = 0; v < t.padded; ++v) at_label[v] -= m[v] * by_uniform[t.y[v]];

  Writer<T> writer(t, t.x);
  if (!by_squared && !by_uniform) {
    auto write = [&](auto past_caches) {
      constexpr bool kStream = decltype(past_caches)::value;
      int64_t c = 0;
      for (; c + 4 <= classes; c += 4)
        write_gradient<T, 4, kStream>(t, writer, c, by_predicted, slope, turn, at_label);
      for (; c < classes; ++c)
        write_gradient<T, 1, kStream>(t, writer, c, by_predicted, slope, turn, at_label);
    };
    if (writer.past_caches)
      write(std::true_type{});
    else
      write(std::false_type{});
  } else {
    for (int64_t c = 0; c < classes; ++c) {
      const T* e = t.x + c * t.stride;
      T* to = writer.row(c);
      Vec<T> k = splat<T>(by_predicted ? by_predicted[c] : T(0)), number = splat<T>(T(c));
      Vec<T> k2 = splat<T>(by_squared ? two * by_squared[c] : T(0));
      Vec<T> u = splat<T>(by_uniform ? by_uniform[c] : T(0));
      for (int v = 0; v < t.padded; v += L) {
        Vec<T> x = load<T>(e + v), p = x * load<T>(inverse + v);
        Vec<T> g = x * (load<T>(slope + v) * (k + k2 * p) - load<T>(turn + v));
        g -= load<T>(m + v) * u;
        g = select<T>(load<T>(label + v) == number, load<T>(at_label + v), g);
        writer.put(to + v, g);
      }
    }
  }
  writer.finish(t.second);
}

}  // namespace
