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

struct Place {
  int32_t at, rest;
};
// The place of v, given its bits, and d.
template <size_t N>
FL_INLINE Place place_of(const fastloss::Octaves (&octaves)[N], int32_t bits) {
  const int32_t last = fastloss::last_place(octaves), end = fastloss::end_bits(octaves);
  bits = bits < end ? bits : end;
  int32_t at = 0, rest = 0, first = 1;
#pragma GCC unroll 8
  for (size_t o = 0; o < N; ++o) {
    const int32_t start = fastloss::float_bits(octaves[o].exponent);
    const int shift = 23 - octaves[o].bits;
    at = bits >= start ? first + ((bits - start) >> shift) : at;
    rest = bits >= start ? bits & ((1 << shift) - 1) : rest;
    first += octaves[o].count << octaves[o].bits;
  }
  return {at < last ? at : last, rest};
}
FL_INLINE int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// Rows of p and q, or for a hinge of the logit x; g and m.
template <class T>
void find_bins(ErrorKind kind, int padded, const T* p, const T* q, const T* x, const T* g,
               const T* m, Binned<T>& to) {
  const int32_t bins = fastloss::bins_of(kind);
  if (kind == ErrorKind::error) {
    for (int i = 0; i < padded; ++i) {
      const bool foreground = g[i] > T(0.5);
      const float a = float(p[i]), b = float(q[i]);
      const float error = foreground ? b : a, others = foreground ? a : b;
      const bool large = error > others;
      const Place small_place = place_of(fastloss::kSmallErrors, bits_of(error));
      const Place large_place = place_of(fastloss::kLargeErrors, bits_of(others));
      int32_t at = large ? bins - 1 - large_place.at : small_place.at;
      at += foreground ? bins : 0;
      to.place[i] = m[i] > T(0) ? at : 2 * bins;
      to.rest[i] = large ? large_place.rest : small_place.rest;
      to.slope[i] = foreground == large ? T(1) : T(-1);
    }
  } else {
    for (int i = 0; i < padded; ++i) {
      const bool foreground = g[i] > T(0.5);
      const T h = T(1) + (foreground ? -x[i] : x[i]);
      const Place found = place_of(fastloss::kHingeErrors, bits_of(h > T(0) ? float(h) : 0.f));
      const int32_t at = found.at + (foreground ? bins : 0);
      to.place[i] = m[i] > T(0) ? at : 2 * bins;
      to.rest[i] = found.rest;
      to.slope[i] = foreground ? T(-1) : T(1);
    }
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
