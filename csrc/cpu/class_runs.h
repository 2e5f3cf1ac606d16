// The runs of a class in a tile: consecutive voxels that share its region, and whether it is their
// label. See region_runs.h.
#pragma once

#include "region_runs.h"

namespace {

// Marks, a bit each, which of n labels are c. Some beyond may be read and marked.
inline void mark_class(const int32_t* label, int n, int64_t c, uint64_t* marks) {
  constexpr int L = lanes<float>;
  const IVec<float> number = class_number<float>(c);
  for (int v = 0; v < n; v += L) {
    const IVec<float> same = label_lanes<float>(label + v) == number;
    uint64_t found = 0;
#if defined(__AVX512F__)
    found = _mm512_movepi32_mask((__m512i)same);
#elif defined(__AVX2__)
    found = uint64_t(_mm256_movemask_ps((__m256)same));
#elif defined(__SSE2__)
    found = uint64_t(_mm_movemask_ps((__m128)same));
#else
    for (int i = 0; i < L; ++i) found |= uint64_t(same[i] != 0) << i;
#endif
    marks[v / 64] |= found << v % 64;
  }
}
// The same for labels stored as bytes, of which nothing beyond n is read.
inline void mark_class(const uint8_t* label, int n, int64_t c, uint64_t* marks) {
  int v = 0;
#if defined(__AVX512F__)
  const __m512i number = _mm512_set1_epi8(char(c));
  for (; v + 64 <= n; v += 64)
    marks[v / 64] = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(label + v), number);
#elif defined(__SSE2__)
  const __m128i number = _mm_set1_epi8(char(c));
  for (; v + 16 <= n; v += 16) {
    const __m128i same = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i*)(label + v)), number);
    marks[v / 64] |= uint64_t(uint32_t(_mm_movemask_epi8(same))) << v % 64;
  }
#endif
  for (; v < n; ++v) marks[v / 64] |= uint64_t(label[v] == c) << v % 64;
}

class ClassRuns {
 public:
  int count = 0;

  template <class T>
  void find(Tile<T>& t, int64_t c) {
    const Array& a = *t.job.regions;
    const int item = item_size(a.dtype);
    const char* from = a.data + t.sample * a.batch_stride + c * a.channel_stride + t.voxel * item;
    if (a.axes != 1 || a.stride[0] != item || item == 8 || t.n % 16) {
      t.load_regions(c);
      for (int v = t.n; v % 16; ++v) t.region[v] = t.region[t.n - 1];
      return find_in(t, c, t.region);
    }
    // The hardware prefetcher does not follow rows that are read tile by tile.
    for (int i = 0; i < t.n * item; i += 64) prefetch(from + kTilesAhead * t.step * item + i);
    if (a.dtype == DType::i8) return find_in(t, c, (const int8_t*)from);
    if (a.dtype == DType::u8) return find_in(t, c, (const uint8_t*)from);
    if (a.dtype == DType::i16) return find_in(t, c, (const int16_t*)from);
    if (a.dtype == DType::u16) return find_in(t, c, (const uint16_t*)from);
    return find_in(t, c, (const int32_t*)from);
  }

  // Calls f(row, is_class, first, count) for each run; a row of −1: it has no region.
  template <class F>
  FL_INLINE void each(const F& f) const {
    for (int i = 0; i < count; ++i)
      f(row_[i], int(is_class_[i]), start_[i], start_[i + 1] - start_[i]);
  }

 private:
  int32_t start_[kMaxTile + 64 + 4];  // see `list_marks`
  int32_t row_[kMaxTile];
  uint8_t is_class_[kMaxTile];

  template <class T, class S>
  void find_in(const Tile<T>& t, int64_t c, const S* region) {
    uint64_t marks[kMaxTile / 64] = {}, own[kMaxTile / 64] = {};
    const int n = t.n;
    mark_changes(region, (n + 15) / 16 * 16, marks);
    if (t.has_byte_labels()) mark_class(t.byte_labels(), n, c, own);
    else mark_class(t.y, n, c, own);
    uint64_t before = ~own[0] & 1;  // the first voxel starts a run
    for (int i = 0; i < (n + 63) / 64; ++i) {
      marks[i] |= own[i] ^ (own[i] << 1 | before);
      before = own[i] >> 63;
    }
    if (n % 64) marks[n / 64] &= (uint64_t(1) << n % 64) - 1;
    count = list_marks(marks, n, kMaxTile, start_);
    const uint64_t rows = uint64_t(t.job.rows);
    for (int i = 0; i < count; ++i) {
      const unsigned v = unsigned(start_[i]);
      const uint32_t number = uint32_t(region[v]);  // that of −1 is above all others
      row_[i] = number < rows ? int32_t(number) : -1;
      is_class_[i] = uint8_t(own[v / 64] >> v % 64 & 1);
    }
  }
};

}  // namespace
