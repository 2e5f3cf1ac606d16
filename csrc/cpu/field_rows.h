// Loops of softmax with a label map over a field φ of one number for each class, which Σ φ p reads.
#pragma once

#include "label_rows.h"

namespace {

// The numbers of R classes. `kFetches`: rows ahead are prefetched.
template <class S, class T, int R, bool kFetches>
struct FieldRows {
  const S *phi[R], *soon[R];

  FL_INLINE FieldRows(const typename Tile<T>::ClassField& field, int64_t c) {
    for (int r = 0; r < R; ++r) {
      phi[r] = field.template row<S>(c + r);
      soon[r] = field.in_place() ? field.template row_ahead<S>(c + r + kAhead) : phi[r];
    }
  }
  FL_INLINE Vec<T> at(int r, int64_t v) const { return load_as<S, T>(phi[r] + v); }
  template <int kVoxels>
  FL_INLINE void fetch(int64_t first) const {
    if (kFetches)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) prefetch_lines<kVoxels* int(sizeof(S))>(soon[r] + first);
  }
};

// Adds up m φ p of R classes; the row kA holds m / Σe.
template <class S, class T, int R>
struct FieldSumRows {
  static constexpr int L = lanes<T>;
  const T *x[R], *scale;
  const FieldRows<S, T, R, true> phi;
  Vec<T> sum[R] = {};

  FL_INLINE FieldSumRows(Tile<T>& t, const typename Tile<T>::ClassField& field, int64_t c)
      : scale(t.row(kA)), phi(field, c) {
    for (int r = 0; r < R; ++r) x[r] = t.x + (c + r) * t.stride;
  }
  template <int N>
  FL_INLINE void step(int64_t first) {
    phi.template fetch<N * L>(first);
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
      const int64_t v = first + u * L;
      const Vec<T> k = once(load<T>(scale + v));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] += once(load<T>(x[r] + v) * k) * phi.at(r, v);
    }
  }
  FL_INLINE void finish() {}
};

// `SumRows` that also adds Σ m φ p to `sums`.
template <class S, class T, int R, bool kPresent>
struct SumRowsWithField {
  static constexpr int L = lanes<T>;
  SumRows<T, R, kPresent> rows;
  FieldSumRows<S, T, R> field;
  double* to;

  template <int N>
  FL_INLINE void step(int64_t first) {
    rows.template step<N>(first);
    field.template step<N>(first);
  }
  FL_INLINE void finish() {
    rows.finish();
    for (int r = 0; r < R; ++r) to[r] += total<T>(field.sum[r]);
  }
};

// Derivatives by p of R classes, k_c + f_c φ_c.
template <class S, class T, int R, bool kFetches>
struct FieldSlopes {
  static constexpr bool kVaries = true;
  Vec<T> k[R], by_field[R];
  const FieldRows<S, T, R, kFetches> phi;

  FL_INLINE FieldSlopes(const typename Tile<T>::ClassField& field, int64_t c, const T* slopes,
                        const T* coefficient)
      : phi(field, c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      k[r] = splat<T>(slopes ? slopes[c + r] : T(0));
      by_field[r] = splat<T>(coefficient[c + r]);
    }
  }
  FL_INLINE Vec<T> at(int r, int64_t v) const { return k[r] + by_field[r] * phi.at(r, v); }
  template <int kVoxels>
  FL_INLINE void fetch(int64_t first) const {
    phi.template fetch<kVoxels>(first);
  }
};

}  // namespace
