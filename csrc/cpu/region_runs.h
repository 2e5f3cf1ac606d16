// The runs of a tile: consecutive voxels that share a region and a label.
//
// Regions are Voronoi cells or lesions, so that a tile has a few dozen runs. The summands of a
// voxel go to a row first, and each run is summed at once; the coefficients of its gradient are
// written to rows, run by run. Run lengths cannot be predicted, so most runs have no branch.
#pragma once

#include <algorithm>

#include "region_tables.h"
#include "tile.h"

namespace {

// Vectors of a run that are written whatever its length.
constexpr int kAtOnce = 2;
// The voxels that a row has beyond those of a tile.
constexpr int kBeyond = 3 * lanes<float>;

#if defined(__AVX512F__)
// Marks which of 64 numbers, of those in `valid`, differ from the one before them. Others are not
// touched.
template <class S>
FL_INLINE uint64_t changes_of_64(const S* p, uint64_t valid) {
  if constexpr (sizeof(S) == 1) {
    return _mm512_cmpneq_epi8_mask(_mm512_maskz_loadu_epi8(valid, p),
                                   _mm512_maskz_loadu_epi8(valid, p - 1));
  } else if constexpr (sizeof(S) == 2) {
    auto half = [&](int first) {
      const __mmask32 of_half = __mmask32(valid >> first);
      return uint64_t(_mm512_cmpneq_epi16_mask(_mm512_maskz_loadu_epi16(of_half, p + first),
                                               _mm512_maskz_loadu_epi16(of_half, p + first - 1)));
    };
    return half(0) | half(32) << 32;
  } else {
    uint64_t found = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += 16) {
      const __mmask16 part = __mmask16(valid >> i);
      found |= uint64_t(_mm512_cmpneq_epi32_mask(_mm512_maskz_loadu_epi32(part, p + i),
                                                 _mm512_maskz_loadu_epi32(part, p + i - 1)))
               << i;
    }
    return found;
  }
}
#else
// Marks which of 16 numbers differ from those at `before`.
template <class S>
FL_INLINE uint64_t changes_of_16(const S* p, const S* before) {
#if defined(__SSE2__)
  constexpr int kEach = 16 / int(sizeof(S));
  __m128i same[sizeof(S)];
#pragma GCC unroll 4
  for (int i = 0; i < int(sizeof(S)); ++i) {
    const __m128i a = _mm_loadu_si128((const __m128i*)(p + i * kEach));
    const __m128i b = _mm_loadu_si128((const __m128i*)(before + i * kEach));
    if constexpr (sizeof(S) == 1) same[i] = _mm_cmpeq_epi8(a, b);
    else if constexpr (sizeof(S) == 2) same[i] = _mm_cmpeq_epi16(a, b);
    else same[i] = _mm_cmpeq_epi32(a, b);
  }
  __m128i bytes = same[0];
  if constexpr (sizeof(S) == 2) bytes = _mm_packs_epi16(same[0], same[1]);
  if constexpr (sizeof(S) == 4)
    bytes = _mm_packs_epi16(_mm_packs_epi32(same[0], same[1]), _mm_packs_epi32(same[2], same[3]));
  return uint64_t(~_mm_movemask_epi8(bytes) & 0xffff);
#else
  uint64_t found = 0;
  for (int i = 0; i < 16; ++i) found |= uint64_t(p[i] != before[i]) << i;
  return found;
#endif
}
#endif

// Adds marks, a bit each, where one of n numbers differs from the one before it. n is a multiple
// of 16.
template <class S>
void mark_changes(const S* p, int n, uint64_t* marks) {
#if defined(__AVX512F__)
  const uint64_t all = ~uint64_t(0), last = n % 64 ? (uint64_t(1) << n % 64) - 1 : all;
  marks[0] |= changes_of_64(p, (n < 64 ? last : all) & ~uint64_t(1));
  int v = 64;
  for (; v + 64 <= n; v += 64) marks[v / 64] |= changes_of_64(p + v, all);
  if (v < n) marks[v / 64] |= changes_of_64(p + v, last);
#else
  S first[17] = {p[0]};
  std::memcpy(first + 1, p, sizeof(S) * 16);
  marks[0] |= changes_of_16(p, first);
  for (int v = 16; v < n; v += 16) marks[v / 64] |= changes_of_16(p + v, p + v - 1) << v % 64;
#endif
}

// Lists the voxels that are marked, with n behind the last. Returns how many there are; of those
// beyond `most`, not all are listed. A branch would be mispredicted at every other word of 64:
// kSome places are written whether there are as many marks or not.
inline int list_marks(const uint64_t* marks, int n, int most, int32_t* start) {
  constexpr int kSome = 4;
  constexpr uint64_t kTop = uint64_t(1) << 63;
  int found = 0;
  for (int v = 0; v < n && found <= most; v += 64) {
    uint64_t word = marks[v / 64];
    const int more = __builtin_popcountll(word);
    for (int i = 0; i < more; i += kSome) {
#pragma GCC unroll 4
      for (int k = 0; k < kSome; ++k) {
        start[found + i + k] = v + __builtin_ctzll(word | kTop);
        word &= word - 1;
      }
    }
    found += more;
  }
  start[found] = n;
  return found;
}

struct LabelRuns {
  static constexpr int kMost = kMaxTile / 8;  // a tile with more is computed in another way
  int count = 0;
  int64_t region = -1;            // of all voxels, or −1
  int32_t start[kMost + 64 + 4];  // where each run begins, and where the last one ends
  int32_t row[kMost], label[kMost];

  // Finds the runs. Returns false for tiles that are not of this kind: with weights, voxels that
  // do not count, or many runs.
  template <class T>
  bool find(Tile<T>& t) {
    if (sizeof(T) != 4 || !t.even || t.n % 16) return false;
    uint64_t marks[kMaxTile / 64] = {};
    const Array& a = *t.job.regions;
    const int item = item_size(a.dtype);
    const bool direct = a.axes == 1 && a.stride[0] == item && item < 8;
    const char* from = a.data + t.sample * a.batch_stride + t.voxel * item;
    if (!direct) t.load_regions();
    // The hardware prefetcher does not follow rows that are read tile by tile.
    for (int i = 0; direct && i < t.n * item; i += 64)
      prefetch(from + kTilesAhead * t.step * item + i);
    if (t.has_byte_labels())
      for (int i = 0; i < t.n; i += 64) prefetch(t.byte_labels() + kTilesAhead * t.step + i);
    auto with_regions = [&](auto use) {
      if (!direct || a.dtype == DType::i32 || a.dtype == DType::u32)
        return use(direct ? (const int32_t*)from : t.region);
      if (a.dtype == DType::i8) return use((const int8_t*)from);
      if (a.dtype == DType::u8) return use((const uint8_t*)from);
      if (a.dtype == DType::i16) return use((const int16_t*)from);
      return use((const uint16_t*)from);
    };
    auto with_labels = [&](auto use) {
      if (t.has_byte_labels()) use(t.byte_labels());
      else use((const int32_t*)t.y);
    };
    with_regions([&](auto* p) { mark_changes(p, t.n, marks); });
    // Two classes have a count of labels, which tells whether all are the same.
    const bool same = t.label_bytes && (t.ones_among == 0 || t.ones_among == t.n);
    if (!same) with_labels([&](auto* p) { mark_changes(p, t.n, marks); });
    marks[0] |= 1;
    count = list_marks(marks, t.n, kMost, start);
    if (count > kMost) return false;
    uint32_t others = 0, most = 0;
    const int runs = count;
    with_regions([&](auto* p) {
      const uint32_t one = uint32_t(p[0]);
      for (int i = 0; i < runs; ++i) {
        const uint32_t number = uint32_t(p[start[i]]);  // that of −1 is above all others
        row[i] = int32_t(number);
        others |= number ^ one;
        most = number > most ? number : most;
      }
    });
    if (same) std::fill_n(label, runs, int32_t(t.ones_among > 0));
    else
      with_labels([&](auto* p) {
        for (int i = 0; i < runs; ++i) label[i] = int32_t(p[start[i]]);
      });
    region = others ? -1 : row[0];
    return int64_t(most) < t.job.rows && most <= uint32_t(INT32_MAX);
  }
};

// Σ over `count` voxels of R rows, from the voxel `first` on. Rows may be read up to kBeyond voxels
// beyond.
template <int R>
FL_INLINE void sum_rows(const float* const (&rows)[R], int first, int count,
                        Vec<float> (&sums)[R]) {
  constexpr int L = lanes<float>;
#if defined(__AVX512F__)
  const uint64_t some = _bzhi_u64(~uint64_t(0), uint32_t(count < 3 * L ? count : 3 * L));
  const __mmask16 low = __mmask16(some), middle = __mmask16(some >> L);
  const __mmask16 high = __mmask16(some >> 2 * L);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* p = rows[r] + first;
    __m512 v = _mm512_maskz_loadu_ps(low, p);
    v = _mm512_mask_add_ps(v, middle, v, _mm512_loadu_ps(p + L));
    sums[r] = (Vec<float>)_mm512_mask_add_ps(v, high, v, _mm512_loadu_ps(p + 2 * L));
  }
  for (int v = 3 * L; v < count; v += L) {
    const int left = count - v < L ? count - v : L;
    const __mmask16 last = __mmask16(_bzhi_u32(0xffff, uint32_t(left)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      sums[r] += (Vec<float>)_mm512_maskz_loadu_ps(last, rows[r] + first + v);
  }
#else
  auto some = [&](int v) { return first_lanes<float>(count - v); };
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = Vec<float>{};
  int v = 0;
  for (; v + L <= count; v += L)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] += load<float>(rows[r] + first + v);
  if (v < count)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] += keep<float>(some(v), load<float>(rows[r] + first + v));
#endif
}

// The sums over runs of some regions and labels, as vectors: each run adds to them, and totals are
// formed once. Few are met in a block: each has a place, from which another one that needs it moves
// it on, to the sums of the block.
template <int N>
class RunSums {
 public:
  // Adds the sums of R rows over a run, with its number of voxels, to those of a region and label.
  // pass(row, label, voxels, sums) moves others on.
  template <int R, class Pass>
  FL_INLINE void add(int row, int label, int voxels, const Vec<float> (&sums)[R],
                     const Pass& pass) {
    static_assert(R <= N, "there is a place for each");
    const int place = (row + kApart * label) % kPlaces;
    Key& key = keys_[place];
    if (key.row != row || key.label != label || key.voxels > kMostVoxels) {
      move_on(place, pass);
      key.row = row, key.label = label;
      for (int r = 0; r < N; ++r) sums_[place][r] = Vec<float>{};
    }
    key.voxels += voxels;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums_[place][r] += sums[r];
  }
  // Moves all on.
  template <class Pass>
  void finish(const Pass& pass) {
    for (int place = 0; place < kPlaces; ++place) move_on(place, pass);
  }

 private:
  static constexpr int kPlaces = 64, kApart = 23;  // where the next label of a region has its place
  static constexpr int kMostVoxels = 4096;         // bounds the rounding error
  struct Key {
    int32_t row = -1, label = -1, voxels = 0;
  };
  Key keys_[kPlaces];
  Vec<float> sums_[kPlaces][N];  // set where there is a key

  template <class Pass>
  void move_on(int place, const Pass& pass) {
    Key& key = keys_[place];
    if (!key.voxels) return;
    double totals[N];
    for (int r = 0; r < N; ++r) totals[r] = total<float>(sums_[place][r]);
    pass(key.row, key.label, double(key.voxels), totals);
    key = Key();
  }
};

// Writes R numbers to as many rows, each to `count` voxels from `first` on and up to kBeyond voxels
// beyond.
template <int R>
FL_INLINE void fill_rows(float* const (&rows)[R], int first, int count, const float (&numbers)[R]) {
  constexpr int L = lanes<float>;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < kAtOnce; ++u)
      store<float>(rows[r] + first + u * L, splat<float>(numbers[r]));
  for (int v = kAtOnce * L; v < count; v += L)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store<float>(rows[r] + first + v, splat<float>(numbers[r]));
}

// N numbers of each of some regions, kept from tile to tile.
template <int N>
class KeptRows {
 public:
  KeptRows() {
    for (int64_t& row : row_) row = -1;
  }
  // Those of a region, which make(numbers) computes where they are not known.
  template <class Make>
  FL_INLINE const float* of(int64_t row, const Make& make) {
    const int place = int(row % kPlaces);
    if (row_[place] != row) {
      make(numbers_[place]);
      row_[place] = row;
    }
    return numbers_[place];
  }

 private:
  static constexpr int kPlaces = 64;
  int64_t row_[kPlaces];
  float numbers_[kPlaces][N];
};

}  // namespace
