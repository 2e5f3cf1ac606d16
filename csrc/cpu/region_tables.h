// The coefficients of few regions, looked up in registers by the region of every voxel: faster than
// the rows of region_runs.h, as no runs are found or filled.
#pragma once

#include "tile.h"

namespace {

// The prefetch distance of regions in tiles.
constexpr int kTilesAhead = 3;

// Vectors of a table at most: 64 regions with AVX-512, 32 with AVX2.
constexpr int kTableVectors = 4;
constexpr int kTableRegions = kTableVectors * lanes<float>;

#if defined(__AVX2__)
// table[index], for a table of kVectors vectors, 2 or 4.
template <int kVectors>
FL_INLINE Vec<float> look_up(const float* table, IVec<float> index) {
  constexpr int L = lanes<float>;
  if constexpr (kVectors == 4) {
    return select<float>((index & (2 * L)) == IVec<float>{}, look_up<2>(table, index),
                         look_up<2>(table + 2 * L, index));
  } else {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_permutex2var_ps((__m512)load<float>(table), (__m512i)index,
                                              (__m512)load<float>(table + L));
#else
    return select<float>((index & L) == IVec<float>{}, pick(load<float>(table), index),
                         pick(load<float>(table + L), index));
#endif
  }
}

// N numbers of each of few regions: tables of one number, of all regions each.
template <int N>
struct RegionNumbers {
  alignas(64) float number[N][kTableRegions] = {};
  bool fits = false;   // there is a place for every region
  bool small = false;  // half of a table suffices

  // make(region, numbers) computes those of a region.
  template <class Make>
  void fill(const Job& job, const Make& make) {
    fits = job.rows <= kTableRegions;
    small = job.rows <= kTableRegions / 2;
    for (int64_t row = 0; fits && row < job.rows; ++row) {
      float numbers[N];
      make(row, numbers);
      for (int i = 0; i < N; ++i) number[i][row] = numbers[i];
    }
  }
};

// The regions of an even tile, or those of class c, as bytes, in place or written to `buffer`. Null
// if some voxel has none, or if the tile has padding.
inline const uint8_t* region_bytes(Tile<float>& t, uint8_t* buffer, int64_t c = 0) {
  if (!t.even || t.n != t.padded) return nullptr;
  const Array& a = *t.job.regions;
  if (item_size(a.dtype) > 1 || a.axes > 1 || a.stride[0] != 1) {
    t.load_regions(c);
    int32_t signs = 0;
    for (int v = 0; v < t.n; ++v) {
      signs |= t.region[v];
      buffer[v] = uint8_t(t.region[v]);
    }
    return signs < 0 ? nullptr : buffer;
  }
  const auto* from =
      (const uint8_t*)a.data + t.sample * a.batch_stride + c * a.channel_stride + t.voxel;
  // The hardware prefetcher does not follow rows that are read tile by tile.
  for (int i = 0; i < t.n; i += 64) prefetch(from + kTilesAhead * t.step + i);
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
  Bytes most{};  // −1 is above all others
  for (int v = 0; v < t.n; v += kVectorBytes) {
    Bytes here;
    if (t.n - v >= kVectorBytes) {
      std::memcpy(&here, from + v, sizeof here);
    } else {
      here = Bytes{};
      std::memcpy(&here, from + v, size_t(t.n - v));
    }
    most = here > most ? here : most;
  }
  const Bytes limit = Bytes{} + uint8_t(t.job.rows);  // at most kTableRegions
  return any<float>((IVec<float>)(most >= limit)) ? nullptr : from;
}
#endif

}  // namespace
