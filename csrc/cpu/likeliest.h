// The class of the largest logit of every voxel of a tile.
#pragma once

#include "tile.h"
#include "vec.h"

namespace {

// How many classes are compared before the largest so far is stored again.
constexpr int kRowsAtOnce = 4;

// Lets `most` and `found` be those of class c where its numbers are larger. NaN is larger than all
// numbers, and nothing is larger than NaN.
template <class T>
FL_INLINE void take_larger(Vec<T> x, int64_t c, Vec<T>& most, IVec<T>& found) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)most, (__m512)most, _CMP_ORD_Q);
    const __mmask16 above = _mm512_mask_cmp_ps_mask(number, (__m512)x, (__m512)most, _CMP_NLE_UQ);
    most = (Vec<T>)_mm512_mask_mov_ps((__m512)most, above, (__m512)x);
    found = (IVec<T>)_mm512_mask_mov_epi32((__m512i)found, above, _mm512_set1_epi32(int(c)));
    return;
  }
#endif
  const IVec<T> above = ~(IVec<T>)(x <= most) & (IVec<T>)(most == most);
  most = above ? x : most;
  found = above ? class_number<T>(c) : found;
}

// Writes the index of the largest of the rows, of which row(c) is the first number of type S, to
// `found`; whole vectors. ahead(c): a row that is read soon, to be prefetched, or null.
template <class S, class T, class Row, class Ahead>
FL_INLINE void find_largest(int64_t classes, int padded, const Row& row, const Ahead& ahead,
                            T* most, typename Types<T>::Int* found) {
  constexpr int L = lanes<T>;
  const auto take = [&](int64_t c, auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    const S *from[kCount], *next[kCount];
    for (int i = 0; i < kCount; ++i) {
      from[i] = row(c + i);
      next[i] = ahead(c + i);
    }
    for (int v = 0; v < padded; v += L) {
      Vec<T> largest = c ? load<T>(most + v) : load_as<S, T>(from[0] + v);
      IVec<T> which{};
      if (c) which = label_lanes<T>(found + v);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        if (next[i]) prefetch(next[i] + v);
        if (i > 0 || c > 0) take_larger<T>(load_as<S, T>(from[i] + v), c + i, largest, which);
      }
      store<T>(most + v, largest);
      std::memcpy(found + v, &which, sizeof which);
    }
  };
  int64_t c = 0;
  for (; c + kRowsAtOnce <= classes; c += kRowsAtOnce)
    take(c, std::integral_constant<int, kRowsAtOnce>{});
  for (; c < classes; ++c) take(c, std::integral_constant<int, 1>{});
}

// The classes of the largest logits of a tile, the first of equal ones or the first NaN.
template <class T>
const typename Types<T>::Int* likeliest(Tile<T>& t) {
  using Int = typename Types<T>::Int;
  T* most = t.row(kA);
  Int* found = (Int*)t.row(kB);
  const int64_t classes = t.job.classes;
  if (t.contiguous()) {
    with_storage<T>(t.job.logits.dtype, [&](auto number) {
      using S = decltype(number);
      find_largest<S, T>(
          classes, t.padded, [&](int64_t c) { return t.template source_row<S>(c); },
          [&](int64_t c) { return t.template row_ahead<S>(c + kRowsAtOnce); }, most, found);
    });
  } else {
    t.load_logits();
    find_largest<T, T>(
        classes, t.padded, [&](int64_t c) { return t.x + c * t.stride; },
        [](int64_t) -> const T* { return nullptr; }, most, found);
  }
  return found;
}

}  // namespace
