// Any table of sums and any map: any activation, target, fields and regions, row by row.
//
// by_p, by_log and by_rest are Σ over the sums of coefficient · weight · derivative, by p, by log p
// and by log q, with q = 1 − p. Through sigmoid the gradient by the logit is
//   by_p p q + by_log q − by_rest p.
// Through softmax it is t_c − p_c Σ_j t_j, where t_c, the derivative by log p_c, is
//   by_p_c p_c + by_log_c − by_rest_c p_c / q_c.
// At most one class k has p > ½; its q is small and may be 0. Its last part is left out of t and
// added to the gradient instead: −by_rest_k p_k at k itself, where q_k cancels, and
// p_c (by_rest_k p_k / q_k) at the others, where p_c ≤ q_k.
#pragma once

#include "error_rows.h"
#include "likeliest.h"
#include "softmax.h"
#include "tile.h"
#include "voxel.h"

namespace {

using fastloss::MapKind;
using fastloss::Sum;
using fastloss::Weight;

// Rows of p, −log p, −log q and q of one class.
template <class T>
struct Fields {
  T *p, *loss, *loss_rest, *q;

  // g: the row of the target.
  FL_INLINE Probability<Vec<T>> at(int64_t v, const T* g) const {
    return {load<T>(p + v), load<T>(q + v), load<T>(loss + v), load<T>(loss_rest + v),
            load<T>(g + v)};
  }
};

// The optional rows beside p.
struct Wanted {
  bool logs = false, log_rests = false, rests = false;
};

// Loads the logits. For softmax x becomes e^(x−largest) and, with `gaps`, second largest − x.
template <class T>
void begin_general(Tile<T>& t, bool gaps) {
  constexpr int L = lanes<T>;
  if (t.job.activation != Activation::softmax) {
    t.load_logits();
    return;
  }
  load_and_maximum(t);
  auto nothing = [](int64_t, int64_t, auto) {};
  if (gaps) exponentials<true>(t, nothing);
  else exponentials<false>(t, nothing);
  // The largest logit is not needed any more; its row takes log Σ e^(x−largest).
  if (gaps)
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(t.row(kLargest) + v, log_one_plus<T>(load<T>(t.row(kRest) + v)));
}

// −log(1−p): log(1 + p/q) is exact where p is small, −log q where q is.
template <class T>
FL_INLINE Vec<T> loss_of_rest(Vec<T> p, Vec<T> q) {
  return select<T>(p < T(0.5), log_one_plus<T>(p / q), -logarithm<T>(q));
}

template <class T>
Fields<T> activate_row(Tile<T>& t, int64_t c, const Wanted& wanted) {
  constexpr int L = lanes<T>;
  Fields<T> f{t.row(kA), t.row(kB), t.row(kC), t.row(kD)};
  const bool logs = wanted.logs, log_rests = wanted.log_rests;
  const T* x = t.x + c * t.stride;
  if (t.job.activation == Activation::softmax) {
    const T *inverse = t.row(kInverse), *rest = t.row(kRest), *log_sum = t.row(kLargest);
    const T* gap = t.second + c * t.stride;
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> e = load<T>(x + v), i = load<T>(inverse + v);
      store<T>(f.p + v, e * i);
      if (logs) store<T>(f.loss + v, load<T>(gap + v) + load<T>(log_sum + v));
      if (wanted.rests) store<T>(f.q + v, complement<T>(e, load<T>(gap + v), load<T>(rest + v), i));
    }
    if (log_rests)
      for (int64_t v = 0, end = t.padded; v < end; v += L)
        store<T>(f.loss_rest + v, loss_of_rest<T>(load<T>(f.p + v), load<T>(f.q + v)));
  } else if (t.job.activation == Activation::sigmoid) {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> a = load<T>(x + v), e = exponential<T>(-absolute<T>(a));
      Vec<T> big = T(1) / (e + T(1)), little = e * big;
      IVec<T> positive = a > T(0);
      store<T>(f.p + v, select<T>(positive, big, little));
      store<T>(f.q + v, select<T>(positive, little, big));
      if (logs || log_rests) {
        Vec<T> l = log_one_plus_small(e);
        store<T>(f.loss + v, larger(splat<T>(0), -a) + l);
        store<T>(f.loss_rest + v, larger(splat<T>(0), a) + l);
      }
    }
  } else {
    for (int64_t v = 0, end = t.padded; v < end; v += L) {
      Vec<T> p = load<T>(x + v), q = T(1) - p;
      store<T>(f.p + v, p);
      store<T>(f.q + v, q);
      if (logs) store<T>(f.loss + v, -logarithm<T>(p));
      if (log_rests) store<T>(f.loss_rest + v, loss_of_rest<T>(p, q));
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

// The common sums of one class: those of g and p, and the cross-entropies.
struct ClassTotals {
  double reference, overlap, predicted, loss, loss_rest;
};

// The sums over `count` voxels from `first` on.
template <class T, bool kLogs, bool kRests>
ClassTotals class_totals(int first, int count, const T* m, const T* g, const Fields<T>& f) {
  constexpr int L = lanes<T>;
  Vec<T> reference{}, overlap{}, predicted{}, losses{}, rests{};
  const auto add = [&](int v, const auto& numbers) {
    const Vec<T> w = numbers(m + v), y = numbers(g + v), here = w * y;
    const Vec<T> probability = numbers(f.p + v);
    reference += here;
    overlap += here * probability;
    predicted += w * probability;
    if (kLogs) losses += product<T>(here, numbers(f.loss + v));
    if (kRests) rests += product<T>(w * (T(1) - y), numbers(f.loss_rest + v));
  };
  const int end = first + count;
  int v = first;
  for (; v + L <= end; v += L) add(v, [](const T* row) { return load<T>(row); });
  if (v < end) {
    const IVec<T> left = first_lanes<T>(end - v);
    add(v, [&](const T* row) { return keep<T>(left, load<T>(row)); });
  }
  return {total<T>(reference), total<T>(overlap), total<T>(predicted), total<T>(losses),
          total<T>(rests)};
}

// The sums that `class_totals` computes, and those that `apply_general` differentiates together.
constexpr uint32_t kTotals = fastloss::kReference | fastloss::kOverlap | fastloss::kPredicted |
                             fastloss::kCrossEntropy | fastloss::kCrossEntropyRest;
constexpr uint32_t kTogether = kTotals | fastloss::kPredictedSquared | fastloss::kReferenceSquared |
                               fastloss::kUniform | fastloss::kUniformRest;

// Whether a sum is one of these named sums, without a field.
inline bool is_among(const Sum& sum, uint32_t named) {
  return sum.field < 0 && (fastloss::name_of(sum) & named) != 0;
}

// A row of m · weight · field for class c, written to `to` or in place.
template <class T>
const T* weight_row(Tile<T>& t, const Sum& sum, int64_t c, const T* g, T* to) {
  constexpr int L = lanes<T>;
  const T* m = t.row(kWeight);
  if (sum.weight == Weight::one && sum.field < 0) return m;
  auto fill = [&](auto weight) {
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(to + v, weight(load<T>(m + v), load<T>(g + v)));
  };
  if (sum.weight == Weight::one) fill([](Vec<T> w, Vec<T>) { return w; });
  if (sum.weight == Weight::target) fill([](Vec<T> w, Vec<T> y) { return w * y; });
  if (sum.weight == Weight::rest) fill([](Vec<T> w, Vec<T> y) { return w * (T(1) - y); });
  if (sum.weight == Weight::target_squared) fill([](Vec<T> w, Vec<T> y) { return w * (y * y); });
  if (sum.field >= 0) {
    const T* field = t.field_row(sum.field, c);
    for (int64_t v = 0, end = t.padded; v < end; v += L)
      store<T>(to + v, product<T>(load<T>(to + v), load<T>(field + v)));
  }
  return to;
}

// Calls use(term) with term(v), the summands of a sum for a vector of voxels of class c.
template <class T, class Use>
void with_summands(Tile<T>& t, const Sum& sum, int64_t c, const T* g, const Fields<T>& f,
                   const Use& use) {
  const T* w = weight_row(t, sum, c, g, t.row(kF));
  const T parameter = T(sum.parameter);
  with_function(sum.function, [&](auto function) {
    using F = decltype(function);
    use([=](int64_t v) {
      return product_of_both<T>(load<T>(w + v),
                                F::template value<Mathematics<T>>(f.at(v, g), parameter));
    });
  });
}

// The rows that the functions of a table read.
inline Wanted wanted_for_values(const Job& job) {
  Wanted wanted;
  for (int32_t i = 0; i < job.slots.count; ++i) {
    const Function f = job.sums[i].function;
    wanted.logs |= reads_log(f);
    wanted.log_rests |= reads_log_rest(f);
    wanted.rests |= reads_rest(f) || reads_log_rest(f);
  }
  return wanted;
}

// Where a map stores a tile: one number per voxel, or that of class c.
template <class N, class T>
N* map_row(Tile<T>& t, int64_t c = -1) {
  const Job& job = t.job;
  const int64_t row = c < 0 ? t.sample : t.sample * job.classes + c;
  return (N*)job.map_out + row * job.voxels + t.voxel;
}

// Adds a tile to the sums of its block, (rows, S + 1, C) and (rows,), and to tallies of errors,
// unless they are null, and writes its part of a map, if one is requested.
template <class T>
void reduce_general(Tile<T>& t, double* sums, double* weights, uint64_t* tallies) {
  constexpr int L = lanes<T>;
  const Job& job = t.job;
  const auto& s = job.slots;
  const int64_t classes = job.classes, per_row = (s.count + 1) * classes;
  const int n = t.padded;
  const bool maps = job.map == MapKind::voxel || job.map == MapKind::of_class;
  Wanted wanted = job.map == MapKind::error ? Wanted() : wanted_for_values(job);
  wanted.rests |= tallies != nullptr;
  begin_general(t, wanted.logs || wanted.rests);
  t.load_fields();
  T *m = t.row(kWeight), *g = t.row(kE), *each = t.row(kG), *mapped = t.row(kH);

  // Adds a row of numbers to the accumulators of its voxels' regions.
  auto by_region = [&](const T* numbers, double* to, int64_t step) {
    t.each_stretch([&](int64_t row, int first, int count) {
      to[row * step] += sum_run<T>(first, count, [&](int v) { return load<T>(numbers + v); });
    });
  };
  if (weights) {
    if (job.regions_by_class) t.find_regions_of(0);
    if (job.regions) by_region(m, weights, 1);
    else *weights += sum_row<T>(n, [&](int v) { return load<T>(m + v); });
  }
  if (job.map == MapKind::voxel) std::memset(mapped, 0, sizeof(T) * kMaxTile);

  for (int64_t c = 0; c < classes; ++c) {
    const Fields<T> f = activate_row(t, c, wanted);
    t.load_target(c, g);
    if (sums && job.regions_by_class && c > 0) t.find_regions_of(c);
    if (sums) {
      const bool logs = s.cross_entropy >= 0, rests = s.cross_entropy_rest >= 0;
      const auto of_class =
          logs ? (rests ? class_totals<T, true, true> : class_totals<T, true, false>)
               : (rests ? class_totals<T, false, true> : class_totals<T, false, false>);
      const auto add_totals = [&](int64_t row, int first, int count) {
        const ClassTotals sum = of_class(first, count, m, g, f);
        const auto add = [&](int slot, double number) {
          if (slot >= 0) sums[row * per_row + slot * classes + c] += number;
        };
        add(s.reference, sum.reference);
        add(s.overlap, sum.overlap);
        add(s.predicted, sum.predicted);
        add(s.cross_entropy, sum.loss);
        add(s.cross_entropy_rest, sum.loss_rest);
      };
      if (job.regions) t.each_stretch(add_totals);
      else add_totals(0, 0, n);
    }
    if (job.map == MapKind::of_class) std::memset(mapped, 0, sizeof(T) * kMaxTile);
    for (int32_t i = 0; i < s.count && job.map != MapKind::error; ++i) {
      const bool summed = sums && !is_among(job.sums[i], kTotals);
      if (!summed && !maps) continue;
      with_summands(t, job.sums[i], c, g, f, [&](const auto& term) {
        if (summed && !job.regions) {
          sums[i * classes + c] += sum_row<T>(n, term);
        } else if (summed) {
          for (int v = 0; v < n; v += L) store<T>(each + v, term(v));
          by_region(each, sums + i * classes + c, per_row);
        }
        if (!maps) return;
        const Vec<T> k = splat<T>(T(job.map_coefficients[i * classes + c]));
        for (int v = 0; v < n; v += L)
          store<T>(mapped + v, load<T>(mapped + v) + product<T>(k, term(v)));
      });
    }
    if (tallies) tally_errors(t, c, f.p, f.q, g, tallies);
    if (job.map == MapKind::error)
      for (int v = 0; v < n; v += L)
        store<T>(mapped + v, load<T>(m + v) * absolute<T>(load<T>(g + v) - load<T>(f.p + v)));
    if (job.map == MapKind::of_class || job.map == MapKind::error)
      std::memcpy(map_row<T>(t, c), mapped, sizeof(T) * size_t(t.n));
  }
  if (job.map == MapKind::voxel) std::memcpy(map_row<T>(t), mapped, sizeof(T) * size_t(t.n));
}

// The class of the largest logit of every voxel, the first of equal ones or the first NaN; for a
// single class, whether p > ½.
template <class T>
void label_map(Tile<T>& t) {
  t.holes = false;  // voxels of weight 0 get a label too
  const auto write = [&](const auto* found) {
    const auto as = [&](auto number) {
      auto* to = map_row<decltype(number)>(t);
      for (int v = 0; v < t.n; ++v) to[v] = decltype(number)(found[v]);
    };
    if (t.job.map_dtype == DType::u8) as(uint8_t());
    else if (t.job.map_dtype == DType::u16) as(uint16_t());
    else if (t.job.map_dtype == DType::i32) as(int32_t());
    else as(int64_t());
  };
  if (t.job.classes > 1) return write(likeliest(t));
  t.load_logits();
  const bool given = t.job.activation == Activation::none;
  const bool certain = t.job.activation == Activation::softmax;
  uint8_t found[kMaxTile];
  for (int v = 0; v < t.n; ++v) found[v] = certain ? t.x[v] == t.x[v] : t.x[v] > T(given ? 0.5 : 0);
  write(found);
}

// Whether p > ½, for every class of the voxels that count; 0 for those that do not.
template <class T>
void mask_map(Tile<T>& t) {
  begin_general(t, false);
  const T* m = t.row(kWeight);
  for (int64_t c = 0; c < t.job.classes; ++c) {
    if (t.job.dense) t.load_target(c, t.row(kE));  // which finds bad numbers
    const T* p = activate_row(t, c, Wanted()).p;
    auto* to = map_row<uint8_t>(t, c);
    for (int v = 0; v < t.n; ++v) to[v] = uint8_t((p[v] > T(0.5)) & (m[v] > T(0)));
  }
}

// The derivatives by the common sums of one class: those of a sample, or of a region.
template <class T>
struct CommonSlopes {
  T overlap = 0, predicted = 0, squared = 0, loss = 0, loss_rest = 0, uniform = 0, uniform_rest = 0;

  CommonSlopes() = default;
  // number(slot) is that by a sum; those of log q are left out for softmax.
  template <class Number>
  CommonSlopes(const fastloss::Slots& s, bool softmax, const Number& number) {
    const auto k = [&](int slot) { return slot >= 0 ? number(slot) : T(0); };
    overlap = k(s.overlap), predicted = k(s.predicted), squared = 2 * k(s.predicted_squared);
    loss = k(s.cross_entropy), uniform = k(s.uniform);
    if (!softmax) loss_rest = k(s.cross_entropy_rest), uniform_rest = k(s.uniform_rest);
  }

  // By p, log p and log q, for voxels of these weights and targets.
  FL_INLINE Vec<T> by_p(Vec<T> m, Vec<T> g, Vec<T> p) const {
    return m * (overlap * g + predicted + squared * p);
  }
  FL_INLINE Vec<T> by_log(Vec<T> m, Vec<T> g) const { return -(m * (loss * g + uniform)); }
  FL_INLINE Vec<T> by_rest(Vec<T> m, Vec<T> g) const {
    return -(m * (loss_rest * (T(1) - g) + uniform_rest));
  }
};

template <class T>
void apply_general(Tile<T>& t) {
  constexpr int L = lanes<T>;
  const Job& job = t.job;
  const auto& s = job.slots;
  const int64_t classes = job.classes;
  const bool softmax = job.activation == Activation::softmax;
  const bool sigmoid = job.activation == Activation::sigmoid;
  // The common sums are differentiated together; for softmax, none of them is of log q.
  const uint32_t of_log_q = fastloss::kCrossEntropyRest | fastloss::kUniformRest;
  const uint32_t together = softmax ? kTogether & ~of_log_q : kTogether;
  Wanted wanted;
  bool others = false, by_log_q = sigmoid;
  for (int32_t i = 0; i < s.count; ++i) {
    const Sum& sum = job.sums[i];
    if (sum.function == Function::one || is_among(sum, together)) continue;
    others = true;
    with_function(sum.function, [&](auto f) { by_log_q |= decltype(f)::by == By::log_q; });
    wanted.logs |= sum.function == Function::focal || sum.function == Function::log_power;
    by_log_q |= sum.function == Function::log_power;
    wanted.log_rests |= sum.function == Function::focal_rest;
    wanted.rests |= sum.function != Function::p && sum.function != Function::p_squared &&
                    sum.function != Function::log && sum.function != Function::log_ratio;
  }
  if (job.histograms) others = wanted.rests = true;
  by_log_q |=
      job.activation == Activation::none && (s.cross_entropy_rest >= 0 || s.uniform_rest >= 0);
  begin_general(t, wanted.logs || wanted.rests);
  t.load_fields();
  T *m = t.row(kWeight), *g = t.row(kE), *by_p = t.row(kG);
  T *by_log = t.row(kLabelExp), *by_rest = t.row(kLabelGap), *sum = t.row(kDotOfMany);
  T *coefficients = t.row(kH), *at_most = t.row(kI), *ratios = t.row(kJ);
  if (softmax) {
    if (by_log_q) {
      std::memset(at_most, 0, sizeof(T) * kMaxTile);
      std::memset(ratios, 0, sizeof(T) * kMaxTile);
    }
    std::memset(sum, 0, sizeof(T) * kMaxTile);
    std::memset(t.row(kSumOfMany), 0, sizeof(T) * kMaxTile);
  }
  // Without other sums the derivatives need no rows.
  const bool joined = softmax && !others && !job.regions;
  auto at = [&](const T* r, int64_t v) { return load<T>(r + v); };

  for (int64_t c = 0; c < classes; ++c) {
    const Fields<T> f = activate_row(t, c, wanted);
    t.load_target(c, g);
    if (job.regions_by_class) t.find_regions_of(c);
    const auto slopes_of = [&](const auto& number) { return CommonSlopes<T>(s, softmax, number); };
    CommonSlopes<T> common;
    if (!job.regions) common = slopes_of([&](int slot) { return t.table[slot * classes + c]; });
    auto slope = [&](int64_t v) { return common.by_p(at(m, v), at(g, v), at(f.p, v)); };
    auto log_slope = [&](int64_t v) { return common.by_log(at(m, v), at(g, v)); };
    // Stores the slopes of a stretch of voxels.
    const auto put_slopes = [&](int first, int end) {
      for (int v = first; v < end; v += L) {
        const auto put = [&](T* row, Vec<T> value) {
          if (v + L <= end) store<T>(row + v, value);
          else std::memcpy(row + v, &value, sizeof(T) * size_t(end - v));
        };
        put(by_p, slope(v));
        put(by_log, log_slope(v));
        if (by_log_q) put(by_rest, common.by_rest(at(m, v), at(g, v)));
      }
    };
    if (job.regions) {
      for (int i = 0; i < t.runs; ++i) {
        const int first = t.run_start[i];
        const int64_t row = t.region[first];
        common = CommonSlopes<T>();
        if (row >= 0)
          common =
              slopes_of([&](int slot) { return T(job.coefficients_of(slot, t.sample, row)[c]); });
        put_slopes(first, i + 1 < t.runs ? t.run_start[i + 1] : t.padded);
      }
    } else if (!joined) {
      put_slopes(0, t.padded);
    }
    for (int32_t i = 0; i < s.count && others; ++i) {
      const Sum& one = job.sums[i];
      if (one.function == Function::one || is_among(one, together)) continue;
      const T* w = weight_row(t, one, c, g, t.row(kF));
      if (job.regions) {
        std::memset(coefficients, 0, sizeof(T) * kMaxTile);
        t.each_stretch([&](int64_t row, int first, int count) {
          const T number = T(job.coefficients_of(i, t.sample, row)[c]);
          for (int v = first; v < first + count; ++v) coefficients[v] = number;
        });
      } else {
        const Vec<T> number = splat<T>(t.table[i * classes + c]);
        for (int64_t v = 0, end = t.padded; v < end; v += L) store<T>(coefficients + v, number);
      }
      with_function(one.function, [&](auto function) {
        using F = decltype(function);
        T* to = F::by == By::p ? by_p : F::by == By::log_p ? by_log : by_rest;
        const bool steep = std::is_same<F, FunctionOf<Function::log_power>>::value;
        for (int64_t v = 0, end = t.padded; v < end; v += L) {
          Vec<T> change = F::template slope<Mathematics<T>>(f.at(v, g), T(one.parameter));
          change = product<T>(at(coefficients, v) * at(w, v), change);
          if (steep) {
            // Near p = 1 it grows without bound, and t_c − p_c t_c would cancel: there it is taken
            // by log q, which is −q/p times as much.
            const Vec<T> p = at(f.p, v);
            const IVec<T> most = p > T(0.5);
            const Vec<T> moved = -(change * at(f.q, v) / p);
            store<T>(by_rest + v, at(by_rest, v) + select<T>(most, moved, splat<T>(0)));
            change = drop<T>(most, change);
          }
          store<T>(to + v, at(to, v) + change);
        }
      });
    }
    if (job.histograms) differentiate_errors(t, c, f.p, f.q, g, by_p, by_log, by_rest);
    T* x = t.x + c * t.stride;
    if (softmax) {
      // t_c, the derivative by log p_c, replaces largest − x in `second`.
      T* turn = t.second + c * t.stride;
      auto take = [&](int64_t v, Vec<T> value) {
        store<T>(turn + v, value);
        store<T>(sum + v, at(sum, v) + value);
        store<T>(x + v, at(f.p, v));
      };
      if (joined)
        for (int64_t v = 0, end = t.padded; v < end; v += L)
          take(v, slope(v) * at(f.p, v) + log_slope(v));
      else if (by_log_q)
        for (int64_t v = 0, end = t.padded; v < end; v += L) {
          const Vec<T> p = at(f.p, v), through = at(by_rest, v) * p, ratio = through / at(f.q, v);
          const IVec<T> most = p > T(0.5);
          store<T>(at_most + v, select<T>(most, through, at(at_most, v)));
          store<T>(ratios + v, select<T>(most, ratio, at(ratios, v)));
          take(v, at(by_p, v) * p + at(by_log, v) - drop<T>(most, ratio));
        }
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
        Vec<T> h = at(by_log, v), d = at(by_p, v) + drop<T>(h == T(0), h / at(f.p, v));
        if (by_log_q) {
          h = at(by_rest, v);
          d -= drop<T>(h == T(0), h / at(f.q, v));
        }
        store<T>(x + v, d);
      }
    }
  }
  if (softmax) t.add_row(t.row(kSumOfMany), sum);
  write_rows(t, t.x, t.second, [&](const auto& row, const auto& put) {
    for (int64_t c = 0; c < classes; ++c) {
      const T *x = t.x + c * t.stride, *turn = t.second + c * t.stride;
      auto to = row(c);
      if (softmax && by_log_q)
        for (int64_t v = 0, end = t.padded; v < end; v += L) {
          const Vec<T> p = at(x, v), change = select<T>(p > T(0.5), -at(at_most, v),
                                                        drop<T>(p == T(0), p * at(ratios, v)));
          put(to + v, at(turn, v) - p * at(sum, v) + change);
        }
      else if (softmax)
        for (int64_t v = 0, end = t.padded; v < end; v += L)
          put(to + v, at(turn, v) - at(x, v) * at(sum, v));
      else
        for (int64_t v = 0, end = t.padded; v < end; v += L) put(to + v, at(x, v));
    }
  });
}

}  // namespace
