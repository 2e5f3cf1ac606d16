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

// Derivatives by p of R classes, k_c + f_c φ_c. `kAhead`: the field's next tile is prefetched.
template <class S, class T, int R, bool kAhead>
struct FieldSlopes {
  static constexpr bool kVaries = true;
  Vec<T> k[R], by_field[R];
  const S *phi[R], *soon[R];

  FL_INLINE FieldSlopes(const typename Tile<T>::ClassField& field, int64_t c, const T* slopes,
                        const T* coefficient) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      k[r] = splat<T>(slopes ? slopes[c + r] : T(0));
      by_field[r] = splat<T>(coefficient[c + r]);
      phi[r] = field.template row<S>(c + r);
      soon[r] = field.row_ahead(phi[r]);
    }
  }
  FL_INLINE Vec<T> at(int r, int64_t v) const {
    return k[r] + by_field[r] * load_as<S, T>(phi[r] + v);
  }
  template <int kVoxels>
  FL_INLINE void fetch(int64_t first) const {
    if (kAhead)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) prefetch_lines_far<kVoxels* int(sizeof(S))>(soon[r] + first);
  }
};

}  // namespace
