// Softmax with a label map: the case that training mostly is.
//
// What a voxel's label decides is computed once per voxel, not once per class.
#pragma once

#include "softmax.h"
#include "voxel.h"

namespace {

// Exponentials of logits this small need no maximum taken off, nor do their quotients overflow.
constexpr int kNear = 36;

// to[v] = e^from[v], and the least and greatest of from, for U vectors.
template <class S, class T, int U>
FL_INLINE void exponentials_of_vectors(const S* from, T* to, Vec<T>& low, Vec<T>& high) {
  constexpr int L = lanes<T>;
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    Vec<T> x = load_as<S, T>(from + u * L);
    low = smaller(x, low);
    high = larger(x, high);
    store<T>(to + u * L, exponential_near<T>(x));
  }
}

// x becomes e^x, of rows that lie in memory as numbers of type S, row(c). False: some are not near.
template <class S, class T, class Row>
bool exponentials_of_rows(Tile<T>& t, const Row& row, bool ahead) {
  constexpr int L = lanes<T>, U = 64 / int(sizeof(S)) / L;  // vectors of a cache line
  Vec<T> low{}, high{};
  for (int64_t c = 0, classes = t.job.classes; c < classes; ++c) {
    T* to = t.x + c * t.stride;
    const S* from = row(c);
    // The processor follows each row by itself but cannot guess where the next one starts.
    const S* soon = ahead ? t.template row_ahead<S>(c + kAhead) : from;
    int64_t v = 0, end = t.padded;
    prefetch(soon + end - 1);  // one line more where rows do not start with a line
    for (; v + U * L <= end; v += U * L) {
      prefetch(soon + v);
      exponentials_of_vectors<S, T, U>(from + v, to + v, low, high);
    }
    for (; v < end; v += L) exponentials_of_vectors<S, T, 1>(from + v, to + v, low, high);
  }
  // NaN is in neither and makes its own way: its exponential is NaN.
  return !any<T>((low < -T(kNear)) | (high > T(kNear)));
}

// x becomes e^x if all logits are near 0. False: some are not, and x is of no use.
template <class T>
bool exponentials_near(Tile<T>& t) {
  if (!t.contiguous()) {
    t.load_logits();
    return exponentials_of_rows<T>(t, [&](int64_t c) { return t.x + c * t.stride; }, false);
  }
  bool near = false;
  with_storage<T>(t.job.logits.dtype, [&](auto number) {
    using S = decltype(number);
    near = exponentials_of_rows<S>(t, [&](int64_t c) { return t.template source_row<S>(c); }, true);
  });
  return near;
}

// x becomes e^(x−largest); the label's gap to the largest is kept.
template <class T>
void exponentials_far(Tile<T>& t) {
  constexpr int L = lanes<T>;
  load_and_maximum(t);
  T *largest = t.row(kLargest), *gap = t.row(kLabelGap);
  const auto* label = t.labels();
  std::memset(gap, 0, sizeof(T) * kMaxTile);
  for (int64_t c = 0, classes = t.job.classes; c < classes; ++c) {
    T* x = t.x + c * t.stride;
    const IVec<T> number = class_number<T>(c);
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> below = load<T>(x + v) - load<T>(largest + v);
      store<T>(gap + v, load<T>(gap + v) - keep<T>(label_lanes<T>(label + v) == number, below));
      store<T>(x + v, exponential<T>(below));
    }
  }
}

// Of R classes, for every voxel: adds the exponentials of those that are not the label to `rest`,
// with `slope` also times it to `dot`, and puts the label's into `own`. Labels decide by masks: a
// branch would be guessed wrongly wherever organs meet. The first classes of all start the sums.
template <class T, int R>
FL_INLINE void add_classes(const Tile<T>& t, int64_t c, T* own, T* rest, const T* slope, T* dot) {
  const T* x = t.x + c * t.stride;
  const int64_t stride = t.stride, end = t.padded;
  const bool first = c == 0;
  const auto* label = t.labels();
  IVec<T> number[R];
  Vec<T> k[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    number[r] = class_number<T>(c + r);
    k[r] = splat<T>(slope ? slope[c + r] : T(0));
  }
  auto run = [&](auto with_dot) {
    for (int64_t v = 0; v < end; v += lanes<T>) {
      const IVec<T> y = once(label_lanes<T>(label + v));
      Vec<T> mine{}, sum{}, product{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<T> e = once(load<T>(x + r * stride + v));
        IVec<T> is_label = y == number[r];
        mine = either<T>(mine, keep<T>(is_label, e));
        e = drop<T>(is_label, e);
        sum += e;
        if (with_dot) product += e * k[r];
      }
      store<T>(own + v, first ? mine : either<T>(load<T>(own + v), mine));
      store<T>(rest + v, first ? sum : load<T>(rest + v) + sum);
      if (with_dot) store<T>(dot + v, first ? product : load<T>(dot + v) + product);
    }
  };
  if (slope) run(std::true_type{});
  else run(std::false_type{});
}

// The exponentials of a tile, the label's, and the sum of the others: kept apart, that sum is exact
// to the last bit where the label dominates, and with it 1−p and log p are. Returns whether the
// logits were near.
template <class T>
bool begin_softmax_labels(Tile<T>& t, const T* slope, T* dot) {
  // One class alone has p = 1 exactly, which only the maximum makes sure of.
  bool near = t.job.classes > 1 && exponentials_near(t);
  if (!near) exponentials_far(t);
  T *own = t.row(kLabelExp), *rest = t.row(kRest);
  int64_t classes = t.job.classes;
  T *many = t.row(kSumOfMany), *dot_of_many = t.row(kDotOfMany);
  if (classes > kFewClasses) {
    std::memset(many, 0, sizeof(T) * kMaxTile);
    std::memset(dot_of_many, 0, sizeof(T) * kMaxTile);
  }
  int64_t c = 0;
  for (; c + 4 <= classes; c += 4) {
    add_classes<T, 4>(t, c, own, rest, slope, dot);
    // Sums of many classes are made of sums of a few: rounding errors then do not pile up.
    if (classes > kFewClasses && (c + 4) % kFewClasses == 0) {
      t.add_row(rest, many);
      if (slope) t.add_row(dot, dot_of_many);
    }
  }
  for (; c + 2 <= classes; c += 2) add_classes<T, 2>(t, c, own, rest, slope, dot);
  for (; c < classes; ++c) add_classes<T, 1>(t, c, own, rest, slope, dot);
  if (classes > kFewClasses) {
    t.add_row(many, rest);
    if (slope) t.add_row(dot_of_many, dot);
  }
  return near;
}

// −log p of the label's class, for a vector of voxels.
template <class T>
FL_INLINE Vec<T> label_loss(Tile<T>& t, bool near, int64_t v, Vec<T> own, Vec<T> rest) {
  if (near) return log_one_plus<T>(rest / own);
  Vec<T> gap = load<T>(t.row(kLabelGap) + v);
  return gap + log_one_plus<T>(select<T>(gap == T(0), rest, (rest + own) - T(1)));
}

// The sums over the tile's voxels of one set of slots, (C,) each.
struct ClassSums {
  double *reference, *overlap, *predicted, *loss;
};

// Adds those of R classes: m g, m p g, m p and the loss, where m p is x · scale, and `value` that
// of the label. `kEven`: all m are 1, and voxels are counted.
template <class T, int R, bool kEven>
FL_INLINE void add_to_classes(const Tile<T>& t, int64_t c, const T* m, const T* scale,
                              const T* value, const T* loss, const ClassSums& to) {
  const T* x = t.x + c * t.stride;
  const int64_t stride = t.stride;
  const auto* label = t.labels();
  Vec<T> reference[R] = {}, overlap[R] = {}, predicted[R] = {}, losses[R] = {};
  IVec<T> count[R] = {};
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    const IVec<T> y = once(label_lanes<T>(label + v));
    const Vec<T> k = once(load<T>(scale + v)), w = load<T>(m + v);
    const Vec<T> p = once(load<T>(value + v)), l = once(load<T>(loss + v));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      IVec<T> is_label = y == class_number<T>(c + r);
      predicted[r] += load<T>(x + r * stride + v) * k;
      overlap[r] += keep<T>(is_label, p);
      if (kEven) count[r] -= is_label;
      else reference[r] += keep<T>(is_label, w);
      losses[r] += keep<T>(is_label, l);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (kEven) reference[r] = __builtin_convertvector(count[r], Vec<T>);
    to.reference[c + r] += total<T>(reference[r]);
    to.overlap[c + r] += total<T>(overlap[r]);
    to.predicted[c + r] += total<T>(predicted[r]);
    to.loss[c + r] += total<T>(losses[r]);
  }
}

// The same for all classes, of which there are few.
template <class T, bool kEven>
void add_to_few_classes(const Tile<T>& t, const T* m, const T* scale, const T* value, const T* loss,
                        const ClassSums& to) {
  int64_t c = 0, classes = t.job.classes;
  for (; c + 2 <= classes; c += 2) add_to_classes<T, 2, kEven>(t, c, m, scale, value, loss, to);
  for (; c < classes; ++c) add_to_classes<T, 1, kEven>(t, c, m, scale, value, loss, to);
}

// The same for many classes, where it is less work to look at each label once.
template <class T>
void add_to_many_classes(const Tile<T>& t, const T* m, const T* scale, const T* value,
                         const T* loss, const ClassSums& to) {
  constexpr int L = lanes<T>;
  const int64_t classes = t.job.classes, end = t.padded, stride = t.stride;
  const int32_t* y = t.y;
  // Labels come in stretches: vectors of one label are summed as vectors.
  Vec<T> reference{}, overlap{}, losses{};
  int32_t current = y[0];
  auto finish = [&] {
    to.reference[current] += total<T>(reference);
    to.overlap[current] += total<T>(overlap);
    to.loss[current] += total<T>(losses);
    reference = overlap = losses = Vec<T>{};
  };
  const auto* label = t.labels();
  for (int64_t v = 0; v < end; v += L) {
    if (any<T>(label_lanes<T>(label + v) != class_number<T>(y[v]))) {
      for (int64_t i = v; i < v + L; ++i) {
        to.reference[y[i]] += double(m[i]);
        to.overlap[y[i]] += double(value[i]);
        to.loss[y[i]] += double(loss[i]);
      }
      continue;
    }
    if (y[v] != current) {
      finish();
      current = y[v];
    }
    reference += load<T>(m + v);
    overlap += load<T>(value + v);
    losses += load<T>(loss + v);
  }
  finish();
  auto add = [&](int64_t c, auto count) {
    constexpr int R = decltype(count)::value;
    const T* x = t.x + c * stride;
    Vec<T> a[R] = {};
    for (int64_t v = 0; v < end; v += L) {
      Vec<T> k = load<T>(scale + v);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) a[r] += load<T>(x + r * stride + v) * k;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) to.predicted[c + r] += total<T>(a[r]);
  };
  int64_t c = 0;
  for (; c + 4 <= classes; c += 4) add(c, std::integral_constant<int, 4>{});
  for (; c < classes; ++c) add(c, std::integral_constant<int, 1>{});
}

// sums[c] += Σ value over the voxels of label c.
template <class T>
void add_by_label(const Tile<T>& t, const T* value, double* sums) {
  const auto* label = t.labels();
  for (int64_t c = 0, classes = t.job.classes; c < classes; ++c) {
    const IVec<T> number = class_number<T>(c);
    Vec<T> sum{};
    for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>)
      sum += keep<T>(label_lanes<T>(label + v) == number, load<T>(value + v));
    sums[c] += total<T>(sum);
  }
}

// to[v] = table[label of v], or 0 without a table.
template <class T>
void look_up(const Tile<T>& t, const T* table, T* to) {
  constexpr int L = lanes<T>;
  const int64_t classes = t.job.classes, end = t.padded;
  if (!table) {
    std::memset(to, 0, sizeof(T) * size_t(end));
    return;
  }
  if constexpr (kPicks<T>) {
    if (classes <= 2 * L) {
      T few[2 * L] = {};
      for (int64_t c = 0; c < classes; ++c) few[c] = table[c];
      const Vec<T> low = load<T>(few), high = load<T>(few + L);
      const auto* label = t.labels();
      if (classes <= L)
        for (int64_t v = 0; v < end; v += L) store<T>(to + v, pick(low, label_lanes<T>(label + v)));
      else
        for (int64_t v = 0; v < end; v += L)
          store<T>(to + v, pick(low, high, label_lanes<T>(label + v)));
      return;
    }
  }
  const int32_t* y = t.y;
  for (int64_t v = 0; v < end; ++v) to[v] = table[y[v]];
}

// The gradients of R classes from their e^(x−largest), two vectors at a time: memory takes smaller
// pieces of several rows more slowly.
template <int R, class T, class Row, class Put>
FL_INLINE void write_gradients(const Tile<T>& t, const Row& row, const Put& put, int64_t c,
                               const T* k, const T* slope, const T* turn, const T* at_label) {
  constexpr int L = lanes<T>;
  const T* x = t.x + c * t.stride;
  const int64_t stride = t.stride;
  const auto* label = t.labels();
  std::remove_const_t<decltype(row(c))> to[R];
  Vec<T> factor[R];
  IVec<T> number[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    to[r] = row(c + r);
    factor[r] = splat<T>(k ? k[c + r] : T(0));
    number[r] = class_number<T>(c + r);
  }
  auto gradients = [&](int64_t first, auto vectors) {
    constexpr int N = decltype(vectors)::value;
    Vec<T> a[N], b[N], own[N], g[N];
    IVec<T> y[N];
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      a[u] = once(load<T>(slope + v)), b[u] = once(load<T>(turn + v));
      own[u] = once(load<T>(at_label + v)), y[u] = once(label_lanes<T>(label + v));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < N; ++u) {
        g[u] = load<T>(x + r * stride + first + u * L) * (a[u] * factor[r] - b[u]);
        g[u] = select<T>(y[u] == number[r], own[u], g[u]);
      }
      if constexpr (N == 2) put.two(to[r] + first, g[0], g[1]);
      else put(to[r] + first, g[0]);
    }
  };
  int64_t v = 0, end = t.padded;
  for (; v + 2 * L <= end; v += 2 * L) gradients(v, std::integral_constant<int, 2>{});
  for (; v < end; v += L) gradients(v, std::integral_constant<int, 1>{});
}

template <class T>
void reduce_softmax_labels(Tile<T>& t, double* sums, double* weight) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  int64_t classes = t.job.classes;
  bool near = begin_softmax_labels<T>(t, nullptr, nullptr);
  T *m = t.row(kWeight), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T *own = t.row(kLabelExp), *scale = t.row(kA), *value = t.row(kB), *loss = t.row(kC);
  bool logs = s.cross_entropy >= 0 || s.gammas > 0 || t.job.losses;

  Vec<T> all{};
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const Vec<T> w = load<T>(m + v), e = load<T>(own + v), others = load<T>(rest + v);
    const Vec<T> sum = e + others;
    Vec<T> i;
    if (near) {
      // One division for 1 / sum and for others / e, which near logits do not make overflow.
      const Vec<T> both = T(1) / (sum * e);
      i = both * e;
      store<T>(loss + v, others * (sum * both));
    } else {
      i = T(1) / sum;
    }
    all += w;
    store<T>(inverse + v, i);
    store<T>(scale + v, w * i);
    store<T>(value + v, e * (w * i));
  }
  *weight += total<T>(all);
  // Loops of their own keep the chains of dependent operations short. A voxel without weight has
  // finite logits, so these products are never 0 · ∞.
  if (logs && near)
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(loss + v, load<T>(m + v) * log_one_plus<T>(load<T>(loss + v)));
  else if (logs)
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(loss + v,
               load<T>(m + v) * label_loss(t, near, v, load<T>(own + v), load<T>(rest + v)));
  auto to_sum = [&](int slot) { return sums + (slot >= 0 ? slot : s.count) * classes; };
  const ClassSums to = {to_sum(s.reference), to_sum(s.overlap), to_sum(s.predicted),
                        to_sum(s.cross_entropy)};
  const T* losses = logs ? loss : m;
  if (classes > kFewClasses) add_to_many_classes(t, m, scale, value, losses, to);
  else if (t.even) add_to_few_classes<T, true>(t, m, scale, value, losses, to);
  else add_to_few_classes<T, false>(t, m, scale, value, losses, to);
  if (s.reference_squared >= 0) add_by_label(t, m, to_sum(s.reference_squared));
  if (s.predicted_squared >= 0)
    for (int64_t c = 0; c < classes; ++c) {
      const T* e = t.x + c * t.stride;
      Vec<T> a{};
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        Vec<T> x = load<T>(e + v);
        a += (x * load<T>(scale + v)) * (x * load<T>(inverse + v));
      }
      sums[s.predicted_squared * classes + c] += total<T>(a);
    }
  if (t.job.losses) {
    look_up(t, t.table, value);
    T* losses = t.losses();
    // A class of weight 0 costs nothing, even where its loss is infinite.
    for (int64_t v = 0, end = t.n; v < end; ++v)
      losses[v] = value[v] == T(0) && loss[v] == T(INFINITY) ? T(0) : value[v] * loss[v];
  }
  for (int f = 0; f < s.gammas; ++f) {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> q = power<T>(load<T>(rest + v) * load<T>(inverse + v), T(s.gamma[f]));
      store<T>(value + v, focal_value<Vec<T>>(q, load<T>(loss + v)));
    }
    add_by_label(t, value, sums + s.focal[f] * classes);
  }
  if (s.uniform >= 0) {
    // −log p_c = log Σe − x_c, x less its largest if far. The exponentials have replaced x, so it
    // is loaded again.
    T* log_sum = t.row(kD);
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(log_sum + v, logarithm<T>(load<T>(rest + v) + load<T>(own + v)));
    load_and_maximum(t);
    T* largest = t.row(kLargest);
    if (near) std::memset(largest, 0, sizeof(T) * kMaxTile);
    for (int64_t c = 0; c < classes; ++c) {
      const T* x = t.x + c * t.stride;
      Vec<T> a{};
      for (int64_t v = 0, end = t.padded; v < end; v += L)
        a += load<T>(m + v) * (load<T>(log_sum + v) + (load<T>(largest + v) - load<T>(x + v)));
      sums[s.uniform * classes + c] += total<T>(a);
    }
  }
}

// Adds the part of squared probabilities: to `others` that of the classes but the label, to
// `own_region` that of the label.
template <class T>
void add_squares(Tile<T>& t, const T* by_squared, T* others, T* own_region) {
  constexpr int L = lanes<T>;
  const T *inverse = t.row(kInverse), *own = t.row(kLabelExp);
  const auto* label = t.labels();
  const int64_t classes = t.job.classes;
  for (int64_t first = 0; first < classes; first += kFewClasses) {
    int64_t last = first + kFewClasses < classes ? first + kFewClasses : classes;
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> few{};
      for (int64_t c = first; c < last; ++c) {
        Vec<T> p = load<T>(t.x + c * t.stride + v) * load<T>(inverse + v);
        IVec<T> is_label = label_lanes<T>(label + v) == class_number<T>(c);
        few += drop<T>(is_label, (2 * by_squared[c]) * (p * p));
      }
      store<T>(others + v, load<T>(others + v) + few);
    }
  }
  const T two = 2;
  for (int64_t v = 0, end = t.padded; v < end; ++v)
    own_region[v] += two * by_squared[t.y[v]] * own[v] * inverse[v];
}

// Focal slopes join the cross-entropy's coefficient; two rows are for working.
template <class T>
void add_focal_slopes(Tile<T>& t, bool near, T* loss, T* k, T* own_loss) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T *rest = t.row(kRest), *inverse = t.row(kInverse), *own = t.row(kLabelExp);
  for (int64_t v = 0, end = t.padded; v < end; v += L)
    store<T>(loss + v, label_loss(t, near, v, load<T>(own + v), load<T>(rest + v)));
  for (int f = 0; f < s.gammas; ++f) {
    T gamma = T(s.gamma[f]);
    look_up(t, t.table + s.focal[f] * t.job.classes, k);
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> i = load<T>(inverse + v), q = load<T>(rest + v) * i, p = load<T>(own + v) * i;
      // p log p → 0 as p → 0, and (1−p)^(γ−1) log p → 0 as p → 1.
      Vec<T> p_log_p = drop<T>(p == T(0), -(p * load<T>(loss + v)));
      Vec<T> less = gamma == 0 ? Vec<T>{} : drop<T>(q == T(0), power<T>(q, gamma - 1));
      Vec<T> change = focal_slope<Vec<T>, T>(power<T>(q, gamma), less, p_log_p, gamma);
      store<T>(own_loss + v, load<T>(own_loss + v) + load<T>(k + v) * change);
    }
  }
}

// A table's number for each voxel's label: picked from registers that hold a table of kVectors
// vectors, or, for 0, from a row that has them already.
template <class T, int kVectors>
struct ByLabel {
  Vec<T> low{}, high{};
  const T* row;

  ByLabel(const Tile<T>& t, const T* table, const T* looked_up) : row(looked_up) {
    if (kVectors == 0 || !table) return;
    T numbers[2 * lanes<T>] = {};
    for (int64_t c = 0; c < t.job.classes; ++c) numbers[c] = table[c];
    low = load<T>(numbers), high = load<T>(numbers + lanes<T>);
  }
  FL_INLINE Vec<T> at(int64_t v, IVec<T> y) const {
    if constexpr (kVectors == 0) return load<T>(row + v);
    else if constexpr (kVectors == 1) return pick(low, y);
    else return pick(low, high, y);
  }
};

// What the label decides of a voxel's gradient: all of it at the label's class, to `at_label`; of
// the other classes, whose gradient is e_c (slope · derivative by p_c − turn), those two factors.
// `others` has Σ e_c · (derivative by p_c) over the other classes. `kInverted`: 1 / Σe is there
// already, and in `others`.
template <class T, int kVectors, bool kInverted>
void label_gradients(Tile<T>& t, const ByLabel<T, kVectors>& overlap,
                     const ByLabel<T, kVectors>& region, const ByLabel<T, kVectors>& loss,
                     T uniform_total, const T* others, T* at_label, T* turn, T* slope) {
  const T *m = t.row(kWeight), *rest = t.row(kRest), *own = t.row(kLabelExp);
  const T* inverse = t.row(kInverse);
  const auto* label = t.labels();
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    const IVec<T> y = label_lanes<T>(label + v);
    Vec<T> e = load<T>(own + v), r = load<T>(rest + v), rests = load<T>(others + v), i;
    if (kInverted) {
      i = load<T>(inverse + v);
    } else {
      i = T(1) / (r + e);
      rests *= i;
    }
    const Vec<T> q = r * i, p = e * i, factor = load<T>(m + v) * i;
    const Vec<T> by_p = region.at(v, y), own_slope = p * overlap.at(v, y) - loss.at(v, y);
    rests -= uniform_total;
    store<T>(at_label + v, load<T>(m + v) * (p * (by_p * q - rests) + own_slope * q));
    store<T>(turn + v, factor * (rests + p * by_p + own_slope));
    store<T>(slope + v, factor);
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

  T *m = t.row(kWeight), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T* own = t.row(kLabelExp);
  // Σ e_c · (derivative by p_c) over the classes but the label, without the overlap's, without m.
  T* others = t.row(kA);
  bool near = begin_softmax_labels<T>(t, by_predicted, others);
  if (!by_predicted) std::memset(others, 0, sizeof(T) * kMaxTile);
  T *at_label = t.row(kB), *slope = t.row(kC), *turn = t.row(kD);
  T *own_overlap = t.row(kE), *own_region = t.row(kF), *own_loss = t.row(kLargest);
  double uniform_sum = 0;
  if (by_uniform)
    for (int64_t c = 0; c < classes; ++c) uniform_sum += double(by_uniform[c]);
  auto run = [&](auto vectors, auto inverted) {
    using Table = ByLabel<T, decltype(vectors)::value>;
    label_gradients<T, decltype(vectors)::value, decltype(inverted)::value>(
        t, Table(t, by_overlap, own_overlap), Table(t, by_predicted, own_region),
        Table(t, by_loss, own_loss), T(uniform_sum), others, at_label, turn, slope);
  };
  auto look_up_all = [&] {
    look_up(t, by_overlap, own_overlap);
    look_up(t, by_loss, own_loss);
    look_up(t, by_predicted, own_region);
  };
  using std::integral_constant;
  if (by_squared || by_uniform || s.top_k >= 0 || s.gammas > 0) {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> i = T(1) / (load<T>(rest + v) + load<T>(own + v));
      store<T>(inverse + v, i);
      store<T>(others + v, load<T>(others + v) * i);
    }
    look_up_all();
    if (by_squared) add_squares(t, by_squared, others, own_region);
    if (s.top_k >= 0) {
      const T* chosen = t.losses();
      look_up(t, t.table + s.top_k * classes, turn);
      for (int64_t v = 0, end = t.n; v < end; ++v) own_loss[v] += turn[v] * chosen[v];
    }
    if (s.gammas > 0) add_focal_slopes(t, near, at_label, turn, own_loss);
    run(integral_constant<int, 0>{}, std::true_type{});
  } else if (kPicks<T> && classes <= L) {
    if constexpr (kPicks<T>) run(integral_constant<int, 1>{}, std::false_type{});
  } else if (kPicks<T> && classes <= 2 * L) {
    if constexpr (kPicks<T>) run(integral_constant<int, 2>{}, std::false_type{});
  } else {
    look_up_all();
    run(integral_constant<int, 0>{}, std::false_type{});
  }
  const T two = 2;
  if (by_uniform)
    for (int64_t v = 0, end = t.padded; v < end; ++v) at_label[v] -= m[v] * by_uniform[t.y[v]];

  write_rows(t, t.x, t.second, [&](const auto& row, const auto& put) {
    if (!by_squared && !by_uniform) {
      int64_t c = 0;
      for (; c + 2 <= classes; c += 2)
        write_gradients<2>(t, row, put, c, by_predicted, slope, turn, at_label);
      for (; c < classes; ++c)
        write_gradients<1>(t, row, put, c, by_predicted, slope, turn, at_label);
      return;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const T* e = t.x + c * t.stride;
      auto to = row(c);
      Vec<T> k = splat<T>(by_predicted ? by_predicted[c] : T(0));
      Vec<T> k2 = splat<T>(by_squared ? two * by_squared[c] : T(0));
      Vec<T> u = splat<T>(by_uniform ? by_uniform[c] : T(0));
      IVec<T> number = class_number<T>(c);
      const auto* label = t.labels();
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        Vec<T> x = load<T>(e + v), p = x * load<T>(inverse + v);
        Vec<T> g = x * (load<T>(slope + v) * (k + k2 * p) - load<T>(turn + v));
        g -= load<T>(m + v) * u;
        put(to + v, select<T>(label_lanes<T>(label + v) == number, load<T>(at_label + v), g));
      }
    }
  });
}

}  // namespace
