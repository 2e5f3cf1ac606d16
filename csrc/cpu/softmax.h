// Softmax for any target: the exponentials of a tile.
#pragma once

#include "tile.h"

namespace {

// Loads the logits to x and their maximum to a row. Where the maximum is infinite, x becomes 0 for
// the classes at the maximum and −∞ for other numbers.
template <class T>
void load_and_maximum(Tile<T>& t) {
  constexpr int L = lanes<T>;
  T* largest = t.row(kLargest);
  int64_t classes = t.job.classes;
  bool direct = t.contiguous() && item_size(t.job.logits.dtype) == int(sizeof(T));
  if (direct) {
    for (int64_t c = 0; c < classes; c += 2) {
      const T *from = t.source_row(c), *next = t.source_row(c + 1 < classes ? c + 1 : c);
      const T* before = c ? largest : from;
      T *to = t.x + c * t.stride, *to_next = c + 1 < classes ? to + t.stride : to;
      // The hardware prefetcher follows each row but cannot guess where the next one starts.
      const T *soon = t.row_ahead(c + kAhead), *soon_next = t.row_ahead(c + kAhead + 1);
      prefetch(soon + t.padded - 1);  // one line more where rows are not aligned to lines
      prefetch(soon_next + t.padded - 1);
      for (int64_t v = 0, end = t.padded; v < end; v += L) {
        if (v % (64 / int(sizeof(T))) == 0) {
          prefetch(soon + v);
          prefetch(soon_next + v);
        }
        Vec<T> a = load<T>(from + v), b = load<T>(next + v);
        store<T>(to + v, a);
        store<T>(to_next + v, b);
        store<T>(largest + v, larger(b, larger(a, load<T>(before + v))));
      }
    }
  } else {
    t.load_logits();
    std::memcpy(largest, t.x, sizeof(T) * size_t(t.padded));
    for (int64_t c = 1; c < classes; ++c)
      for (int64_t v = 0, end = t.padded; v < end; v += L)
        store<T>(largest + v, larger(load<T>(t.x + c * t.stride + v), load<T>(largest + v)));
  }
  IVec<T> infinite{};
  for (int64_t v = 0, end = t.padded; v < end; v += L)
    infinite |= absolute<T>(load<T>(largest + v)) == T(INFINITY);
  if (any<T>(infinite)) {
    // Classes that share an infinite maximum share the probability; the others have none.
    for (int64_t v = 0, end = t.padded; v < end; ++v) {
      T most = largest[v];
      if (!(std::fabs(most) == T(INFINITY))) continue;
      for (int64_t c = 0; c < classes; ++c) {
        T& x = t.x[c * t.stride + v];
        x = x == most ? T(0) : x == x ? T(-INFINITY) : x;
      }
      largest[v] = T(0);
    }
  }
}

// As `exponentials`, for U vectors of voxels from v on, whose sums stay in registers.
template <bool kGaps, int U, class T, class Ahead>
FL_INLINE void exponential_columns(Tile<T>& t, int v, const Ahead& ahead) {
  constexpr int L = lanes<T>;
  int64_t classes = t.job.classes;
  Vec<T> largest[U], rest[U] = {};
  IVec<T> ties[U] = {};  // −(number of classes at the maximum)
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) largest[u] = load<T>(t.row(kLargest) + v + u * L);
  // Many classes are summed in groups of a few, which bounds the rounding error.
  for (int64_t first = 0; first < classes; first += kFewClasses) {
    int64_t last = first + kFewClasses < classes ? first + kFewClasses : classes;
    Vec<T> few[U] = {};
    T *x = t.x + first * t.stride + v, *gaps = t.second + first * t.stride + v;
    for (int64_t c = first; c < last; ++c, x += t.stride, gaps += t.stride) {
      ahead(c, v, std::integral_constant<int, U>{});
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        Vec<T> d = load<T>(x + u * L) - largest[u];
        Vec<T> e = exponential<T>(d);
        IVec<T> top = d == T(0);
        store<T>(x + u * L, e);
        if (kGaps) store<T>(gaps + u * L, -d);
        // Without its largest member the sum is exact where one class dominates, and so are
        // 1 − p = rest / (1 + rest) and −log p = log(1 + rest).
        few[u] += drop<T>(top, e);
        ties[u] += top;
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) rest[u] += few[u];
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    Vec<T> tied = from_bits<T>(Numbers<T>::round_bits - ties[u]) - Numbers<T>::round;
    store<T>(t.row(kInverse) + v + u * L, T(1) / (rest[u] + tied));
    store<T>(t.row(kRest) + v + u * L, rest[u] + (tied - T(1)));
  }
}

// x becomes e^(x−largest). Writes rows of 1 / Σe and of rest = Σe − 1, the sum without one of the
// largest. With `kGaps` second becomes largest − x, and −log p = gap + log(1 + rest).
// `ahead(c, v, U)` is called before U vectors of class c, from the voxel v on.
template <bool kGaps, class T, class Ahead>
void exponentials(Tile<T>& t, const Ahead& ahead) {
  constexpr int L = lanes<T>, U = kVectorBytes < 32 ? 4 : 2;
  int v = 0;
  for (; v + U * L <= t.padded; v += U * L) exponential_columns<kGaps, U>(t, v, ahead);
  for (; v < t.padded; v += L) exponential_columns<kGaps, 1>(t, v, ahead);
}

// 1 − p from the results of `exponentials`, where `gap` is largest − x: rest / Σe at the largest,
// and (Σe − e) / Σe elsewhere.
template <class T>
FL_INLINE Vec<T> complement(Vec<T> e, Vec<T> gap, Vec<T> rest, Vec<T> inverse) {
  return select<T>(gap == T(0), rest, (rest + T(1)) - e) * inverse;
}

}  // namespace
