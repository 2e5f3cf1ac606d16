// Every other case: dense targets, sigmoid, or given probabilities, row by row.
#pragma once

#include "softmax.h"
#include "tile.h"
#include "voxel.h"

namespace {

// p, −log p and −log(1−p) of one row of a tile.
template <class T>
struct Fields {
  T *p, *loss, *loss_rest, *q;
};

// Softmax: x holds e^(x−largest) and second the x−largest, where logarithms are wanted.
template <class T>
void begin_general(Tile<T>& t, bool logs) {
  constexpr int L = lanes<T>;
  if (t.job.activation != Activation::softmax) {
    t.load_logits();
    return;
  }
  load_and_maximum(t);
  auto nothing = [](int64_t, int64_t, auto) {};
  if (logs) exponentials<true>(t, nothing);
  else exponentials<false>(t, nothing);
  // The largest logit is not needed any more; its row takes log Σ e^(x−largest).
  if (logs)
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(t.row(kLargest) + v, log_one_plus<T>(load<T>(t.row(kRest) + v)));
}

// `rests`: 1 − p is wanted of the softmax as well.
template <class T>
Fields<T> activate_row(Tile<T>& t, int64_t c, bool logs, bool rests) {
  constexpr int L = lanes<T>;
  Fields<T> f{t.row(kA), t.row(kB), t.row(kC), t.row(kD)};
  const T* x = t.x + c * t.stride;
  if (t.job.activation == Activation::softmax) {
    const T *inverse = t.row(kInverse), *rest = t.row(kRest), *log_sum = t.row(kLargest);
    const T* gap = t.second + c * t.stride;
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> e = load<T>(x + v), i = load<T>(inverse + v);
      store<T>(f.p + v, e * i);
      if (logs) store<T>(f.loss + v, load<T>(gap + v) + load<T>(log_sum + v));
      if (rests) store<T>(f.q + v, complement<T>(e, load<T>(gap + v), load<T>(rest + v), i));
    }
  } else if (t.job.activation == Activation::sigmoid) {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> a = load<T>(x + v), e = exponential<T>(-absolute<T>(a));
      Vec<T> big = T(1) / (e + T(1)), little = e * big;
      IVec<T> positive = a > T(0);
      store<T>(f.p + v, select<T>(positive, big, little));
      store<T>(f.q + v, select<T>(positive, little, big));
      if (logs) {
        Vec<T> l = log_one_plus_small(e);
        store<T>(f.loss + v, larger(splat<T>(0), -a) + l);
        store<T>(f.loss_rest + v, larger(splat<T>(0), a) + l);
      }
    }
  } else {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> p = load<T>(x + v);
      store<T>(f.p + v, p);
      store<T>(f.q + v, T(1) - p);
      if (logs) store<T>(f.loss + v, -logarithm<T>(p));
    }
  }
  return f;
}

template <class T, class F>
FL_INLINE double sum_row(int padded, F term) {
  Vec<T> a{};
  for (int v = 0; v < padded; v += lanes<T>) a += term(v);
  return total<T>(a);
}

// Σ m g, Σ m p g, Σ m p and Σ m g (−log p) of one row of a tile.
struct ClassTotals {
  double reference, overlap, predicted, loss;
};

template <class T, bool kLogs>
ClassTotals class_totals(int padded, const T* m, const T* g, const T* p, const T* loss) {
  Vec<T> reference{}, overlap{}, predicted{}, losses{};
  for (int v = 0; v < padded; v += lanes<T>) {
    const Vec<T> w = load<T>(m + v), here = w * load<T>(g + v), probability = load<T>(p + v);
    reference += here;
    overlap += here * probability;
    predicted += w * probability;
    if (kLogs) losses += product<T>(here, load<T>(loss + v));
  }
  return {total<T>(reference), total<T>(overlap), total<T>(predicted), total<T>(losses)};
}

template <class T>
void reduce_general(Tile<T>& t, double* sums, double* weight) {
  const auto& s = t.job.slots;
  int64_t classes = t.job.classes;
  bool sigmoid = t.job.activation == Activation::sigmoid;
  bool logs = s.cross_entropy >= 0 || s.uniform >= 0 || s.gammas > 0;
  begin_general(t, logs);
  T *m = t.row(kWeight), *g = t.row(kE);
  int n = t.padded;
  *weight += sum_row<T>(n, [&](int v) { return load<T>(m + v); });
  for (int64_t c = 0; c < classes; ++c) {
    Fields<T> f = activate_row(t, c, logs, s.gammas > 0);
    t.load_target(c, g);
    const ClassTotals sum = s.cross_entropy >= 0 ? class_totals<T, true>(n, m, g, f.p, f.loss)
                                                 : class_totals<T, false>(n, m, g, f.p, f.loss);
    sums[s.reference * classes + c] += sum.reference;
    if (s.overlap >= 0) sums[s.overlap * classes + c] += sum.overlap;
    if (s.predicted >= 0) sums[s.predicted * classes + c] += sum.predicted;
    if (s.cross_entropy >= 0) sums[s.cross_entropy * classes + c] += sum.loss;
    auto add = [&](int slot, auto term) { sums[slot * classes + c] += sum_row<T>(n, term); };
    auto at = [&](const T* r, int v) { return load<T>(r + v); };
    if (s.predicted_squared >= 0) {
      add(s.predicted_squared, [&](int v) { return at(m, v) * (at(f.p, v) * at(f.p, v)); });
      add(s.reference_squared, [&](int v) { return at(m, v) * (at(g, v) * at(g, v)); });
    }
    if (s.cross_entropy_rest >= 0)
      add(s.cross_entropy_rest,
          [&](int v) { return product<T>(at(m, v) * (T(1) - at(g, v)), at(f.loss_rest, v)); });
    if (s.uniform >= 0)
      add(s.uniform, [&](int v) {
        Vec<T> loss = at(f.loss, v);
        if (sigmoid) loss += at(f.loss_rest, v);
        return product<T>(at(m, v), loss);
      });
    for (int i = 0; i < s.gammas; ++i) {
      T gamma = T(s.gamma[i]);
      add(s.focal[i], [&](int v) {
        Vec<T> scale = at(m, v) * at(g, v) * power<T>(at(f.q, v), gamma);
        return product<T>(scale, at(f.loss, v));
      });
      if (sigmoid)
        add(s.focal_rest[i], [&](int v) {
          Vec<T> scale = at(m, v) * (T(1) - at(g, v)) * power<T>(at(f.p, v), gamma);
          return product<T>(scale, at(f.loss_rest, v));
        });
    }
  }
}

// The derivative of q^γ log p by log p.
template <class T>
FL_INLINE Vec<T> slope_of_focal(Vec<T> p, Vec<T> minus_log, Vec<T> q, T gamma) {
  if (gamma == 0) return splat<T>(1);
  Vec<T> p_log_p = -product<T>(p, minus_log);
  Vec<T> less = product<T>(p_log_p, power<T>(q, gamma - 1));
  return focal_slope<Vec<T>, T>(power<T>(q, gamma), less, splat<T>(1), gamma);
}

template <class T>
void apply_general(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  int64_t classes = t.job.classes;
  bool softmax = t.job.activation == Activation::softmax;
  bool sigmoid = t.job.activation == Activation::sigmoid;
  bool logs = s.gammas > 0;
  begin_general(t, logs);
  T *m = t.row(kWeight), *g = t.row(kE), *by_p = t.row(kF);
  T *by_log = t.row(kLabelExp), *by_rest = t.row(kLabelGap), *sum = t.row(kLabel);
  // With a label map kLabel is still read by load_target, and softmax is elsewhere.
  if (softmax) {
    std::memset(sum, 0, sizeof(T) * kMaxTile);
    std::memset(t.row(kSumOfMany), 0, sizeof(T) * kMaxTile);
  }
  // Without focal terms to add to them, the derivatives need no rows of their own.
  const bool joined = softmax && s.gammas == 0;
  auto k = [&](int slot, int64_t c) { return slot >= 0 ? t.table[slot * classes + c] : T(0); };
  auto at = [&](const T* r, int64_t v) { return load<T>(r + v); };

  for (int64_t c = 0; c < classes; ++c) {
    Fields<T> f = activate_row(t, c, logs, logs);
    t.load_target(c, g);
    T overlap = k(s.overlap, c), predicted = k(s.predicted, c);
    T squared = 2 * k(s.predicted_squared, c);
    T loss = k(s.cross_entropy, c), loss_rest = k(s.cross_entropy_rest, c);
    T uniform = k(s.uniform, c);
    // The derivatives by p and by log p, and of the sigmoid by log(1−p).
    auto slope = [&](int64_t v) {
      return at(m, v) * (overlap * at(g, v) + predicted + squared * at(f.p, v));
    };
    auto log_slope = [&](int64_t v) { return -(at(m, v) * (loss * at(g, v) + uniform)); };
    if (!joined) {
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        store<T>(by_p + v, slope(v));
        store<T>(by_log + v, log_slope(v));
        if (sigmoid) store<T>(by_rest + v, -(at(m, v) * (loss_rest * (T(1) - at(g, v)) + uniform)));
      }
    }
    for (int i = 0; i < s.gammas; ++i) {
      T gamma = T(s.gamma[i]), here = k(s.focal[i], c);
      T there = sigmoid ? k(s.focal_rest[i], c) : T(0);
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        Vec<T> y = at(g, v), w = at(m, v), p = at(f.p, v), q = at(f.q, v);
        store<T>(by_log + v,
                 at(by_log, v) - w * here * y * slope_of_focal<T>(p, at(f.loss, v), q, gamma));
        if (sigmoid)
          store<T>(by_rest + v,
                   at(by_rest, v) -
                       w * there * (T(1) - y) * slope_of_focal<T>(q, at(f.loss_rest, v), p, gamma));
      }
    }
    T* x = t.x + c * t.stride;
    if (softmax) {
      // t_c, the derivative by log p_c, takes the place of x − largest in `second`.
      T* turn = t.second + c * t.stride;
      auto take = [&](int64_t v, Vec<T> value) {
        store<T>(turn + v, value);
        store<T>(sum + v, at(sum, v) + value);
        store<T>(x + v, at(f.p, v));
      };
      if (joined)
        for (int64_t v = 0, end = t.padded; v < end; v += L)
          take(v, slope(v) * at(f.p, v) + log_slope(v));
      else
        for (int64_t v = 0, end = t.padded; v < end; v += L)
          take(v, at(by_p, v) * at(f.p, v) + at(by_log, v));
      if (c % kFewClasses == kFewClasses - 1) t.add_row(sum, t.row(kSumOfMany));
    } else if (sigmoid) {
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        Vec<T> p = at(f.p, v), q = at(f.q, v);
        store<T>(x + v, at(by_p, v) * p * q + at(by_log, v) * q - at(by_rest, v) * p);
      }
    } else {
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        Vec<T> h = at(by_log, v);
        store<T>(x + v, at(by_p, v) + drop<T>(h == T(0), h / at(f.p, v)));
      }
    }
  }
  if (softmax) t.add_row(t.row(kSumOfMany), sum);
  write_rows(t, t.x, t.second, [&](const auto& row, const auto& put) {
    for (int64_t c = 0; c < classes; ++c) {
      const T *x = t.x + c * t.stride, *turn = t.second + c * t.stride;
      auto to = row(c);
      if (softmax)
        for (int64_t v = 0, end = t.padded; v < end; v += L)
          put(to + v, at(turn, v) - at(x, v) * at(sum, v));
      else
        for (int64_t v = 0, end = t.padded; v < end; v += L) put(to + v, at(x, v));
    }
  });
}

}  // namespace
