// Softmax of three or four classes with a label map, where every voxel has weight 1 and no logit is
// large: a vector of voxels stays in registers. Gradients are bit-identical to those of
// softmax_labels.h, as the address of the gradient decides which tile a voxel belongs to.
//
// As |x| ≤ 36, no maximum is subtracted: p_c = e^x_c / Σ e^x, and with own = e^x_y and
// rest = Σ_{c≠y} e^x_c the loss is −log p_y = log(1 + rest / own). `LabelGradient` of label_rows.h
// derives the gradient.
#pragma once

#include "label_rows.h"
#include "voxel.h"

namespace {

// The sums that this path computes.
constexpr uint32_t kFewClassesSums = fastloss::kReference | fastloss::kOverlap |
                                     fastloss::kPredicted | fastloss::kCrossEntropy |
                                     fastloss::kFocal;

inline bool suits_few_classes(const Job& job) {
  return kPicks<float> && (job.classes == 3 || job.classes == 4) &&
         job.logits.dtype != DType::f64 && !job.weighted && job.asks_only_for(kFewClassesSums) &&
         !job.losses && job.slots.gammas <= 1;
}

// The exponentials of C classes' logits of type S. `kOne`: all voxels have the label `first`, which
// then is the first class here; the others keep their order.
template <class S, int C, bool kOne>
struct FewClasses {
  using T = float;
  static constexpr int L = lanes<T>;
  static constexpr int U = 64 / int(sizeof(S)) / L;  // vectors of a cache line
  const S* x[C];
  int64_t number[C];
  int64_t ahead;
  const int32_t* label;
  Extent<S, T> extent;
  NearExponential<T> exponential;

  FL_INLINE FewClasses(const Tile<T>& t, int first) : ahead(t.direct ? t.step : 0), label(t.y) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      number[c] = !kOne ? c : c == 0 ? first : c <= first ? c - 1 : c;
      x[c] = t.direct ? t.source_row<S>(number[c]) : (const S*)(t.x + number[c] * t.stride);
    }
  }

  // Calls use(v, e, y) for each vector of voxels, with its exponentials and labels.
  template <class Use>
  FL_INLINE void each(int64_t voxels, const Use& use) {
    int64_t v = 0;
    for (; v + U * L <= voxels; v += U * L) some<U>(v, use);
    if constexpr (U > 1)
      for (; v < voxels; v += L) some<1>(v, use);
  }

 private:
  template <int N, class Use>
  FL_INLINE void some(int64_t first, const Use& use) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      prefetch_lines<N * L* int(sizeof(S))>(x[c] + first + ahead);
      extent.template stored<N>(x[c] + first);
    }
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      Vec<T> e[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        e[c] = load_as<S, T>(x[c] + v);
        extent.loaded(e[c]);
        e[c] = exponential(e[c]);
      }
      use(v, e, kOne ? IVec<T>{} : once(label_lanes<T>(label + v)));
    }
  }
};

// The label's exponential, and the sum of the others.
template <int C, bool kOne>
FL_INLINE Pair<float> own_and_rest(const Vec<float> (&e)[C], IVec<float> y) {
  Vec<float> own = e[0], rest{};
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    if (kOne) {
      if (c > 0) rest += e[c];
      continue;
    }
    const IVec<float> is_label = y == class_number<float>(c);
    own = select<float>(is_label, e[c], own);
    rest = select<float>(is_label, rest, rest + e[c]);
  }
  return {own, rest};
}

// Writes rows of the label's p, if there are several labels, of rest / own, and with `kFocal` of
// the label's 1 − p, and adds Σ p. Returns false and adds nothing if some logit is too large.
template <class S, int C, bool kOne, bool kFocal>
bool reduce_few_classes(Tile<float>& t, int only, const ClassSums& to) {
  using T = float;
  FewClasses<S, C, kOne> classes(t, only);
  T *ps = t.row(kA), *quotients = t.row(kB), *rests = t.row(kC);
  Vec<T> sums[C] = {};
  classes.each(t.padded,
               [&](int64_t v, const Vec<T>(&e)[C], IVec<T> y) __attribute__((always_inline)) {
                 auto [own, rest] = own_and_rest<C, kOne>(e, y);
                 // One division instead of two: with b = 1 / (sum own), 1 / sum = b own and
                 // rest / own = rest sum b. As |x| ≤ 36, sum own < 4 e^72 does not overflow.
                 const Vec<T> sum = own + rest, both = T(1) / (sum * own), inverse = both * own;
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) sums[c] += e[c] * inverse;
                 store<T>(quotients + v, rest * (sum * both));
                 if (!kOne) store<T>(ps + v, own * inverse);
                 if (kFocal) store<T>(rests + v, rest * inverse);
               });
  if (!classes.extent.within(kNear)) return false;
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) to.predicted[classes.number[c]] += total<T>(sums[c]);
  if (kOne) to.overlap[only] += total<T>(sums[0]);
  return true;
}

// Writes rows of every class's p to `second`, and of the label's loss. Returns false, and the rows
// are invalid, if some logit is too large.
template <class S, int C, bool kOne>
bool few_class_rows(Tile<float>& t, int only, bool logs) {
  using T = float;
  FewClasses<S, C, kOne> classes(t, only);
  T *losses = t.row(kB), *to[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) to[c] = t.second + classes.number[c] * t.stride;
  classes.each(t.padded,
               [&](int64_t v, const Vec<T>(&e)[C], IVec<T> y) __attribute__((always_inline)) {
                 auto [own, rest] = own_and_rest<C, kOne>(e, y);
                 const Vec<T> sum = own + rest, both = T(1) / (sum * own), inverse = both * own;
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) store<T>(to[c] + v, e[c] * inverse);
                 store<T>(losses + v, rest * (sum * both));
               });
  if (!classes.extent.within(kNear)) return false;
  for (int64_t v = 0, end = logs ? t.padded : 0; v < end; v += lanes<T>)
    store<T>(losses + v, log_one_plus<T>(load<T>(losses + v)));
  return true;
}

// Adds the other sums, read from those rows.
template <int C, bool kOne, bool kLogs, bool kFocal>
void reduce_few_labels(Tile<float>& t, int only, const ClassSums& to) {
  using T = float;
  const T *ps = t.row(kA), *quotients = t.row(kB), *rests = t.row(kC);
  const T gamma = kFocal ? T(t.job.slots.gamma[0]) : T(0);
  Vec<T> overlap[C] = {}, loss[C] = {}, focal[C] = {};
  IVec<T> count[C] = {};
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    Vec<T> l{}, f{};
    if (kLogs) l = log_one_plus<T>(load<T>(quotients + v));
    if (kFocal) f = focal_value<Mathematics<T>>(load<T>(rests + v), l, gamma);
    if (kOne) {
      loss[0] += l;
      if (kFocal) focal[0] += f;
      continue;
    }
    const IVec<T> y = once(label_lanes<T>(t.y + v));
    const Vec<T> p = once(load<T>(ps + v));
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const IVec<T> is_label = y == class_number<T>(c);
      count[c] -= is_label;
      overlap[c] = select<T>(is_label, overlap[c] + p, overlap[c]);
      if (kLogs) loss[c] = select<T>(is_label, loss[c] + l, loss[c]);
      if (kFocal) focal[c] = select<T>(is_label, focal[c] + f, focal[c]);
    }
  }
  if (kOne) {
    to.reference[only] += t.n;
    if (kLogs) to.loss[only] += total<T>(loss[0]);
    if (kFocal) to.focal[only] += total<T>(focal[0]);
    return;
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    to.reference[c] += total<T>(__builtin_convertvector(count[c], Vec<T>));
    to.overlap[c] += total<T>(overlap[c]);
    if (kLogs) to.loss[c] += total<T>(loss[c]);
    if (kFocal) to.focal[c] += total<T>(focal[c]);
  }
}

// The derivative by the loss of a voxel's label, with that by its focal loss: `loss` and `focal`
// are the coefficients of the two. Blocks FMA contraction, as `LabelGradient` does.
template <class T>
FL_INLINE Vec<T> with_focal(Vec<T> own, Vec<T> rest, Vec<T> inverse, Vec<T> label_loss, T gamma,
                            Vec<T> loss, Vec<T> focal) {
  const Vec<T> p = once(own * inverse), q = once(rest * inverse);
  return once(loss + focal * once(focal_slope<Mathematics<T>>(p, q, once(label_loss), gamma)));
}

// The derivatives by the sums of C classes, which a tile's voxels share.
template <class T, int C, bool kOne, bool kFocal>
struct SharedSlopes {
  Vec<T> overlap, region, loss, focal, k[C];
  T gamma;

  FL_INLINE SharedSlopes(const Tile<T>& t, const int64_t (&number)[C]) {
    const auto& s = t.job.slots;
    auto table = [&](int slot) {
      const T* by_class = coefficients(t, slot);
      T numbers[lanes<T> < C ? C : lanes<T>] = {};
      for (int c = 0; by_class && c < C; ++c) numbers[c] = by_class[c];
      return kOne ? splat<T>(numbers[number[0]]) : load<T>(numbers);
    };
    overlap = table(s.overlap), region = table(s.predicted), loss = table(s.cross_entropy);
    focal = table(kFocal ? s.focal[0] : -1);
    gamma = kFocal ? T(s.gamma[0]) : T(0);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      k[c] = splat<T>(s.predicted >= 0 ? coefficients(t, s.predicted)[number[c]] : T(0));
  }
  FL_INLINE Vec<T> of_class(int c, int64_t) const { return k[c]; }
  FL_INLINE Vec<T> at_overlap(int64_t, IVec<T> y) const {
    return kOne ? overlap : pick(overlap, y);
  }
  FL_INLINE Vec<T> at_region(int64_t, IVec<T> y) const { return kOne ? region : pick(region, y); }
  FL_INLINE Vec<T> at_loss(int64_t, IVec<T> y, Vec<T> own, Vec<T> rest, Vec<T> inverse) const {
    auto at = [&](Vec<T> by_class) { return kOne ? by_class : pick(by_class, y); };
    if (!kFocal) return at(loss);
    return with_focal<T>(own, rest, inverse, log_one_plus<T>(rest / own), gamma, at(loss),
                         at(focal));
  }
};

// Writes the gradients to rows of `second`. make(number) gives the derivatives, where `number` has
// the classes in the order of the loop. Returns false, and the rows are invalid, if some logit is
// too large.
template <class S, int C, bool kOne, class Make>
bool apply_few_classes(Tile<float>& t, int only, const Make& make) {
  using T = float;
  FewClasses<S, C, kOne> classes(t, only);
  const auto slopes = make(classes.number);
  T* to[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) to[c] = t.second + classes.number[c] * t.stride;
  classes.each(t.padded,
               [&](int64_t v, const Vec<T>(&e)[C], IVec<T> y) __attribute__((always_inline)) {
                 auto [own, rest] = own_and_rest<C, kOne>(e, y);
                 Vec<T> others{}, k[C];
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) k[c] = slopes.of_class(c, v);
#pragma GCC unroll 4
                 for (int c = kOne; c < C; ++c) {
                   const Vec<T> sum = others + e[c] * k[c];
                   others = kOne ? sum : select<T>(y == class_number<T>(c), others, sum);
                 }
                 const Vec<T> inverse = T(1) / (rest + own);
                 const Vec<T> by_loss = slopes.at_loss(v, y, own, rest, inverse);
                 const LabelGradient<T> g(own, rest, inverse, others * inverse,
                                          slopes.at_overlap(v, y), slopes.at_region(v, y), by_loss);
                 const Vec<T> turn = once(inverse * g.turn);
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) {
                   const Vec<T> other = e[c] * (inverse * k[c] - turn);
                   if (kOne) store<T>(to[c] + v, c ? other : g.at_label);
                   else store<T>(to[c] + v, select<T>(y == class_number<T>(c), g.at_label, other));
                 }
               });
  return classes.extent.within(kNear);
}

// Stores these rows to the output.
inline void write_few_classes(Tile<float>& t) {
  with_storage<float>(t.job.out.dtype, [&](auto number) {
    using S = decltype(number);
    const Writer<float, S> writer(t);
    if (!writer.straight) return t.store_gradient(t.second, t.x);
    with_constant(writer.past_caches, [&](auto stream) {
      constexpr int L = lanes<float>;
      constexpr bool kStream = decltype(stream)::value;
      for (int64_t c = 0; c < t.job.classes; ++c) {
        const float* g = t.second + c * t.stride;
        S* to = writer.row(c);
        int64_t v = 0, end = t.padded;
        for (; v + 2 * L <= end; v += 2 * L)
          store_two_as<S, kStream, false, float>(to + v, load<float>(g + v),
                                                 load<float>(g + v + L));
        for (; v < end; v += L) store_as<S, kStream, float>(to + v, load<float>(g + v));
      }
    });
  });
}

// The outcome of a tile.
enum class Few { done, too_large, unsuited };

// Calls run(S{}, count, one, only) for a tile whose logits can be read in place.
template <class Run>
Few few_classes(Tile<float>& t, const Run& run) {
  if (!t.even) return Few::unsuited;
  const int only = t.only_label();
  bool near = false;
  with_source(t, [&](auto number) {
    with_constant(only >= 0, [&](auto one) {
      near = t.job.classes == 3 ? run(number, std::integral_constant<int, 3>{}, one, only)
                                : run(number, std::integral_constant<int, 4>{}, one, only);
    });
  });
  return near ? Few::done : Few::too_large;
}

template <class T>
Few reduce_few(Tile<T>& t, const ClassSums& to, bool logs, double* weight) {
  return few_classes(t, [&](auto number, auto count, auto one, int only) {
    constexpr int C = decltype(count)::value;
    constexpr bool kOne = decltype(one)::value;
    using S = decltype(number);
    const bool focal = t.job.slots.gammas > 0;
    if (!(focal ? reduce_few_classes<S, C, kOne, true>(t, only, to)
                : reduce_few_classes<S, C, kOne, false>(t, only, to)))
      return false;
    if (focal) reduce_few_labels<C, kOne, true, true>(t, only, to);
    else if (logs) reduce_few_labels<C, kOne, true, false>(t, only, to);
    else reduce_few_labels<C, kOne, false, false>(t, only, to);
    *weight += t.n;
    return true;
  });
}

template <class T>
Few apply_few(Tile<T>& t) {
  return few_classes(t, [&](auto number, auto count, auto one, int only) {
    constexpr int C = decltype(count)::value;
    constexpr bool kOne = decltype(one)::value;
    using S = decltype(number);
    auto run = [&](auto focal) {
      auto slopes = [&](const int64_t (&order)[C]) {
        return SharedSlopes<T, C, kOne, decltype(focal)::value>(t, order);
      };
      return apply_few_classes<S, C, kOne>(t, only, slopes);
    };
    if (!(t.job.slots.gammas > 0 ? run(std::true_type{}) : run(std::false_type{}))) return false;
    write_few_classes(t);
    return true;
  });
}

}  // namespace
