// Softmax of three or four classes with a label map, where every voxel has weight 1 and no logit is
// large: a vector of voxels stays in registers. Gradients are bit-identical to those of
// softmax_labels.h, as the address of the gradient decides which tile a voxel belongs to.
//
// As |x| ≤ 36, no maximum is subtracted: p_c = e^x_c / Σ e^x, and with own = e^x_y and
// rest = Σ_{c≠y} e^x_c the loss is −log p_y = log(1 + rest / own). `LabelGradient` of label_rows.h
// derives the gradient.
#pragma once

#include <optional>

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

// Whether vectors of channels-last memory are taken apart in registers.
template <class T>
constexpr bool kSplits = false;

// The C classes of 16 voxels, between their order in channels-last memory, where C vectors hold
// them, and a vector for each class. `number` has the classes in the order of these vectors.
template <int C>
struct Apart {};

#if defined(__AVX512F__)
template <>
constexpr bool kSplits<float> = true;

FL_INLINE Vec<float> pick_of_two(Vec<float> a, __m512i which, Vec<float> b) {
  return (Vec<float>)_mm512_permutex2var_ps((__m512)a, which, (__m512)b);
}
template <int kQuarters>
FL_INLINE Vec<float> quarters_of_two(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_shuffle_f32x4((__m512)a, (__m512)b, kQuarters);
}

// First two classes of the eight voxels in two vectors, then halves.
template <>
struct Apart<4> {
  __m512i split[2], join[2];

  explicit Apart(const int64_t (&number)[4]) {
    int32_t from[2][16], to[2][16];
    for (int position = 0; position < 4; ++position)
      for (int voxel = 0; voxel < 8; ++voxel) {
        const int at = 8 * position + voxel, half = position / 2;
        from[half][at - 16 * half] = 4 * voxel + int(number[position]);
        to[voxel / 4][4 * (voxel % 4) + int(number[position])] = at;
      }
    for (int i = 0; i < 2; ++i)
      split[i] = _mm512_loadu_si512(from[i]), join[i] = _mm512_loadu_si512(to[i]);
  }
  FL_INLINE void take_apart(Vec<float> (&v)[4]) const {
    const Vec<float> a = pick_of_two(v[0], split[0], v[1]), b = pick_of_two(v[0], split[1], v[1]);
    const Vec<float> c = pick_of_two(v[2], split[0], v[3]), d = pick_of_two(v[2], split[1], v[3]);
    v[0] = quarters_of_two<0x44>(a, c), v[1] = quarters_of_two<0xee>(a, c);
    v[2] = quarters_of_two<0x44>(b, d), v[3] = quarters_of_two<0xee>(b, d);
  }
  FL_INLINE void put_together(Vec<float> (&v)[4]) const {
    const Vec<float> a = quarters_of_two<0x44>(v[0], v[1]), b = quarters_of_two<0x44>(v[2], v[3]);
    const Vec<float> c = quarters_of_two<0xee>(v[0], v[1]), d = quarters_of_two<0xee>(v[2], v[3]);
    v[0] = pick_of_two(a, join[0], b), v[1] = pick_of_two(a, join[1], b);
    v[2] = pick_of_two(c, join[0], d), v[3] = pick_of_two(c, join[1], d);
  }
};

// Every vector is picked of three: of two, and then of these and the third.
template <>
struct Apart<3> {
  __m512i split[3][2], join[3][2];

  explicit Apart(const int64_t (&number)[3]) {
    int32_t from[3][2][16], to[3][2][16];
    for (int position = 0; position < 3; ++position)
      for (int voxel = 0; voxel < 16; ++voxel) {
        const int at = 3 * voxel + int(number[position]), vector = at / 16, lane = at % 16;
        from[position][0][voxel] = at % 32;
        from[position][1][voxel] = at < 32 ? voxel : at - 16;
        to[vector][0][lane] = position < 2 ? 16 * position + voxel : 0;
        to[vector][1][lane] = position < 2 ? lane : 16 + voxel;
      }
    for (int i = 0; i < 3; ++i)
      for (int step = 0; step < 2; ++step) {
        split[i][step] = _mm512_loadu_si512(from[i][step]);
        join[i][step] = _mm512_loadu_si512(to[i][step]);
      }
  }
  FL_INLINE static void pick(const __m512i (&which)[3][2], Vec<float> (&v)[3]) {
    const Vec<float> a = v[0], b = v[1], c = v[2];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) v[i] = pick_of_two(pick_of_two(a, which[i][0], b), which[i][1], c);
  }
  FL_INLINE void take_apart(Vec<float> (&v)[3]) const { pick(split, v); }
  FL_INLINE void put_together(Vec<float> (&v)[3]) const { pick(join, v); }
};
#endif

// The exponentials of C classes' logits of type S. `kOne`: all voxels have the label `first`, which
// then is the first class here; the others keep their order. `kFlat`: their channels are last.
template <class S, int C, bool kOne, bool kFlat>
struct FewClasses {
  using T = float;
  static constexpr int L = lanes<T>;
  static constexpr int U = 64 / int(sizeof(S)) / L;  // vectors of a cache line
  const S *x[C], *soon[C];                           // `kFlat`: each C vectors from the next
  int64_t number[C];
  const int32_t* label;
  Extent<S, T> extent;
  NearExponential<T> exponential;
  std::optional<Apart<C>> order;

  FL_INLINE FewClasses(const Tile<T>& t, int first) : label(t.y) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      number[c] = !kOne ? c : c == 0 ? first : c <= first ? c - 1 : c;
      if (kFlat) {
        x[c] = t.flat_logits<S>() + c * L, soon[c] = t.part_ahead<S>(c);
      } else if (t.direct) {
        x[c] = t.source_row<S>(number[c]), soon[c] = x[c] + t.step;
      } else {
        x[c] = soon[c] = (const S*)(t.x + number[c] * t.stride);
      }
    }
    if constexpr (kFlat) order.emplace(number);
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
    constexpr int kStep = kFlat ? C : 1;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      prefetch_lines<N * L* int(sizeof(S)), kFlat>(soon[c] + first);
      if (!kFlat) extent.template stored<N>(x[c] + first);
    }
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      Vec<T> e[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        if (kFlat) extent.template stored<1>(x[c] + kStep * v);
        e[c] = load_as<S, T>(x[c] + kStep * v);
        extent.loaded(e[c]);
      }
      if constexpr (kFlat) order->take_apart(e);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) e[c] = exponential(e[c]);
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
template <class S, int C, bool kOne, bool kFlat, bool kFocal>
bool reduce_few_classes(Tile<float>& t, int only, const ClassSums& to) {
  using T = float;
  FewClasses<S, C, kOne, kFlat> classes(t, only);
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
template <class S, int C, bool kOne, bool kFlat>
bool few_class_rows(Tile<float>& t, int only, bool logs) {
  using T = float;
  FewClasses<S, C, kOne, kFlat> classes(t, only);
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

// Where a tile's gradient is put: in rows of `second`, or, with `kFlat`, in the order of
// channels-last memory, straight to it if the logits stay there, to be read again where some are
// too large.
template <int C, bool kFlat>
class FewGradients {
 public:
  using T = float;
  static constexpr int L = lanes<T>;

  FewGradients(Tile<T>& t, const int64_t (&number)[C]) : t_(t) {
    t.find_out();
    for (int c = 0; c < C; ++c) to_[c] = t.second + (kFlat ? c * L : number[c] * t.stride);
    if constexpr (kFlat) {
      order_.emplace(number);
      auto* out = (T*)(t.out_base(0) + t.out_runs.run[0].offset);
      const bool floats = t.job.out.dtype == fastloss::DType::f32;
      straight_ = t.job.stream && floats && uintptr_t(out) % kVectorBytes == 0;
      for (int c = 0; straight_ && c < C; ++c) to_[c] = out + c * L;
    }
  }
  FL_INLINE void put(int64_t v, Vec<T> (&g)[C]) const {
    if constexpr (kFlat) order_->put_together(g);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* to = to_[c] + (kFlat ? C : 1) * v;
      if (kFlat && straight_) stream<T>(to, g[c]);
      else store<T>(to, g[c]);
    }
  }
  // Stores the buffer to the output.
  void finish() const {
    if (straight_) return;
    if (kFlat)
      return store_flat<T>(t_.out_base(0) + t_.out_runs.run[0].offset, t_.job.out.dtype, C * t_.n,
                           t_.second, t_.job.stream);
    with_storage<T>(t_.job.out.dtype, [&](auto number) {
      using S = decltype(number);
      const Writer<T, S> writer(t_);
      if (!writer.straight) return t_.store_gradient(t_.second, t_.x);
      with_constant(writer.past_caches, [&](auto past) { copy<decltype(past)::value>(writer); });
    });
  }

 private:
  template <bool kStream, class S>
  void copy(const Writer<T, S>& writer) const {
    for (int64_t c = 0; c < C; ++c) {
      const T* g = t_.second + c * t_.stride;
      S* to = writer.row(c);
      int64_t v = 0, end = t_.padded;
      for (; v + 2 * L <= end; v += 2 * L)
        store_two_as<S, kStream, false, T>(to + v, load<T>(g + v), load<T>(g + v + L));
      for (; v < end; v += L) store_as<S, kStream, T>(to + v, load<T>(g + v));
    }
  }

  Tile<T>& t_;
  T* to_[C];
  bool straight_ = false;
  std::optional<Apart<C>> order_;
};

// Writes the gradients. make(number) gives the derivatives, where `number` has the classes in the
// order of the loop. Returns false, and what is written has to be written again, if some logit is
// too large.
template <class S, int C, bool kOne, bool kFlat, class Make>
bool apply_few_classes(Tile<float>& t, int only, const Make& make) {
  using T = float;
  FewClasses<S, C, kOne, kFlat> classes(t, only);
  const auto slopes = make(classes.number);
  const FewGradients<C, kFlat> gradients(t, classes.number);
  classes.each(
      t.padded, [&](int64_t v, const Vec<T>(&e)[C], IVec<T> y) __attribute__((always_inline)) {
        auto [own, rest] = own_and_rest<C, kOne>(e, y);
        Vec<T> others{}, k[C], g[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) k[c] = slopes.of_class(c, v);
#pragma GCC unroll 4
        for (int c = kOne; c < C; ++c) {
          const Vec<T> sum = others + e[c] * k[c];
          others = kOne ? sum : select<T>(y == class_number<T>(c), others, sum);
        }
        const Vec<T> inverse = T(1) / (rest + own);
        const Vec<T> by_loss = slopes.at_loss(v, y, own, rest, inverse);
        const LabelGradient<T> label(own, rest, inverse, others * inverse, slopes.at_overlap(v, y),
                                     slopes.at_region(v, y), by_loss);
        const Vec<T> turn = once(inverse * label.turn);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const Vec<T> other = e[c] * (inverse * k[c] - turn);
          if (kOne) g[c] = c ? other : label.at_label;
          else g[c] = select<T>(y == class_number<T>(c), label.at_label, other);
        }
        gradients.put(v, g);
      });
  if (!classes.extent.within(kNear)) return false;
  gradients.finish();
  return true;
}

// The outcome of a tile.
enum class Few { done, too_large, unsuited };

// Calls run(S{}, count, one, flat, only) for a tile with all voxels.
template <class Run>
Few few_classes(Tile<float>& t, const Run& run) {
  if (!t.even) return Few::unsuited;
  const int only = t.only_label();
  bool near = false;
  const auto with_order = [&](auto number, auto one, auto flat) {
    near = t.job.classes == 3 ? run(number, std::integral_constant<int, 3>{}, one, flat, only)
                              : run(number, std::integral_constant<int, 4>{}, one, flat, only);
  };
  with_source(t, [&](auto number) {
    with_constant(only >= 0, [&](auto one) {
      if constexpr (kSplits<float>)
        if (t.flat) return with_order(number, one, std::true_type{});
      with_order(number, one, std::false_type{});
    });
  });
  return near ? Few::done : Few::too_large;
}

template <class T>
Few reduce_few(Tile<T>& t, const ClassSums& to, bool logs, double* weight) {
  return few_classes(t, [&](auto number, auto count, auto one, auto flat, int only) {
    constexpr int C = decltype(count)::value;
    constexpr bool kOne = decltype(one)::value, kFlat = decltype(flat)::value;
    using S = decltype(number);
    const bool focal = t.job.slots.gammas > 0;
    if (!(focal ? reduce_few_classes<S, C, kOne, kFlat, true>(t, only, to)
                : reduce_few_classes<S, C, kOne, kFlat, false>(t, only, to)))
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
  return few_classes(t, [&](auto number, auto count, auto one, auto flat, int only) {
    constexpr int C = decltype(count)::value;
    constexpr bool kOne = decltype(one)::value, kFlat = decltype(flat)::value;
    using S = decltype(number);
    auto run = [&](auto focal) {
      auto slopes = [&](const int64_t (&order)[C]) {
        return SharedSlopes<T, C, kOne, decltype(focal)::value>(t, order);
      };
      return apply_few_classes<S, C, kOne, kFlat>(t, only, slopes);
    };
    return t.job.slots.gammas > 0 ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace
