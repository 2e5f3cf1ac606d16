// Softmax with a label map whose sums are kept per region, where every class has a map of regions:
// the sums of Dice and of cross-entropy of both outcomes.
//
// The voxels of a run of class c share its region, and whether c is their label. They add p_c, and
// one loss: −log p_c or, of another label, −log q_c with q = 1 − p. With e_c = e^(x_c−s) and
// rest_c = Σ_{j≠c} e_j, p_c = e_c / Σe, q_c = rest_c / Σe, −log p_c = log(1 + rest_c/e_c) and
// −log q_c = log(1 + e_c/rest_c).
//
// In the gradient a_c is the derivative by p_c, and b_c that by the loss. That by log p_c is
//   t_c = a_c p_c − b_c for the label,  a_c p_c + b_c e_c/rest_c for other classes,
// and as p_c may be near 1, ∂L/∂x_c = t_c − p_c Σ_j t_j = t_c q_c − p_c Σ_{j≠c} t_j.
//
// With few classes and near logits (|x| ≤ 36), s is 0 and each sum over j ≠ c is formed on its own,
// so that nothing cancels or overflows. Otherwise s is the largest logit, and rest_c = Σe − e_c,
// which would cancel for the largest class alone: `exponentials` sums the others. At most one class
// d has p > ½; its rest may be 0. If it is not the label, its second part is left out of t. That
// adds b_d p_d to the gradient of d, and −b_d p_d e_c/rest_d to that of c ≠ d, where e_c ≤ rest_d.
#pragma once

#include "class_runs.h"
#include "softmax.h"
#include "softmax_few.h"

namespace {

// The place of Σ m among the sums; −1: not requested.
inline int32_t voxels_slot(const Job& job) {
  for (int32_t i = 0; i < job.slots.count; ++i) {
    const fastloss::Sum& sum = job.sums[i];
    if (sum.weight == fastloss::Weight::one && sum.function == Function::one && sum.field < 0)
      return i;
  }
  return -1;
}

// The sums that this path computes, beside that of `voxels_slot`.
constexpr uint32_t kClassRegionSums = fastloss::kReference | fastloss::kOverlap |
                                      fastloss::kPredicted | fastloss::kCrossEntropy |
                                      fastloss::kCrossEntropyRest;

inline bool suits_class_regions(const Job& job) {
  if (!job.regions_by_class || job.activation != Activation::softmax || job.dense ||
      job.classes < 2 || job.map != fastloss::MapKind::none || job.histograms || job.losses)
    return false;
  const int32_t voxels = voxels_slot(job);
  for (int32_t i = 0; i < job.slots.count; ++i)
    if (i != voxels && !(fastloss::name_of(job.sums[i]) & kClassRegionSums)) return false;
  return true;
}

// ------------------------------------------------------------------ few classes, near logits

// Whether tiles of near logits are computed in registers.
template <class T>
bool few_with_regions(const Job& job) {
  return sizeof(T) == 4 && job.classes <= 4;
}

// Calls run(S{}, count) for such a tile. Returns what it does: false if some logit is not near.
template <class Run>
bool with_few(Tile<float>& t, const Run& run) {
  bool near = false;
  with_source(t, [&](auto number) {
    using std::integral_constant;
    if (t.job.classes == 2) near = run(number, integral_constant<int, 2>{});
    else if (t.job.classes == 3) near = run(number, integral_constant<int, 3>{});
    else near = run(number, integral_constant<int, 4>{});
  });
  return near;
}

// others[c] = Σ_{j≠c} each[j]. Returns the sum of all.
template <int C>
FL_INLINE Vec<float> sums_of_others(const Vec<float> (&each)[C], Vec<float> (&others)[C]) {
  if constexpr (C == 2) {
    others[0] = each[1], others[1] = each[0];
  } else if constexpr (C == 3) {
    others[0] = each[1] + each[2], others[1] = each[0] + each[2], others[2] = each[0] + each[1];
  } else {
    const Vec<float> low = each[0] + each[1], high = each[2] + each[3];
    others[0] = each[1] + high, others[1] = each[0] + high;
    others[2] = low + each[3], others[3] = low + each[2];
  }
  return others[C - 1] + each[C - 1];
}

// 1/v, for v between 1e-37 and 1e37.
FL_INLINE Vec<float> inverse_of(Vec<float> v) {
#if defined(__AVX512F__)
  // 14 bits, and a step of Newton's method: faster than a quotient.
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)v);
  return y + y * (1.f - v * y);
#else
  return 1.f / v;
#endif
}

// x becomes rows of p, and second of the loss. Returns false if some logit is not near.
template <class S, int C>
bool few_class_region_rows(Tile<float>& t, bool logs) {
  using T = float;
  FewClasses<S, C, false, false> classes(t, 0);
  classes.each(t.padded,
               [&](int64_t v, const Vec<T>(&e)[C], IVec<T> y) __attribute__((always_inline)) {
                 Vec<T> rest[C];
                 const Vec<T> inverse = inverse_of(sums_of_others<C>(e, rest));
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) {
                   const IVec<T> is_label = y == class_number<T>(c);
                   const Vec<T> own = select<T>(is_label, e[c], rest[c]);
                   const Vec<T> other = select<T>(is_label, rest[c], e[c]);
                   store<T>(t.x + c * t.stride + v, e[c] * inverse);
                   store<T>(t.second + c * t.stride + v, other * inverse_of(own));
                 }
               });
  if (!classes.extent.within(kNear)) return false;
  for (int c = 0; logs && c < C; ++c) {
    T* loss = t.second + c * t.stride;
    for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>)
      store<T>(loss + v, log_one_plus<T>(load<T>(loss + v)));
  }
  return true;
}

// a and b of class c, in rows of all voxels.
struct ClassRowSlopes {
  const float *a, *b;
  int64_t stride;

  FL_INLINE Pair<float> at(int c, int64_t v, IVec<float>) const {
    return {load<float>(a + c * stride + v), load<float>(b + c * stride + v)};
  }
};

#if defined(__AVX2__)
// The numbers of a table of a class: a and b of voxels that are not of the class, and of those that
// are.
constexpr int kClassNumbers = 4;
using ClassTables = RegionNumbers<kClassNumbers * 4>;

// The same looked up by the region of every voxel.
template <int kVectors>
struct ClassTableSlopes {
  const ClassTables& tables;
  const uint8_t* const* region;

  FL_INLINE Pair<float> at(int c, int64_t v, IVec<float> is_label) const {
    const IVec<float> row = label_lanes<float>(region[c] + v);
    auto of = [&](int i) { return look_up<kVectors>(tables.number[kClassNumbers * c + i], row); };
    return {select<float>(is_label, of(2), of(0)), select<float>(is_label, of(3), of(1))};
  }
};
#endif

// Writes the gradients without m to second. Returns false if some logit is not near; the gradients
// of voxels whose logits are near are right then as well, bit by bit.
template <class S, int C, class Slopes>
bool few_class_region_gradients(Tile<float>& t, const Slopes& slopes) {
  using T = float;
  FewClasses<S, C, false, false> classes(t, 0);
  classes.each(t.padded,
               [&](int64_t v, const Vec<T>(&e)[C], IVec<T> y) __attribute__((always_inline)) {
                 Vec<T> rest[C], turn[C], others[C];
                 const Vec<T> inverse = inverse_of(sums_of_others<C>(e, rest));
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) {
                   const IVec<T> is_label = y == class_number<T>(c);
                   const Pair<T> by = slopes.at(c, v, is_label);  // a and b
                   const Vec<T> of_other = by.second * (e[c] * inverse_of(rest[c]));
                   const Vec<T> loss = once(select<T>(is_label, -by.second, of_other));
                   turn[c] = once(by.first * once(e[c] * inverse) + loss);
                 }
                 sums_of_others<C>(turn, others);
#pragma GCC unroll 4
                 for (int c = 0; c < C; ++c) {
                   const Vec<T> p = once(e[c] * inverse), q = once(rest[c] * inverse);
                   store<T>(t.second + c * t.stride + v, turn[c] * q - once(p * others[c]));
                 }
               });
  return classes.extent.within(kNear);
}

// ------------------------------------------------------------------ any classes and logits

// x becomes e^(x−largest), second largest − x, with rows of Σe − 1 and 1/Σe.
template <class T>
void class_exponentials(Tile<T>& t) {
  load_and_maximum(t);
  exponentials<true>(t, [](int64_t, int64_t, auto) {});
}

// e/rest, for a class that is not above ½.
template <class T>
FL_INLINE Vec<T> odds(Vec<T> e, Vec<T> gap, Vec<T> rest) {
  return e / select<T>(gap == T(0), rest, (rest + T(1)) - e);
}

// Of class c, x becomes p, and second the loss.
template <class T>
void class_region_row(Tile<T>& t, int64_t c) {
  const T *inverse = t.row(kInverse), *rest = t.row(kRest);
  const T *log_sum = t.row(kLargest), *most = t.row(kA);
  const IVec<T> number = class_number<T>(c);
  const auto* label = t.labels();
  T *x = t.x + c * t.stride, *second = t.second + c * t.stride;
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    const Vec<T> e = load<T>(x + v), gap = load<T>(second + v), r = load<T>(rest + v);
    Vec<T> other = log_one_plus<T>(odds<T>(e, gap, r));
    other = select<T>((gap == T(0)) & (r < T(1)), load<T>(most + v), other);
    const IVec<T> is_label = label_lanes<T>(label + v) == number;
    store<T>(x + v, e * load<T>(inverse + v));
    store<T>(second + v, select<T>(is_label, gap + load<T>(log_sum + v), other));
  }
}

// Voxels where the rest of the largest class is so small that e may be 0: with `least` as the
// smallest gap of another class, that rest is e^−least `sum`.
template <class T>
struct TinyRest {
  IVec<T> where;
  Vec<T> least, sum{};

  // Second has the gaps, and r the rest.
  FL_INLINE TinyRest(const Tile<T>& t, int64_t v, Vec<T> r)
      : where(r < T(1e-30)), least(splat<T>(T(INFINITY))) {
    if (!any<T>(where)) return;
    const auto gap = [&](int64_t c) { return load<T>(t.second + c * t.stride + v); };
    for (int64_t c = 0; c < t.job.classes; ++c)
      least = smaller(least, select<T>(gap(c) > T(0), gap(c), least));
    for (int64_t c = 0; c < t.job.classes; ++c)
      sum += keep<T>(gap(c) > T(0), exponential<T>(least - gap(c)));
    where &= least < T(INFINITY);
  }
};

// x becomes rows of p, and second of the loss.
template <class T>
void class_region_rows(Tile<T>& t) {
  class_exponentials(t);
  const T* rest = t.row(kRest);
  T *log_sum = t.row(kLargest), *most = t.row(kA);
  for (int64_t v = 0, end = t.padded; v < end; v += lanes<T>) {
    const Vec<T> r = load<T>(rest + v), l = log_one_plus<T>(r);
    const TinyRest<T> tiny(t, v, r);
    Vec<T> of_rest = logarithm<T>(r);
    if (any<T>(tiny.where))
      of_rest = select<T>(tiny.where, logarithm<T>(tiny.sum) - tiny.least, of_rest);
    store<T>(log_sum + v, l);
    store<T>(most + v, l - of_rest);  // −log q of a class above ½
  }
  for (int64_t c = 0; c < t.job.classes; ++c) class_region_row(t, c);
}

// Writes the gradients without m to second, given rows of a, which are overwritten, and b.
template <class T>
void class_region_gradients(Tile<T>& t, T* a, const T* b) {
  constexpr int L = lanes<T>;
  class_exponentials(t);
  const int64_t classes = t.job.classes, stride = t.stride;
  const T *inverse = t.row(kInverse), *rest = t.row(kRest);
  const auto* label = t.labels();
  for (int64_t v = 0, end = t.padded; v < end; v += L) {
    const Vec<T> i = load<T>(inverse + v), r = load<T>(rest + v);
    const IVec<T> y = label_lanes<T>(label + v);
    // Of the class above ½: t, and b if it is not the label.
    Vec<T> others{}, of_most{}, loss_of_most{};
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * stride + v;
      const Vec<T> e = load<T>(t.x + at), p = e * i, by_loss = load<T>(b + at);
      const IVec<T> most = p > T(0.5), is_label = y == class_number<T>(c);
      Vec<T> loss = drop<T>(most, by_loss * odds<T>(e, load<T>(t.second + at), r));
      loss = select<T>(is_label, -by_loss, loss);
      const Vec<T> turn = load<T>(a + at) * p + loss;
      others += drop<T>(most, turn);
      of_most += keep<T>(most, turn);
      loss_of_most += keep<T>(most & ~is_label, by_loss);
      store<T>(t.x + at, p);
      store<T>(a + at, turn);
    }
    const Vec<T> all = others + of_most, q = r * i, ratio = T(1) / r;
    const TinyRest<T> tiny(t, v, r);
    const bool any_tiny = any<T>(tiny.where);
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * stride + v;
      const Vec<T> p = load<T>(t.x + at), turn = load<T>(a + at);
      const Vec<T> above = turn * q - p * (others - loss_of_most);
      Vec<T> share = drop<T>(p == T(0), p * ratio);
      if (any_tiny) {
        const Vec<T> e = exponential<T>(tiny.least - load<T>(t.second + at));
        share = select<T>(tiny.where, e / tiny.sum, share);
      }
      const Vec<T> below = turn - p * all - share * loss_of_most;
      store<T>(t.second + at, select<T>(p > T(0.5), above, below));
    }
  }
}

// ------------------------------------------------------------------ sums

// Where the sums of a block's rows are, (rows, S + 1, C) and (rows,): of the voxels and the losses
// of those that are not of a class and of those that are.
struct ClassRegionSums {
  double *sums, *weights;
  int64_t row, classes;
  int64_t reference, overlap, predicted, voxels, loss[2];

  ClassRegionSums(const Job& job, const Blocks& blocks) : classes(job.classes) {
    const auto& s = job.slots;
    auto slot = [&](int which) { return (which >= 0 ? which : s.count) * job.classes; };
    row = (s.count + 1) * job.classes;
    reference = slot(s.reference), overlap = slot(s.overlap), predicted = slot(s.predicted);
    voxels = slot(voxels_slot(job));
    loss[0] = slot(s.cross_entropy_rest), loss[1] = slot(s.cross_entropy);
    move(job, blocks, 0);
  }
  void move(const Job& job, const Blocks& blocks, int64_t block) {
    sums = blocks.sums + block * job.rows * row;
    weights = blocks.weights + block * job.rows;
  }
  void add(int64_t region, int64_t c, int is_class, double weight, double p, double lost) const {
    double* to = sums + region * row + c;
    if (c == 0) weights[region] += weight;
    to[voxels] += weight;
    to[predicted] += p;
    to[loss[is_class]] += lost;
    if (!is_class) return;
    to[reference] += weight;
    to[overlap] += p;
  }
};

// The sums over runs, of float: of p, of the loss and, where there are weights, of these.
struct PassClassSums {
  const ClassRegionSums& to;
  bool weighs;

  void operator()(int row, int key, double voxels, const double* sums) const {
    to.add(row, key / 2, key % 2, weighs ? sums[2] : voxels, sums[0], sums[1]);
  }
};

// Adds the rows of class c of a tile by its runs.
inline void add_class_runs(const Tile<float>& t, int64_t c, const ClassRuns& runs, RunSums<3>& sums,
                           const PassClassSums& pass) {
  const float* const rows[3] = {t.x + c * t.stride, t.second + c * t.stride,
                                t.rows + kWeight * kMaxTile};
  with_constant(pass.weighs, [&](auto weighs) {
    constexpr int R = decltype(weighs)::value ? 3 : 2;
    const float* const some[R] = {rows[0], rows[1]};
    runs.each([&](int row, int is_class, int first, int count) {
      if (row < 0) return;
      Vec<float> each[R];
      if constexpr (R == 3) sum_rows<3>(rows, first, count, each);
      else sum_rows<2>(some, first, count, each);
      sums.add(row, int(2 * c) + is_class, count, each, pass);
    });
  });
}
inline void add_class_runs(const Tile<double>& t, int64_t c, const ClassRuns& runs, RunSums<3>&,
                           const PassClassSums& pass) {
  runs.each([&](int row, int is_class, int first, int count) {
    if (row < 0) return;
    auto all = [&](const double* r) {
      return sum_run<double>(first, count, [&](int v) { return load<double>(r + v); });
    };
    pass.to.add(row, c, is_class, all(t.rows + kWeight * kMaxTile), all(t.x + c * t.stride),
                all(t.second + c * t.stride));
  });
}

template <class T>
void reduce_class_regions(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  constexpr int L = lanes<T>;
  const bool few = few_with_regions<T>(job),
             logs = job.slots.cross_entropy >= 0 || job.slots.cross_entropy_rest >= 0;
  Tile<T> t(job, sample, scratch);
  ClassRuns runs;
  RunSums<3> sums;
  ClassRegionSums to(job, blocks);
  const PassClassSums pass{to, job.weighted || job.has_ignore};
  int64_t block = 0;
  for (int64_t v = blocks.first; v < blocks.last; v += t.n) {
    if (blocks.of(v) != block) {
      sums.finish(pass);
      block = blocks.of(v);
      to.move(job, blocks, block);
    }
    t.move(v, blocks.tile(v, t.step), &blocks.faults[block]);
    bool done = false;
    if constexpr (sizeof(T) == 4)
      if (few) {
        t.direct = t.contiguous();
        if (!t.direct) t.load_logits();
        done = with_few(t, [&](auto number, auto count) {
          return few_class_region_rows<decltype(number), decltype(count)::value>(t, logs);
        });
      }
    if (!done) class_region_rows(t);
    const T* m = t.row(kWeight);
    for (int64_t c = 0; c < job.classes; ++c) {
      T *p = t.x + c * t.stride, *loss = t.second + c * t.stride;
      for (int64_t i = 0, end = t.ones ? 0 : t.padded; i < end; i += L) {
        store<T>(p + i, load<T>(m + i) * load<T>(p + i));
        store<T>(loss + i, product<T>(load<T>(m + i), load<T>(loss + i)));
      }
      runs.find(t, c);
      add_class_runs(t, c, runs, sums, pass);
    }
  }
  sums.finish(pass);
}

// ------------------------------------------------------------------ gradients

// The derivatives a and b by the sums of a region and class, for voxels that are not of the class
// and for those that are.
template <class T>
struct TwoSlopes {
  T a, b;

  TwoSlopes() : a(0), b(0) {}
  TwoSlopes(const Job& job, int64_t sample, int64_t row, int64_t c, int is_class) {
    const auto& s = job.slots;
    auto number = [&](int slot) {
      const T k = slot >= 0 ? T(job.coefficients_of(slot, sample, row)[c]) : T(0);
      return k == k ? k : T(NAN);  // the caller's NaN may have any bits
    };
    a = number(s.predicted) + (is_class ? number(s.overlap) : T(0));
    b = number(is_class ? s.cross_entropy : s.cross_entropy_rest);
  }
};

// Those of all regions and classes, kept unless there are many.
template <class T>
class ClassSlopes {
 public:
  ClassSlopes(const Job& job, int64_t sample) : job_(job), sample_(sample) {
    known_ = job.rows * job.classes <= kMost;
    for (int64_t row = 0; known_ && row < job.rows; ++row)
      for (int64_t c = 0; c < job.classes; ++c)
        for (int own = 0; own < 2; ++own)
          each_[row * job.classes + c][own] = TwoSlopes<T>(job, sample, row, c, own);
  }
  TwoSlopes<T> of(int64_t row, int64_t c, int is_class) const {
    if (row < 0) return {};
    if (known_) return each_[row * job_.classes + c][is_class];
    return {job_, sample_, row, c, is_class};
  }

 private:
  static constexpr int kMost = 512;
  const Job& job_;
  const int64_t sample_;
  bool known_;
  TwoSlopes<T> each_[kMost][2];
};

// Fills rows of a and b of all classes, in `spare.x` and `spare.second`.
template <class T>
void fill_class_slopes(Tile<T>& t, ClassRuns& runs, const ClassSlopes<T>& slopes, Tile<T>& spare) {
  constexpr int L = lanes<T>;
  for (int64_t c = 0; c < t.job.classes; ++c) {
    runs.find(t, c);
    T *a = spare.x + c * t.stride, *b = spare.second + c * t.stride;
    runs.each([&](int row, int is_class, int first, int count) {
      const TwoSlopes<T> two = slopes.of(row, c, is_class);
      // Vectors run over into the next run, which is filled after.
      for (int v = first; v < first + count; v += L) {
        store<T>(a + v, splat<T>(two.a));
        store<T>(b + v, splat<T>(two.b));
      }
    });
  }
}

// The gradients without m of tiles, in second.
template <class T>
class ClassGradients {
 public:
  ClassGradients(const Job& job, int64_t sample, Tile<T>& spare)
      : spare_(spare), slopes_(job, sample) {}
  void operator()(Tile<T>& t) {
    fill_class_slopes(t, runs_, slopes_, spare_);
    class_region_gradients(t, spare_.x, spare_.second);
  }

 protected:
  Tile<T>& spare_;
  ClassRuns runs_;
  const ClassSlopes<T> slopes_;
};

// The same of few classes.
class FewClassGradients : ClassGradients<float> {
 public:
  FewClassGradients(const Job& job, int64_t sample, Tile<float>& spare)
      : ClassGradients<float>(job, sample, spare) {
#if defined(__AVX2__)
    tables_.fill(job, [&](int64_t row, float* numbers) {
      for (int64_t c = 0; c < job.classes; ++c)
        for (int own = 0; own < 2; ++own) {
          const TwoSlopes<float> two(job, sample, row, c, own);
          numbers[kClassNumbers * c + 2 * own] = two.a;
          numbers[kClassNumbers * c + 2 * own + 1] = two.b;
        }
    });
#endif
  }

  void operator()(Tile<float>& t) {
    t.direct = t.contiguous();
    if (!t.direct) t.load_logits();
    const bool looked_up = has_tables(t);
    if (!looked_up) fill_class_slopes(t, runs_, slopes_, spare_);
    if (looked_up ? by_tables(t) : by_rows(t)) return;
    if (looked_up) fill_class_slopes(t, runs_, slopes_, spare_);
    far(t);
  }

 private:
  static constexpr int kFew = 4;
#if defined(__AVX2__)
  ClassTables tables_;
  uint8_t buffer_[kFew][kMaxTile];
  const uint8_t* region_[kFew];

  bool has_tables(Tile<float>& t) {
    bool all = tables_.fits;
    for (int64_t c = 0; all && c < t.job.classes; ++c)
      all = (region_[c] = region_bytes(t, buffer_[c], c)) != nullptr;
    return all;
  }
  bool by_tables(Tile<float>& t) {
    if (tables_.small) return run(t, ClassTableSlopes<kTableVectors / 2>{tables_, region_});
    return run(t, ClassTableSlopes<kTableVectors>{tables_, region_});
  }
#else
  bool has_tables(Tile<float>&) { return false; }
  bool by_tables(Tile<float>&) { return false; }
#endif

  bool by_rows(Tile<float>& t) { return run(t, ClassRowSlopes{spare_.x, spare_.second, t.stride}); }
  template <class Slopes>
  bool run(Tile<float>& t, const Slopes& slopes) {
    return with_few(t, [&](auto number, auto count) {
      constexpr int C = decltype(count)::value;
      return few_class_region_gradients<decltype(number), C>(t, slopes);
    });
  }

  // Replaces the gradients of voxels with logits that are not near. The bits of others do not
  // depend on these, as the address of the gradient decides which voxels a tile has.
  void far(Tile<float>& t) {
    using T = float;
    constexpr int L = lanes<T>;
    const int64_t classes = t.job.classes;
    T* const kept[kFew] = {t.row(kB), t.row(kC), t.row(kD), t.row(kE)};
    T* const is_far = t.row(kF);
    for (int64_t c = 0; c < classes; ++c)
      std::memcpy(kept[c], t.second + c * t.stride, sizeof(T) * size_t(t.padded));
    t.load_logits();
    std::memset(is_far, 0, sizeof(T) * kMaxTile);
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        const IVec<T> near = absolute<T>(load<T>(t.x + c * t.stride + v)) <= T(kNear);
        store<T>(is_far + v, from_bits<T>(bits<T>(load<T>(is_far + v)) | ~near));
      }
    class_region_gradients(t, spare_.x, spare_.second);
    for (int64_t c = 0; c < classes; ++c) {
      T* gradient = t.second + c * t.stride;
      for (int64_t v = 0, end = t.padded; v < end; v += L)
        store<T>(gradient + v, select<T>(bits<T>(load<T>(is_far + v)) != 0, load<T>(gradient + v),
                                         load<T>(kept[c] + v)));
    }
  }
};

// Multiplies the gradients of a tile by m, and stores them to the output.
template <class T>
void write_class_gradients(Tile<T>& t, Tile<T>& spare) {
  constexpr int L = lanes<T>;
  const T* m = t.row(kWeight);
  for (int64_t c = 0; c < t.job.classes && !t.ones; ++c) {
    T* gradient = t.second + c * t.stride;
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(gradient + v, load<T>(m + v) * load<T>(gradient + v));
  }
  write_rows(t, t.x, spare.x, [&](const auto& row, const auto& put) {
    for (int64_t c = 0; c < t.job.classes; ++c) {
      const T* gradient = t.second + c * t.stride;
      auto to = row(c);
      int64_t v = 0, end = t.padded;
      for (; v + 2 * L <= end; v += 2 * L)
        put.two(to + v, load<T>(gradient + v), load<T>(gradient + v + L));
      for (; v < end; v += L) put(to + v, load<T>(gradient + v));
    }
  });
}

template <class T>
void apply_class_regions(const Job& job, int64_t sample, int64_t first, int64_t last,
                         void* scratch) {
  Tile<T> t(job, sample, scratch), spare(job, sample, (char*)scratch + Tile<T>::bytes(job));
  const int64_t lead = fastloss::voxels_to_line(job, sample);
  auto over_tiles = [&](auto&& gradients) {
    for (int64_t v = first; v < last; v += t.n) {
      t.move(v, tile_from(v, last, lead, t.step), nullptr);
      gradients(t);
      write_class_gradients(t, spare);
    }
  };
  if constexpr (sizeof(T) == 4)
    if (few_with_regions<T>(job)) return over_tiles(FewClassGradients(job, sample, spare));
  over_tiles(ClassGradients<T>(job, sample, spare));
}

}  // namespace
