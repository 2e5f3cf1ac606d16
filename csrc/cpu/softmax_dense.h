// Softmax with a dense target, for Dice, cross-entropy and other losses of the same sums. A tile's
// logits and target are read once.
//
// As ∂ log p_j / ∂x_c = δ_jc − p_c, the gradient is
//   ∂L/∂x_c = t_c − p_c Σ_j t_j,  t_c = m (p_c (o_c g_c + k_c) − l_c g_c),
// with o, k and l the derivatives by overlap, predicted and cross-entropy.
#pragma once

#include "loops.h"
#include "softmax.h"
#include "tile.h"

namespace {

// The sums that this path computes.
constexpr uint32_t kDenseSums =
    fastloss::kReference | fastloss::kOverlap | fastloss::kPredicted | fastloss::kCrossEntropy;

inline bool suits_softmax_dense(const Job& job) {
  return job.activation == Activation::softmax && job.dense && job.asks_only_for(kDenseSums) &&
         !job.losses;
}

// Prefetches contiguous rows while others are computed.
struct RowsAhead {
  const char* first = nullptr;  // of class 0
  int64_t row = 0, item = 0;    // bytes from row to row, and of a number

  RowsAhead(const char* data, const Array& array, const Runs& runs) {
    if (runs.count != 1 || runs.stride != item_size(array.dtype)) return;
    first = data + runs.run[0].offset;
    row = array.channel_stride, item = runs.stride;
  }
  // The cache lines that N vectors of T from voxel v of class c on span.
  template <class T, int N>
  FL_INLINE void fetch(int64_t c, int64_t v) const {
    if (!first) return;
    const char* p = first + c * row + v * item;
#pragma GCC unroll 4
    for (int i = 0; i < N * kVectorBytes; i += 64) prefetch_far(p + i / int(sizeof(T)) * item);
  }
};

// The target's rows of a class and its neighbour, in place or loaded to two buffers.
template <class T, int R>
struct TargetRows {
  const T* g[R];

  TargetRows(Tile<T>& t, int64_t c) {
    for (int r = 0; r < R; ++r) g[r] = t.target_numbers(c + r, t.row(r ? kF : kE));
  }
};

// Adds to the sums of R classes: m g, m p g, m p and the loss m g (gap + log Σe).
template <class T, int R, bool kLogs, bool kEvenSums>
struct DenseSumRows {
  static constexpr int L = lanes<T>;
  const int64_t c;
  const RowsAhead& ahead;
  const T *x[R], *gap[R], *g[R], *m, *scale, *log_sum;
  Vec<T> reference[R] = {}, overlap[R] = {}, predicted[R] = {}, losses[R] = {};

  FL_INLINE DenseSumRows(Tile<T>& t, const TargetRows<T, R>& target, int64_t first,
                         const RowsAhead& soon)
      : c(first), ahead(soon) {
    m = t.row(kWeight), scale = t.row(kA), log_sum = t.row(kLargest);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      gap[r] = t.second + (c + r) * t.stride;
      g[r] = target.g[r];
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) ahead.fetch<T, N>(c + r, first);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      const Vec<T> k = once(load<T>(scale + v));
      Vec<T> w, logs;
      if (!kEvenSums) w = once(load<T>(m + v));
      if (kLogs) logs = once(load<T>(log_sum + v));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<T> here = load<T>(g[r] + v);
        const Vec<T> p = load<T>(x[r] + v) * k;  // m p
        predicted[r] += p;
        overlap[r] += p * here;
        if (!kEvenSums) here *= w;
        reference[r] += here;
        if (kLogs) losses[r] += here * (load<T>(gap[r] + v) + logs);
      }
    }
  }
  FL_INLINE void finish() {}
};

// The loss of a class where some logits are infinite: weight 0 times an infinite loss is 0.
template <class T>
double dense_loss(Tile<T>& t, int64_t c, const T* g) {
  const T *m = t.row(kWeight), *gap = t.second + c * t.stride, *log_sum = t.row(kLargest);
  Vec<T> sum{};
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>)
    sum += product<T>(load<T>(m + v) * load<T>(g + v), load<T>(gap + v) + load<T>(log_sum + v));
  return total<T>(sum);
}

template <class T, bool kLogs, bool kEvenSums>
void reduce_dense_rows(Tile<T>& t, double* sums) {
  const auto& s = t.job.slots;
  const int64_t classes = t.job.classes;
  const RowsAhead next(t.logits() + t.step * item_size(t.job.logits.dtype), t.job.logits,
                       t.logit_runs);
  in_pairs(classes, [&](int64_t c, auto count) {
    constexpr int R = decltype(count)::value;
    const TargetRows<T, R> target(t, c);
    DenseSumRows<T, R, kLogs, kEvenSums> rows(t, target, c, next);
    run(rows, 0, t.padded);
    for (int r = 0; r < R; ++r) {
      double* to = sums + c + r;
      to[s.reference * classes] += total<T>(rows.reference[r]);
      if (s.overlap >= 0) to[s.overlap * classes] += total<T>(rows.overlap[r]);
      if (s.predicted >= 0) to[s.predicted * classes] += total<T>(rows.predicted[r]);
      if (!kLogs) continue;
      double loss = total<T>(rows.losses[r]);
      if (!(loss == loss)) loss = dense_loss(t, c + r, target.g[r]);
      to[s.cross_entropy * classes] += loss;
    }
  });
}

template <class T>
void reduce_softmax_dense(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const bool logs = t.job.slots.cross_entropy >= 0;
  load_and_maximum(t);
  const RowsAhead target(t.target_row(0), t.job.target, t.target_runs);
  auto ahead = [&](int64_t c, int64_t v, auto vectors) {
    target.fetch<T, decltype(vectors)::value>(c, v);
  };
  if (logs) exponentials<true>(t, ahead);
  else exponentials<false>(t, ahead);
  T *m = t.row(kWeight), *scale = t.row(kA), *log_sum = t.row(kLargest);
  Vec<T> all{};
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const Vec<T> w = load<T>(m + v);
    all += w;
    store<T>(scale + v, w * load<T>(t.row(kInverse) + v));
    // The largest logit is not needed any more.
    if (logs) store<T>(log_sum + v, log_one_plus<T>(load<T>(t.row(kRest) + v)));
  }
  *weight += total<T>(all);
  auto run =
      logs ? (t.even ? reduce_dense_rows<T, true, true> : reduce_dense_rows<T, true, false>)
           : (t.even ? reduce_dense_rows<T, false, true> : reduce_dense_rows<T, false, false>);
  run(t, sums);
}

// Writes t_c of R classes to `second`, and adds t_c to its sum over the classes.
template <class T, int R>
struct DenseSlopeRows {
  static constexpr int L = lanes<T>;
  const int64_t c;
  const RowsAhead& ahead;
  const T *x[R], *g[R], *m, *scale;
  T *to[R], *sum;
  Vec<T> overlap[R], predicted[R], loss[R];

  FL_INLINE DenseSlopeRows(Tile<T>& t, const TargetRows<T, R>& target, int64_t first,
                           const RowsAhead& soon)
      : c(first), ahead(soon) {
    m = t.row(kWeight), scale = t.row(kA), sum = t.row(kB);
    const auto& s = t.job.slots;
    auto k = [&](int slot, int64_t i) {
      return splat<T>(slot >= 0 ? t.table[slot * t.job.classes + i] : T(0));
    };
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      to[r] = t.second + (c + r) * t.stride;
      g[r] = target.g[r];
      overlap[r] = k(s.overlap, c + r), predicted[r] = k(s.predicted, c + r);
      loss[r] = k(s.cross_entropy, c + r);
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) ahead.fetch<T, N>(c + r, first);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      const Vec<T> k = once(load<T>(scale + v)), w = once(load<T>(m + v));
      Vec<T> all = load<T>(sum + v);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<T> here = once(load<T>(g[r] + v));
        const Vec<T> p = load<T>(x[r] + v) * k;  // m p
        const Vec<T> slope = p * (overlap[r] * here + predicted[r]) - (w * here) * loss[r];
        store<T>(to[r] + v, slope);
        all += slope;
      }
      store<T>(sum + v, all);
    }
  }
  FL_INLINE void finish() {}
};

// Writes the gradients of R classes, t_c − p_c Σ_j t_j, two vectors at a time.
template <class T, int R, class P, class Put>
struct DenseGradientRows {
  static constexpr int L = lanes<T>;
  const Put put;
  const T *x[R], *slope[R], *turn;
  P to[R];

  template <class Row>
  FL_INLINE DenseGradientRows(Tile<T>& t, int64_t c, const Row& row, const Put& how) : put(how) {
    turn = t.row(kB);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      slope[r] = t.second + (c + r) * t.stride;
      to[r] = row(c + r);
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
    Vec<T> k[N], g[N];
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) k[u] = once(load<T>(turn + first + u * L));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) {
        const int64_t v = first + u * L;
        g[u] = load<T>(slope[r] + v) - load<T>(x[r] + v) * k[u];
      }
      if constexpr (N == 2) put.two(to[r] + first, g[0], g[1]);
      else put(to[r] + first, g[0]);
    }
  }
  FL_INLINE void finish() {}
};

template <class T>
void apply_softmax_dense(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const int64_t classes = t.job.classes;
  load_and_maximum(t);
  const RowsAhead targets(t.target_row(0), t.job.target, t.target_runs);
  exponentials<false>(t, [&](int64_t c, int64_t v, auto vectors) {
    targets.fetch<T, decltype(vectors)::value>(c, v);
  });
  T *m = t.row(kWeight), *inverse = t.row(kInverse), *scale = t.row(kA), *sum = t.row(kB);
  for (int64_t v = 0, end = t.padded; v < end; v += L)
    store<T>(scale + v, load<T>(m + v) * load<T>(inverse + v));
  std::memset(sum, 0, sizeof(T) * kMaxTile);
  std::memset(t.row(kSumOfMany), 0, sizeof(T) * kMaxTile);
  const RowsAhead next(t.logits() + t.step * item_size(t.job.logits.dtype), t.job.logits,
                       t.logit_runs);
  in_pairs(classes, [&](int64_t c, auto count) {
    constexpr int R = decltype(count)::value;
    const TargetRows<T, R> target(t, c);
    DenseSlopeRows<T, R> rows(t, target, c, next);
    run(rows, 0, t.padded);
    if ((c + R) % kFewClasses == 0) t.add_row(sum, t.row(kSumOfMany));
  });
  for (int64_t v = 0, end = t.padded; v < end; v += L)
    store<T>(sum + v, (load<T>(t.row(kSumOfMany) + v) + load<T>(sum + v)) * load<T>(inverse + v));
  write_rows(t, t.x, t.second, [&](const auto& row, const auto& put) {
    using Put = std::remove_cv_t<std::remove_reference_t<decltype(put)>>;
    in_pairs(classes, [&](int64_t c, auto count) {
      DenseGradientRows<T, decltype(count)::value, decltype(row(0)), Put> rows(t, c, row, put);
      run(rows, 0, t.padded);
    });
  });
}

}  // namespace
