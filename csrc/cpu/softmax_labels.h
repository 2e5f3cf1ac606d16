// Softmax with a label map, the common case in training.
//
// The label's part is computed once per voxel, not once per class. With own = e of the label y and
// rest = Σ of the others' e, p_y = own / (own + rest), 1 − p_y = rest / (own + rest), and
//   −log p_y = log(1 + rest / own).
// `LabelGradient` of label_rows.h derives the gradient. Squared probabilities of coefficient s_c
// add 2 s_c p_c to the derivative by p_c, a field φ of coefficient f_c adds f_c φ_c, and focal
// terms add to the cross-entropy's. Σ_c u_c (−log p_c) over all classes adds −u_c to t_c: −Σ_j u_j
// to Σ_j t_j, and −u_c to the gradient.
#pragma once

#include <optional>

#include "field_rows.h"
#include "label_rows.h"
#include "softmax.h"
#include "softmax_few.h"
#include "voxel.h"

namespace {

// The sums that this path computes.
constexpr uint32_t kLabelSums = fastloss::kWithLosses | fastloss::kTopK | fastloss::kFieldPredicted;

// The index of the field φ of Σ φ p.
inline int field_of(const Job& job) { return job.sums[job.slots.field_predicted].field; }

inline bool suits_softmax_labels(const Job& job) {
  return job.activation == Activation::softmax && !job.dense && job.asks_only_for(kLabelSums) &&
         (job.slots.field_predicted < 0 ||
          job.fields[field_of(job)].kind == fastloss::FieldKind::of_class);
}

// Marks a voxel whose logits are near (|x| ≤ kNear): no maximum was subtracted.
constexpr int kNoGap = -1;

// Fewer classes than this stay in the L1 cache, where unfused loops are faster.
constexpr int64_t kFusedClasses = 8;
// Up to this many classes are summed in one loop.
constexpr int64_t kClassesAtOnce = 4;

// The exponentials of a tile with some logits that are not near. Where all logits of a voxel are, x
// becomes e^x as in any other tile, so that a voxel's bits do not depend on its neighbours; else
// e^(x−largest), and the label's gap to the largest is stored.
template <class T>
void exponentials_far(Tile<T>& t) {
  constexpr int L = lanes<T>;
  load_and_maximum(t);
  T *largest = t.row(kLargest), *gap = t.row(kLabelGap), *least = t.row(kLabelExp);
  const auto* label = t.labels();
  const int64_t classes = t.job.classes, end = t.padded;
  std::memset(gap, 0, sizeof(T) * kMaxTile);
  std::memset(least, 0, sizeof(T) * kMaxTile);
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t v = 0; v < end; v += L)
      store<T>(least + v, smaller(load<T>(t.x + c * t.stride + v), load<T>(least + v)));
  // A single class has p = 1 exactly only if the maximum is subtracted.
  for (int64_t v = 0; classes > 1 && v < end; v += L) {
    const Vec<T> high = load<T>(largest + v), low = load<T>(least + v);
    const IVec<T> near = (low >= -T(kNear)) & (high <= T(kNear));
    store<T>(largest + v, drop<T>(near, high));
    store<T>(gap + v, keep<T>(near, splat<T>(kNoGap)));
  }
  for (int64_t c = 0; c < classes; ++c) {
    T* x = t.x + c * t.stride;
    const IVec<T> number = class_number<T>(c);
    for (int64_t v = 0; v < end; v += L) {
      const Vec<T> below = load<T>(x + v) - load<T>(largest + v), before = load<T>(gap + v);
      const IVec<T> changes = (label_lanes<T>(label + v) == number) & (before != T(kNoGap));
      store<T>(gap + v, before - keep<T>(changes, below));
      store<T>(x + v, exponential<T>(below));
    }
  }
}

// Clears the sums of a tile's exponentials.
template <bool kDot, class T>
void clear_sums(Tile<T>& t) {
  const int64_t classes = t.job.classes;
  auto clear = [&](T* row) { std::memset(row, 0, sizeof(T) * size_t(t.padded)); };
  if (classes > kClassesAtOnce || (kDot && t.job.slots.field_predicted >= 0)) {
    clear(t.row(kLabelExp)), clear(t.row(kRest));
    if (kDot) clear(other_slopes(t));
    if (kDot && t.job.slots.field_predicted >= 0) clear(own_slopes(t));
  }
  if (classes > kFewClasses) {
    clear(t.row(kSumOfMany));
    if (kDot) clear(t.row(kDotOfMany));
  }
}

// Many classes are summed in groups of a few, which bounds the rounding error. Call it when the
// exponentials of all classes below c have been added.
template <bool kDot, class T>
FL_INLINE void sum_few(Tile<T>& t, int64_t c) {
  const int64_t classes = t.job.classes;
  if (classes <= kFewClasses || (c % kFewClasses && c != classes)) return;
  t.add_row(t.row(kRest), t.row(kSumOfMany));
  if (kDot) t.add_row(other_slopes(t), t.row(kDotOfMany));
  if (c != classes) return;
  t.add_row(t.row(kSumOfMany), t.row(kRest));
  if (kDot) t.add_row(t.row(kDotOfMany), other_slopes(t));
}

// The derivatives by p of the classes: a number each, and the part of a field if one is read.
template <class T>
class SlopesByP {
 public:
  using Field = typename Tile<T>::ClassField;

  // Not `wanted`: none are read.
  explicit SlopesByP(Tile<T>& t, bool wanted = true) {
    if (!wanted) return;
    k_ = coefficients(t, t.job.slots.predicted);
    by_field_ = coefficients(t, t.job.slots.field_predicted);
    if (by_field_) field_.emplace(t, field_of(t.job));
  }
  bool has_field() const { return by_field_ != nullptr; }
  bool in_place() const { return !field_ || field_->in_place(); }
  template <int R>
  EvenSlopes<T, R> even(int64_t c) const {
    return {k_, c};
  }
  template <class S, int R, bool kFetches>
  FieldSlopes<S, T, R, kFetches> with_field(int64_t c) const {
    return {*field_, c, k_, by_field_};
  }
  // Calls f(c, a number of the field's storage type, R) for R classes at once, if their rows are in
  // place, else one by one.
  template <int R, class F>
  void over_rows(int64_t c, const F& f) const {
    if (in_place()) {
      field_->with_number([&](auto number) { f(c, number, std::integral_constant<int, R>{}); });
    } else {
      for (int r = 0; r < R; ++r) f(c + r, T{}, std::integral_constant<int, 1>{});
    }
  }

 private:
  const T *k_ = nullptr, *by_field_ = nullptr;
  std::optional<Field> field_;
};

// The exponentials of R classes of a tile. The label's part is skipped for the many classes that do
// not occur in the tile, a small part of the volume.
template <class S, int R, bool kDot, Exponentials kWhat, class T>
void exponentials_of(Tile<T>& t, int64_t c, const SlopesByP<T>& by_p) {
  with_constant(t.has_any(c, R), [&](auto present) {
    constexpr bool kPresent = decltype(present)::value;
    if constexpr (kDot) {
      if (by_p.has_field())
        return by_p.template over_rows<R>(c, [&](int64_t first, auto number, auto count) {
          constexpr int Q = decltype(count)::value;
          using Slopes = FieldSlopes<decltype(number), T, Q, true>;
          ExponentialRows<S, T, Q, kPresent, true, kWhat, false, Slopes> rows(
              t, first, by_p.template with_field<decltype(number), Q, true>(first));
          run(rows, 0, t.padded);
        });
    }
    ExponentialRows<S, T, R, kPresent, kDot, kWhat> rows(t, c, by_p.template even<R>(c));
    run(rows, 0, t.padded);
  });
}
// Adds up the exponentials of all of R classes.
template <int R, bool kDot, class T>
void add_all(Tile<T>& t, const SlopesByP<T>& by_p) {
  ExponentialRows<T, T, R, true, kDot, Exponentials::added, true> rows(t, 0,
                                                                       by_p.template even<R>(0));
  run(rows, 0, t.padded);
}

// The exponentials of a tile with logits of type S: the label's, and the sum of the others. Without
// the label's, that sum is exact where the label dominates, and so are 1−p and log p.
template <class S, bool kDot, Exponentials kWhat, class T>
void exponentials(Tile<T>& t) {
  const int64_t classes = t.job.classes;
  const SlopesByP<T> by_p(t, kDot);
  if (classes > kClassesAtOnce || (kDot && by_p.has_field()))
    return in_pairs(classes, [&](int64_t c, auto count) {
      constexpr int R = decltype(count)::value;
      exponentials_of<S, R, kDot, kWhat>(t, c, by_p);
      sum_few<kDot>(t, c + R);
    });
  if (kWhat == Exponentials::both)
    for (int64_t c = 0; c < classes; ++c) {
      ExponentialRows<S, T, 1, false, false, Exponentials::made> rows(t, c,
                                                                      by_p.template even<1>(c));
      run(rows, 0, t.padded);
    }
  if (classes == 1) add_all<1, kDot>(t, by_p);
  if (classes == 2) add_all<2, kDot>(t, by_p);
  if (classes == 3) add_all<3, kDot>(t, by_p);
  if (classes == 4) add_all<4, kDot>(t, by_p);
}

// Computes the exponentials of the tile `next` while the loops of make(c, count, present) run on
// the tile `now`; slopes(c, count) are the derivatives by p of `next`. `later` writes in between.
template <class S, bool kDot, class T, class SlopesOf, class Make>
void exponentials_beside(Tile<T>& next, const SlopesOf& slopes, Tile<T>& now, const Make& make,
                         Later<T>* later = nullptr) {
  in_pairs(next.job.classes, [&](int64_t c, auto count) {
    constexpr int R = decltype(count)::value;
    using Slopes = decltype(slopes(c, count));
    const auto both = [&](auto in_next, auto in_now) {
      constexpr bool kPresent = decltype(in_next)::value;
      ExponentialRows<S, T, R, kPresent, kDot, Exponentials::both, false, Slopes> in(
          next, c, slopes(c, count));
      auto out = make(c, count, in_now);
      run_both(in, next.padded, out, now.padded, [&] {
        if (later) later->step();
      });
    };
    if constexpr (R == 1) {
      both(std::true_type{}, std::true_type{});
    } else {
      with_constant(next.has_any(c, R), [&](auto in_next) {
        with_constant(now.has_any(c, R), [&](auto in_now) { both(in_next, in_now); });
      });
    }
    sum_few<kDot>(next, c + R);
  });
}
// Runs those loops alone.
template <class T, class Make>
void finish(Tile<T>& now, const Make& make) {
  in_pairs(now.job.classes, [&](int64_t c, auto count) {
    with_constant(now.has_any(c, decltype(count)::value), [&](auto present) {
      auto rows = make(c, count, present);
      run(rows, 0, now.padded);
    });
  });
}

// Loops over the tiles from the voxel `first` to `last`: move(tile, v) moves a tile to v, and
// finish(tile, next) completes it once its exponentials are known. `in_flight`: how many tiles have
// buffers of their own. With 2 or 3 `finish` also computes the exponentials of `next`, unless it is
// null; with 3 it may use the buffers of its tile until the call after the next. With 1 few(tile)
// may do all of a tile.
template <bool kDot, class T, class Move, class AtOnce, class Finish>
void over_tiles(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch,
                int in_flight, const Move& move, const AtOnce& few, const Finish& finish) {
  const bool fused = in_flight > 1;
  const auto part = [&](int i) { return (char*)scratch + i * Tile<T>::bytes(job); };
  Tile<T> tiles[3] = {{job, sample, part(0)}, {job, sample, part(1)}, {job, sample, part(2)}};
  Tile<T>* now = nullptr;
  for (int64_t v = first, turn = 0; now || v < last;) {
    Tile<T>* next = nullptr;
    if (v < last && (fused || !now)) {
      next = &tiles[turn++ % in_flight];
      move(*next, v);
      v += next->n;
      next->direct = next->contiguous();
      next->flat = next->ahead = false;
      if constexpr (kSplits<T>) next->flat = !fused && suits_few_classes(job) && next->is_flat();
      if (!next->direct && !next->flat) next->load_logits(true);
      const Few known = fused ? Few::unsuited : few(*next);
      if (known == Few::done) continue;
      if (next->flat) next->load_logits();
      next->find_present();
      next->near = known == Few::unsuited;
      clear_sums<kDot>(*next);
    }
    if (now) finish(*now, next);
    else if (next->near)
      with_source(*next, [&](auto number) {
        exponentials<decltype(number), kDot, Exponentials::both>(*next);
      });
    if (next) {
      next->near = next->near && job.classes > 1;
      if (!next->near) {
        exponentials_far(*next);
        clear_sums<kDot>(*next);
        exponentials<T, kDot, Exponentials::added>(*next);
      }
    }
    now = next;
  }
}

// −log p of the label's class, for a vector of voxels: log(1 + rest / own) where the logits are
// near, else gap + log Σe, with Σe = 1 + rest where the label is at the maximum.
template <class T>
FL_INLINE Vec<T> label_loss(Tile<T>& t, int64_t v, Vec<T> own, Vec<T> rest) {
  if (t.near) return log_one_plus<T>(rest / own);
  const Vec<T> gap = load<T>(t.row(kLabelGap) + v);
  const IVec<T> near = gap == T(kNoGap);
  const Vec<T> far = gap + log_one_plus<T>(select<T>(gap == T(0), rest, (rest + own) - T(1)));
  return select<T>(near, log_one_plus<T>(rest / own), far);
}

// sums[c] += Σ value over the voxels of label c.
template <class T>
void add_by_label(const Tile<T>& t, const T* value, double* sums) {
  const auto* label = t.labels();
  for (int64_t c = 0, classes = t.job.classes; c < classes; ++c) {
    if (!t.present[c]) continue;
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

// Prepares the rows that `SumRows` adds, and adds the voxel weights. `kOnes`: every voxel has
// weight 1. `kExtras`: reduce_extras follows.
template <bool kOnes, bool kExtras, class T>
void reduce_voxels(Tile<T>& t, bool logs, double* weight) {
  constexpr int L = lanes<T>;
  T *m = t.row(kWeight), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T *own = t.row(kLabelExp), *scale = t.row(kA), *value = t.row(kB), *loss = t.row(kC);
  const bool near = t.near;
  Vec<T> all{};
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const Vec<T> e = load<T>(own + v), others = load<T>(rest + v), sum = e + others;
    Vec<T> i;
    if (near) {
      // One division instead of two: with b = 1 / (sum e), 1 / sum = b e and others / e = others
      // sum b. Near logits keep sum e in range.
      const Vec<T> both = T(1) / (sum * e);
      i = both * e;
      store<T>(loss + v, others * (sum * both));
    } else {
      i = T(1) / sum;
    }
    if (kExtras) store<T>(inverse + v, i);
    if (!kOnes) {
      const Vec<T> w = load<T>(m + v);
      all += w;
      i *= w;
    }
    store<T>(scale + v, i);
    store<T>(value + v, e * i);
  }
  *weight += kOnes ? double(t.n) : total<T>(all);
  // A separate loop keeps the dependency chains short. A voxel of weight 0 has its logits cleared,
  // so these products are never 0 · ∞.
  if (!logs) return;
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    Vec<T> l;
    if (near) l = log_one_plus<T>(load<T>(loss + v));
    else l = label_loss(t, v, load<T>(own + v), load<T>(rest + v));
    store<T>(loss + v, kOnes ? l : load<T>(m + v) * l);
  }
}

// Adds Σ m φ p of every class.
template <class T>
void reduce_field(Tile<T>& t, double* sums) {
  const typename Tile<T>::ClassField field(t, field_of(t.job));
  field.over_classes([&](int64_t c, auto number, auto count) {
    FieldSumRows<decltype(number), T, decltype(count)::value> rows(t, field, c);
    run(rows, 0, t.padded);
    for (int r = 0; r < decltype(count)::value; ++r) sums[c + r] += total<T>(rows.sum[r]);
  });
}

// Adds the less common sums; that over a field unless it is known.
template <class T>
void reduce_extras(Tile<T>& t, double* sums, bool field_known) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const int64_t classes = t.job.classes;
  T *m = t.row(kWeight), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T *own = t.row(kLabelExp), *scale = t.row(kA), *value = t.row(kB), *loss = t.row(kC);
  if (s.reference_squared >= 0) add_by_label(t, m, sums + s.reference_squared * classes);
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
  if (s.field_predicted >= 0 && !field_known) reduce_field(t, sums + s.field_predicted * classes);
  if (t.job.losses) {
    look_up(t, t.table, value);
    T* losses = t.losses();
    // Class weight 0 times an infinite loss is 0.
    for (int64_t v = 0, end = t.n; v < end; ++v)
      losses[v] = value[v] == T(0) && loss[v] == T(INFINITY) ? T(0) : value[v] * loss[v];
  }
  for (int f = 0; f < s.gammas; ++f) {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      const Vec<T> q = load<T>(rest + v) * load<T>(inverse + v);
      store<T>(value + v, focal_value<Mathematics<T>>(q, load<T>(loss + v), T(s.gamma[f])));
    }
    add_by_label(t, value, sums + s.focal[f] * classes);
  }
  if (s.uniform >= 0) {
    // −log p_c = log Σe − x_c, or log Σe + largest − x_c where the maximum was subtracted. The
    // exponentials have replaced x, so it is loaded again.
    T* log_sum = t.row(kD);
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(log_sum + v, logarithm<T>(load<T>(rest + v) + load<T>(own + v)));
    T *gap = t.row(kLabelGap), *largest = t.row(kLargest);
    load_and_maximum(t);
    if (t.near) std::memset(largest, 0, sizeof(T) * kMaxTile);
    else
      for (int64_t v = 0, end = t.padded; v < end; v += L)
        store<T>(largest + v, drop<T>(load<T>(gap + v) == T(kNoGap), load<T>(largest + v)));
    for (int64_t c = 0; c < classes; ++c) {
      const T* x = t.x + c * t.stride;
      Vec<T> a{};
      for (int64_t v = 0, end = t.padded; v < end; v += L)
        a += load<T>(m + v) * (load<T>(log_sum + v) + (load<T>(largest + v) - load<T>(x + v)));
      sums[s.uniform * classes + c] += total<T>(a);
    }
  }
}

template <class T>
void reduce_softmax_labels(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  const auto& s = job.slots;
  const bool logs = s.cross_entropy >= 0 || s.gammas > 0 || job.losses;
  const bool extras = s.reference_squared >= 0 || s.predicted_squared >= 0 || s.gammas > 0 ||
                      s.uniform >= 0 || s.field_predicted >= 0 || job.losses;
  auto move = [&](Tile<T>& t, int64_t v) {
    t.move(v, blocks.tile(v, t.step), &blocks.faults[blocks.of(v)]);
  };
  auto sums_of = [&](int64_t block) { return blocks.sums + block * (s.count + 1) * job.classes; };
  auto class_sums = [&](double* sums) {
    auto to = [&](int slot) { return sums + (slot >= 0 ? slot : s.count) * job.classes; };
    return ClassSums{to(s.reference), to(s.overlap), to(s.predicted), to(s.cross_entropy),
                     to(s.gammas ? s.focal[0] : -1)};
  };
  const bool suits_few = suits_few_classes(job);
  auto few = [&](Tile<T>& t) {
    if constexpr (kPicks<T>)
      if (suits_few) {
        const int64_t block = blocks.of(t.voxel);
        return reduce_few(t, class_sums(sums_of(block)), logs, &blocks.weights[block]);
      }
    return Few::unsuited;
  };
  auto finish_tile = [&](Tile<T>& t, Tile<T>* next) {
    const int64_t block = blocks.of(t.voxel);
    double* sums = sums_of(block);
    const ClassSums to = class_sums(sums);
    with_constant(t.ones, [&](auto ones) {
      with_constant(extras, [&](auto more) {
        reduce_voxels<decltype(ones)::value, decltype(more)::value>(t, logs,
                                                                    &blocks.weights[block]);
      });
    });
    auto make = [&](int64_t c, auto count, auto present) {
      return SumRows<T, decltype(count)::value, decltype(present)::value>(
          t, c, t.row(kA), t.row(kB), t.row(logs ? kC : kWeight), to);
    };
    bool field_known = false;
    if (next) {
      const SlopesByP<T> none(*next, false);
      const auto slopes = [&](int64_t c, auto count) {
        return none.template even<decltype(count)::value>(c);
      };
      with_source(*next, [&](auto number) {
        using S = decltype(number);
        if constexpr (std::is_same<S, T>::value) {
          if (s.field_predicted >= 0) {
            const typename Tile<T>::ClassField field(t, field_of(job));
            if (field.in_place()) {
              field_known = true;
              return field.with_number([&](auto phi) {
                exponentials_beside<T, false>(
                    *next, slopes, t, [&](int64_t c, auto count, auto present) {
                      constexpr int R = decltype(count)::value;
                      double* by_class = sums + s.field_predicted * job.classes + c;
                      return SumRowsWithField<decltype(phi), T, R, decltype(present)::value>{
                          make(c, count, present), {t, field, c}, by_class};
                    });
              });
            }
          }
        }
        exponentials_beside<S, false>(*next, slopes, t, make);
      });
    } else {
      finish(t, make);
    }
    if (extras) reduce_extras(t, sums, field_known);
  };
  over_tiles<false, T>(job, sample, blocks.first, blocks.last, scratch,
                       job.classes >= kFusedClasses ? 2 : 1, move, few, finish_tile);
}

// Adds the derivatives by squared probabilities: 2 s_c p_c² of the classes but the label to
// `others`, and 2 s_y p_y to `own_region`.
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
  for (int64_t v = 0, end = t.padded; v < end; ++v)
    own_region[v] += 2 * by_squared[t.y[v]] * own[v] * inverse[v];
}

// Adds the focal slopes to the cross-entropy's coefficient; `loss` and `k` are scratch rows.
template <class T>
void add_focal_slopes(Tile<T>& t, T* loss, T* k, T* own_loss) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const T *rest = t.row(kRest), *inverse = t.row(kInverse), *own = t.row(kLabelExp);
  for (int64_t v = 0, end = t.padded; v < end; v += L)
    store<T>(loss + v, label_loss(t, v, load<T>(own + v), load<T>(rest + v)));
  for (int f = 0; f < s.gammas; ++f) {
    T gamma = T(s.gamma[f]);
    look_up(t, t.table + s.focal[f] * t.job.classes, k);
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      store<T>(own_loss + v,
               with_focal<T>(load<T>(own + v), load<T>(rest + v), load<T>(inverse + v),
                             load<T>(loss + v), gamma, load<T>(own_loss + v), load<T>(k + v)));
    }
  }
}

// Looks up a table by each voxel's label: in registers, if the table fits kVectors vectors, or, for
// kVectors = 0, in a row of looked-up values.
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

// Writes the rows of `LabelGradients`: the gradient at the label's class, and the factors slope and
// turn of the others, e_c (slope · k_c − turn). `others` has Σ e_c k_c over the other classes.
// `kInverted`: the row 1 / Σe exists already, and `others` is multiplied by it.
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
    const LabelGradient<T> g(e, r, i, rests - uniform_total, overlap.at(v, y), region.at(v, y),
                             loss.at(v, y));
    const Vec<T> factor = load<T>(m + v) * i;
    store<T>(at_label + v, load<T>(m + v) * g.at_label);
    store<T>(turn + v, factor * g.turn);
    store<T>(slope + v, factor);
  }
}

// The label's part of a tile's gradients.
template <class T>
LabelGradients<T> apply_voxels(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  int64_t classes = t.job.classes;
  const T *by_overlap = coefficients(t, s.overlap), *by_predicted = coefficients(t, s.predicted);
  const T* by_squared = coefficients(t, s.predicted_squared);
  const T* by_field = coefficients(t, s.field_predicted);
  const T *by_loss = coefficients(t, s.cross_entropy), *by_uniform = coefficients(t, s.uniform);

  T *m = t.row(kWeight), *rest = t.row(kRest), *inverse = t.row(kInverse);
  T *own = t.row(kLabelExp), *others = other_slopes(t);
  T *at_label = t.row(kB), *slope = t.row(kC), *turn = t.row(kD);
  T *own_overlap = t.row(kE), *own_region = own_slopes(t), *own_loss = t.row(kLargest);
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
    // With a field the loop of exponentials has written this row.
    if (!by_field) look_up(t, by_predicted, own_region);
  };
  using std::integral_constant;
  if (by_squared || by_uniform || by_field || s.top_k >= 0 || s.gammas > 0) {
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
    if (s.gammas > 0) add_focal_slopes(t, at_label, turn, own_loss);
    run(integral_constant<int, 0>{}, std::true_type{});
  } else if (kPicks<T> && classes <= L) {
    if constexpr (kPicks<T>) run(integral_constant<int, 1>{}, std::false_type{});
  } else if (kPicks<T> && classes <= 2 * L) {
    if constexpr (kPicks<T>) run(integral_constant<int, 2>{}, std::false_type{});
  } else {
    look_up_all();
    run(integral_constant<int, 0>{}, std::false_type{});
  }
  if (by_uniform)
    for (int64_t v = 0, end = t.padded; v < end; ++v) at_label[v] -= m[v] * by_uniform[t.y[v]];

  return {by_predicted, slope, turn, at_label};
}

// Writes the gradients of a tile, and computes the exponentials of `next`, unless it is null, in
// the same loops.
template <class T>
void write_gradients(Tile<T>& t, const LabelGradients<T>& gradients, Tile<T>* next,
                     Later<T>* later) {
  const auto write = [&](const auto& row, const auto& put) {
    using Put = std::remove_cv_t<std::remove_reference_t<decltype(put)>>;
    auto make = [&](int64_t c, auto count, auto present) {
      constexpr int R = decltype(count)::value;
      return GradientRows<T, R, decltype(present)::value, decltype(row(0)), Put>(
          t, c, gradients, row, put, EvenSlopes<T, R>(gradients.k, c));
    };
    if constexpr (!Put::kRounds) {
      if (next) {
        const SlopesByP<T> by_p(*next);
        const auto slopes = [&](int64_t c, auto count) {
          return by_p.template even<decltype(count)::value>(c);
        };
        return exponentials_beside<T, true>(*next, slopes, t, make, later);
      }
    }
    finish(t, make);
  };
  write_rows(t, t.x, t.second, write, later);
}

// The same with a field.
template <class T>
void write_gradients_with_field(Tile<T>& t, const LabelGradients<T>& gradients, Tile<T>* next,
                                Later<T>* later) {
  const SlopesByP<T> by_p(t);
  const auto write = [&](const auto& row, const auto& put) {
    using Put = std::remove_cv_t<std::remove_reference_t<decltype(put)>>;
    const auto rows_of = [&](int64_t c, auto number, auto count, auto present) {
      constexpr int R = decltype(count)::value;
      using Slopes = FieldSlopes<decltype(number), T, R, false>;
      return GradientRows<T, R, decltype(present)::value, decltype(row(0)), Put, Slopes>(
          t, c, gradients, row, put, by_p.template with_field<decltype(number), R, false>(c));
    };
    if constexpr (!Put::kRounds) {
      if (next) {
        const SlopesByP<T> soon(*next);
        if (by_p.in_place() && soon.in_place())
          return by_p.template over_rows<1>(0, [&](int64_t, auto number, auto) {
            using S = decltype(number);
            const auto slopes = [&](int64_t c, auto count) {
              return soon.template with_field<S, decltype(count)::value, true>(c);
            };
            const auto make = [&](int64_t c, auto count, auto in) {
              return rows_of(c, number, count, in);
            };
            exponentials_beside<T, true>(*next, slopes, t, make, later);
          });
        exponentials<T, true, Exponentials::both>(*next);
      }
    }
    in_pairs(t.job.classes, [&](int64_t c, auto count) {
      constexpr int R = decltype(count)::value;
      with_constant(t.has_any(c, R), [&](auto present) {
        by_p.template over_rows<R>(c, [&](int64_t first, auto number, auto some) {
          auto rows = rows_of(first, number, some, present);
          run(rows, 0, t.padded);
        });
      });
    });
  };
  write_rows(t, t.x, t.second, write, later);
}

// The same with squared probabilities, a field, or the losses of all classes.
template <class T>
void write_gradients_with_extras(Tile<T>& t, const LabelGradients<T>& gradients) {
  constexpr int L = lanes<T>;
  const auto& s = t.job.slots;
  const int64_t classes = t.job.classes;
  const T* by_squared = coefficients(t, s.predicted_squared);
  const T* by_uniform = coefficients(t, s.uniform);
  const T* by_field = coefficients(t, s.field_predicted);
  const T *m = t.row(kWeight), *inverse = t.row(kInverse);
  write_rows(t, t.x, t.second, [&](const auto& row, const auto& put) {
    for (int64_t c = 0; c < classes; ++c) {
      const T* e = t.x + c * t.stride;
      auto to = row(c);
      const Vec<T> k = splat<T>(gradients.k ? gradients.k[c] : T(0));
      const Vec<T> k2 = splat<T>(by_squared ? 2 * by_squared[c] : T(0));
      const Vec<T> u = splat<T>(by_uniform ? by_uniform[c] : T(0));
      const Vec<T> f = splat<T>(by_field ? by_field[c] : T(0));
      const T* phi = by_field ? t.field_row(field_of(t.job), c) : nullptr;
      const IVec<T> number = class_number<T>(c);
      const auto* label = t.labels();
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        const Vec<T> x = load<T>(e + v);
        Vec<T> slope = k;
        if (by_squared) slope += k2 * (x * load<T>(inverse + v));
        if (phi) slope += f * load<T>(phi + v);
        Vec<T> g = x * (load<T>(gradients.slope + v) * slope - load<T>(gradients.turn + v));
        if (by_uniform) g -= load<T>(m + v) * u;
        IVec<T> is_label = label_lanes<T>(label + v) == number;
        put(to + v, select<T>(is_label, load<T>(gradients.at_label + v), g));
      }
    }
  });
}

template <class T>
void apply_softmax_labels(const Job& job, int64_t sample, int64_t first, int64_t last,
                          void* scratch) {
  const bool extras = job.slots.predicted_squared >= 0 || job.slots.uniform >= 0;
  const bool field = job.slots.field_predicted >= 0;
  // Rounding takes too many instructions to fuse further loops.
  const bool rounds = item_size(job.out.dtype) != int(sizeof(T));
  const int64_t lead = fastloss::voxels_to_line(job, sample);
  auto move = [&](Tile<T>& t, int64_t v) { t.move(v, tile_from(v, last, lead, t.step), nullptr); };
  const bool suits_few = suits_few_classes(job);
  auto few = [&](Tile<T>& t) {
    if constexpr (kPicks<T>)
      if (suits_few) return apply_few(t);
    return Few::unsuited;
  };
  const bool fused = job.classes >= kFusedClasses && !rounds && !extras;
  const bool keeps = fused && Later<T>::suits(job);
  Later<T> writer, *later = keeps ? &writer : nullptr;
  auto finish_tile = [&](Tile<T>& t, Tile<T>* next) {
    const LabelGradients<T> gradients = apply_voxels(t);
    if (extras) write_gradients_with_extras(t, gradients);
    else if (field) write_gradients_with_field(t, gradients, next, later);
    else write_gradients(t, gradients, next, later);
  };
  over_tiles<true, T>(job, sample, first, last, scratch,
                      keeps   ? 3
                      : fused ? 2
                              : 1,
                      move, few, finish_tile);
  writer.finish();
}

}  // namespace
