// The errors of the voxels of a tile: counted in bins, and differentiated.
#pragma once

#include <cstring>

#include "errors.h"
#include "tile.h"

namespace {

using fastloss::ErrorKind;

// The bin of every voxel of a class, d, and the derivative of v by p, or by the logit. Voxels of
// weight 0 have the place behind all bins.
template <class T>
struct Binned {
  alignas(64) int32_t place[kMaxTile];
  alignas(64) int32_t rest[kMaxTile];
  alignas(64) T slope[kMaxTile];
};

// From v, `flags` of 1: foreground, 2: the large errors, 4: does not count.
template <bool kMirrored, size_t N>
FL_INLINE void place_all(const fastloss::Octaves (&octaves)[N], int padded, const float* v,
                         const int32_t* flags, int32_t* place, int32_t* rest) {
  constexpr int kMost = 8;
  static_assert(N <= kMost, "");
  const int32_t last = fastloss::last_place(octaves), end = fastloss::end_bits(octaves);
  const int32_t bins = (last + 1) * (kMirrored ? 2 : 1);
  for (int i = 0; i < padded; ++i) {
    int32_t bits;
    std::memcpy(&bits, v + i, sizeof bits);
    bits = bits < end ? bits : end;
    int32_t at = 0, left = 0, first = 1;
#pragma GCC unroll 8
    for (size_t o = 0; o < N; ++o) {
      const int32_t start = fastloss::float_bits(octaves[o].exponent);
      const int shift = 23 - octaves[o].bits;
      const bool inside = bits >= start;
      at = inside ? first + ((bits - start) >> shift) : at;
      left = inside ? bits & ((1 << shift) - 1) : left;
      first += octaves[o].count << octaves[o].bits;
    }
    at = at < last ? at : last;
    left = bits == end ? 0 : left;
    if (kMirrored) at = flags[i] & 2 ? bins - 1 - at : at;
    at += flags[i] & 1 ? bins : 0;
    place[i] = flags[i] & 4 ? 2 * bins : at;
    rest[i] = left;
  }
}

// Rows of p and q, or for a hinge of the logit x; g and m.
template <class T>
void find_bins(ErrorKind kind, int padded, const T* p, const T* q, const T* x, const T* g,
               const T* m, Binned<T>& to) {
  alignas(64) float v[kMaxTile];
  alignas(64) int32_t flags[kMaxTile];
  if (kind == ErrorKind::error) {
    for (int i = 0; i < padded; ++i) {
      const bool foreground = g[i] > T(0.5);
      const float a = float(p[i]), b = float(q[i]);
      const float error = foreground ? b : a, others = foreground ? a : b;
      const bool large = error > others;
      v[i] = large ? others : error;
      flags[i] = int32_t(foreground) + 2 * int32_t(large) + (m[i] > T(0) ? 0 : 4);
      to.slope[i] = foreground == large ? T(1) : T(-1);
    }
    place_all<true>(fastloss::kErrorOctaves, padded, v, flags, to.place, to.rest);
  } else {
    for (int i = 0; i < padded; ++i) {
      const bool foreground = g[i] > T(0.5);
      const T h = T(1) + (foreground ? -x[i] : x[i]);
      v[i] = h > T(0) ? float(h) : 0.f;
      flags[i] = int32_t(foreground) + (m[i] > T(0) ? 0 : 4);
      to.slope[i] = foreground ? T(-1) : T(1);
    }
    place_all<false>(fastloss::kHingeOctaves, padded, v, flags, to.place, to.rest);
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
  Binned<T> bins;
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
  const Job& job = t.job;
  const T* m = t.row(kWeight);
  Binned<T> bins;
  for (int kind = 0; kind < job.histograms; ++kind) {
    find_bins(job.error_kinds[kind], t.padded, p, q, t.x + c * t.stride, g, m, bins);
    const T* table = (const T*)job.slopes + t.sample * place_of_class(job, job.histograms, 0, 1) +
                     place_of_class(job, kind, c, 1);
    const bool of_p = job.error_kinds[kind] == ErrorKind::error;
    for (int v = 0; v < t.padded; ++v) {
      const T change = m[v] * bins.slope[v] * table[bins.place[v]];
      if (of_p) {
        by_p[v] += change;
      } else {
        by_log[v] += change;
        by_rest[v] -= change;
      }
    }
  }
}

}  // namespace
