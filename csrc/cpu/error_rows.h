// The errors of the voxels of a tile: counted in bins, and differentiated.
#pragma once

#include <cstring>

#include "errors.h"
#include "tile.h"

namespace {

using fastloss::ErrorKind;

// Rows of float numbers and masks of a tile.
using IntRow = int32_t[kMaxTile];
using FloatRow = float[kMaxTile];

// The bin of every voxel of a class, d, and the derivative of v by p, or by the logit. Voxels of
// weight 0 have the place behind all bins.
struct Binned {
  alignas(64) IntRow place;
  alignas(64) IntRow rest;
  alignas(64) FloatRow slope;
};

// Of errors |g − p|, how far they are from 0 and from 1; of a hinge's, `error` alone. Masks: −1, 0.
struct Errors {
  alignas(64) FloatRow error;
  alignas(64) FloatRow others;
  alignas(64) IntRow foreground;
  alignas(64) IntRow counts;
};

FL_INLINE void store_lanes(int32_t* p, IVec<float> v) { std::memcpy(p, &v, sizeof v); }

// The errors of a class from rows of p and q, or for a hinge of the logit x; g and m.
template <class T>
FL_INLINE void find_errors(ErrorKind kind, int padded, const T* p, const T* q, const T* x,
                           const T* g, const T* m, Errors& to) {
  const bool hinge = kind == ErrorKind::hinge;
  if constexpr (sizeof(T) == 4) {
    constexpr int L = lanes<float>;
    for (int v = 0; v < padded; v += L) {
      const IVec<float> foreground = load<float>(g + v) > 0.5f;
      store_lanes(to.foreground + v, foreground);
      store_lanes(to.counts + v, load<float>(m + v) > 0.f);
      if (hinge) {
        const Vec<float> logit = load<float>(x + v);
        store<float>(to.error + v, select<float>(foreground, -logit, logit) + 1.f);
      } else {
        const Vec<float> a = load<float>(p + v), b = load<float>(q + v);
        store<float>(to.error + v, select<float>(foreground, b, a));
        store<float>(to.others + v, select<float>(foreground, a, b));
      }
    }
  } else {
    // Rows of float are read in vectors of twice as many numbers.
    std::memset(&to, 0, sizeof to);
    for (int v = 0; v < padded; ++v) {
      const bool foreground = g[v] > T(0.5);
      to.foreground[v] = -int32_t(foreground);
      to.counts[v] = -int32_t(m[v] > T(0));
      to.error[v] = float(hinge ? T(1) + (foreground ? -x[v] : x[v]) : foreground ? q[v] : p[v]);
      to.others[v] = float(foreground ? p[v] : q[v]);
    }
  }
}

template <class T>
void find_bins(ErrorKind kind, int padded, const T* p, const T* q, const T* x, const T* g,
               const T* m, Binned& to) {
  constexpr int L = lanes<float>;
  Errors from;
  find_errors(kind, padded, p, q, x, g, m, from);
  const int32_t bins = fastloss::bins_of(kind);
  const Vec<float> one = splat<float>(1);
  for (int v = 0; v < padded; v += L) {
    const Vec<float> error = load<float>(from.error + v);
    const IVec<float> foreground = label_lanes<float>(from.foreground + v);
    IVec<float> at, rest;
    if (kind == ErrorKind::error) {
      const Vec<float> others = load<float>(from.others + v);
      const IVec<float> large = error > others;
      IVec<float> large_at, large_rest;
      fastloss::find_place(fastloss::kSmallErrors, bits<float>(error), at, rest);
      fastloss::find_place(fastloss::kLargeErrors, bits<float>(others), large_at, large_rest);
      at = large ? bins - 1 - large_at : at;
      rest = large ? large_rest : rest;
      store<float>(to.slope + v, select<float>(foreground == large, one, -one));
    } else {
      fastloss::find_place(fastloss::kHingeErrors, bits<float>(error), at, rest);
      store<float>(to.slope + v, select<float>(foreground, -one, one));
    }
    at += foreground & bins;
    at = label_lanes<float>(from.counts + v) ? at : IVec<float>{} + 2 * bins;
    store_lanes(to.place + v, at);
    store_lanes(to.rest + v, rest);
  }
}

// Where the numbers of class c and of a kind of error begin, of `words` numbers for each place;
// those of the kind behind the last are where the sample's end.
inline int64_t place_of_class(const Job& job, int kind, int64_t c, int words) {
  int64_t at = 0;
  for (int i = 0; i < kind; ++i) at += fastloss::tally_size(job.error_kinds[i]) * job.classes;
  if (c > 0) at += fastloss::tally_size(job.error_kinds[kind]) * c;
  return at * words;
}

// Counts the errors of class c of a tile.
template <class T>
void tally_errors(Tile<T>& t, int64_t c, const T* p, const T* q, const T* g, uint64_t* tallies) {
  const Job& job = t.job;
  const T* m = t.row(kWeight);
  Binned bins;
  for (int kind = 0; kind < job.histograms; ++kind) {
    find_bins(job.error_kinds[kind], t.padded, p, q, t.x + c * t.stride, g, m, bins);
    uint64_t* to = tallies + place_of_class(job, kind, c, job.weighted ? 2 : 1);
    if (!job.weighted) {
      constexpr uint64_t one = uint64_t(1) << fastloss::kCountShift;
      for (int v = 0; v < t.n; ++v) to[bins.place[v]] += one + uint64_t(bins.rest[v]);
      continue;
    }
    for (int v = 0; v < t.n; ++v) {
      const uint64_t weight = uint64_t(double(m[v]) * job.weight_scale + 0.5);
      uint64_t* here = to + 2 * int64_t(bins.place[v]);
      here[0] += weight;
      here[1] += weight * uint64_t(bins.rest[v]);
    }
  }
}

// Adds the derivative by the errors of class c to rows of those by p, or of a hinge by the logit
// x = log p − log q to those by log p and log q.
template <class T>
void differentiate_errors(Tile<T>& t, int64_t c, const T* p, const T* q, const T* g, T* by_p,
                          T* by_log, T* by_rest) {
  constexpr int L = lanes<T>;
  const Job& job = t.job;
  const T* m = t.row(kWeight);
  Binned bins;
  for (int kind = 0; kind < job.histograms; ++kind) {
    find_bins(job.error_kinds[kind], t.padded, p, q, t.x + c * t.stride, g, m, bins);
    const T* table = (const T*)job.slopes + t.sample * place_of_class(job, job.histograms, 0, 1) +
                     place_of_class(job, kind, c, 1);
    alignas(64) T found[kMaxTile];
    for (int v = 0; v < t.padded; ++v) found[v] = T(bins.slope[v]) * table[bins.place[v]];
    for (int v = 0; v < t.padded; v += L) {
      const Vec<T> change = load<T>(m + v) * load<T>(found + v);
      const auto add = [&](T* to, Vec<T> more) { store<T>(to + v, load<T>(to + v) + more); };
      if (job.error_kinds[kind] == ErrorKind::error) {
        add(by_p, change);
      } else {
        add(by_log, change);
        add(by_rest, -change);
      }
    }
  }
}

}  // namespace
