// Loops of softmax with a label map over a field φ of one number for each class, which Σ φ p reads.
#pragma once

#include "label_rows.h"

namespace {

// Adds up m φ p of R classes; the row kA holds m / Σe.
template <class S, class T, int R>
struct FieldSumRows {
  static constexpr int L = lanes<T>;
  const T *x[R], *scale;
  const S *phi[R], *soon[R];
  Vec<T> sum[R] = {};

  FL_INLINE FieldSumRows(Tile<T>& t, const typename Tile<T>::ClassField& field, int64_t c) {
    scale = t.row(kA);
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      phi[r] = field.template row<S>(c + r);
      soon[r] = field.row_ahead(phi[r]);
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) prefetch_lines_far<N * L* int(sizeof(S))>(soon[r] + first);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      const Vec<T> k = once(load<T>(scale + v));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] += (load<T>(x[r] + v) * k) * load_as<S, T>(phi[r] + v);
    }
  }
  FL_INLINE void finish() {}
};

// Adds f φ p of R classes to `few`, but where the class is the label f φ to `own`.
template <class S, class T, int R, bool kPresent>
struct FieldSlopeRows {
  static constexpr int L = lanes<T>;
  const T *x[R], *inverse;
  const S *phi[R], *soon[R];
  T *few, *own;
  const typename Types<T>::Int* label;
  Vec<T> factor[R];
  IVec<T> number[R];

  FL_INLINE FieldSlopeRows(Tile<T>& t, const typename Tile<T>::ClassField& field, int64_t c,
                           const T* by_field, T* sum, T* at_label)
      : inverse(t.row(kInverse)), few(sum), own(at_label), label(t.labels()) {
    for (int r = 0; r < R; ++r) {
      x[r] = t.x + (c + r) * t.stride;
      phi[r] = field.template row<S>(c + r);
      soon[r] = field.row_ahead(phi[r]);
      factor[r] = splat<T>(by_field[c + r]);
      number[r] = class_number<T>(c + r);
    }
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) prefetch_lines_far<N * L* int(sizeof(S))>(soon[r] + first);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      const Vec<T> i = once(load<T>(inverse + v));
      Vec<T> all = load<T>(few + v), mine;
      IVec<T> y;
      if (kPresent) mine = load<T>(own + v), y = label_lanes<T>(label + v);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<T> slope = factor[r] * load_as<S, T>(phi[r] + v);
        const Vec<T> part = slope * (load<T>(x[r] + v) * i);
        if (kPresent) {
          const IVec<T> is_label = y == number[r];
          all += drop<T>(is_label, part);
          mine += keep<T>(is_label, slope);
        } else {
          all += part;
        }
      }
      store<T>(few + v, all);
      if (kPresent) store<T>(own + v, mine);
    }
  }
  FL_INLINE void finish() {}
};

// For `GradientRows`: k_c + f_c φ_c.
template <class S, class T, int R>
struct FieldSlopes {
  Vec<T> k[R], by_field[R];
  const S* phi[R];

  FL_INLINE FieldSlopes(const typename Tile<T>::ClassField& field, int64_t c, const T* slopes,
                        const T* coefficient) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      k[r] = splat<T>(slopes ? slopes[c + r] : T(0));
      by_field[r] = splat<T>(coefficient[c + r]);
      phi[r] = field.template row<S>(c + r);
    }
  }
  FL_INLINE Vec<T> at(int r, int64_t v) const {
    return k[r] + by_field[r] * load_as<S, T>(phi[r] + v);
  }
};

}  // namespace
