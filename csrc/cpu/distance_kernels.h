// Exact squared Euclidean distances, one axis after the other: along x by the runs between seeds,
// along y and z by the lower envelope of parabolas, for as many adjacent lines as a vector holds.
//
// With f the squared distances so far along a line, its voxels get
//
//     g(i) = min over k of f(k) + (s (i − k))².
//
// The least k that attains the minimum never decreases with i: two parabolas of equal width cross
// once. So once g is known at rows a < b, with the minima of all lines of a vector at k_a or later
// and k_b or sooner, rows between them need k in [k_a, k_b] alone. Every eighth row is found by
// halving, and the seven rows between two of these share the numbers that they read. This takes no
// stack of parabolas and no gathers, and costs some ten additions a voxel however long distances
// are (Felzenszwalb & Huttenlocher 2012 build the envelope itself). Rounding may move a minimum to
// a neighbour that is as good to within rounding, and so is every bound that is derived from it.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "vec.h"  // before voxel.h

#include "distance_job.h"
#include "rows.h"

namespace {

using fastloss::DistanceJob;
using fastloss::Finish;

constexpr int kLanes = lanes<float>;
constexpr int kAnchorStep = 8;

FL_INLINE float largest_lane(Vec<float> v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}
FL_INLINE float smallest_lane(Vec<float> v) { return -largest_lane(-v); }
FL_INLINE int32_t largest_lane(IVec<float> v) {
  int32_t lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// A row that is known before those between it and the next anchor.
struct Anchor {
  int32_t first, last;  // the sources that are nearest to some line
  float least;          // of the squared distances
  bool zero;            // whether all of them are 0
};

// One vector of lines: sources at rows `place` (ascending; null: source k is row k), squared
// distances `from`; put(row, squared distances) for each of n rows.
template <class Put>
struct Envelope {
  const float* from;
  const int32_t* place;
  int32_t count;
  int32_t n;
  const float* squares;
  float inverse_spacing;
  float limit;  // of distances, in rows; larger ones may become infinite
  Anchor* anchors;
  const Put& put;

  FL_INLINE Vec<float> source(int32_t k) const { return load<float>(from + int64_t(k) * kLanes); }
  FL_INLINE int32_t row_of(int32_t k) const { return place ? place[k] : k; }
  FL_INLINE int32_t row_of_anchor(int32_t m) const {
    return m * kAnchorStep < n ? m * kAnchorStep : n - 1;
  }

  // The minimum at a row over the sources [first, last], and where lines attain it.
  void anchor(int32_t m, int32_t first, int32_t last) const {
    const int32_t row = row_of_anchor(m);
    if (!place) {
      // Its own source bounds the distance, and so how far the nearest may lie.
      const float own = largest_lane(source(row));
      if (own == 0) {
        anchors[m] = {row, row, 0, true};
        put(row, Vec<float>{});
        return;
      }
      const float rows = std::sqrt(own) * inverse_spacing + 1;
      if (rows < float(n)) {
        const int32_t reach = int32_t(rows);
        first = first > row - reach ? first : row - reach;
        last = last < row + reach ? last : row + reach;
      }
    }
    if (first > last) {  // where equal sums were rounded differently
      const int32_t other = first;
      first = last;
      last = other;
    }
    // Two chains, as each step waits for the one before.
    Vec<float> least[2] = {source(first) + squares[row - row_of(first)], splat<float>(INFINITY)};
    IVec<float> where[2] = {IVec<float>{} + first, IVec<float>{} + first};
    for (int32_t k = first + 1; k <= last; k += 2) {
      for (int32_t j = 0; j < 2 && k + j <= last; ++j) {
        const Vec<float> at = source(k + j) + squares[row - row_of(k + j)];
        const auto less = at < least[j];
        least[j] = less ? at : least[j];
        where[j] = less ? IVec<float>{} + (k + j) : where[j];
      }
    }
    const auto less = least[1] < least[0];
    least[0] = less ? least[1] : least[0];
    where[0] = less ? where[1] : where[0];
    // Lines without a source count for nothing, if there is any other.
    const auto known = least[0] < splat<float>(INFINITY);
    const int32_t low = -largest_lane(known ? -where[0] : IVec<float>{} - INT32_MAX);
    const int32_t high = largest_lane(known ? where[0] : IVec<float>{} - INT32_MAX);
    const bool any = high >= 0;
    anchors[m] = {any ? low : first, any ? high : last, smallest_lane(least[0]), false};
    put(row, least[0]);
  }

  // Whether all rows between two anchors are beyond the limit, as distances change by one voxel
  // from row to row at most. They become infinite.
  bool far(int32_t low, int32_t high) const {
    const float rows = limit + float(row_of_anchor(high) - row_of_anchor(low));
    const float least =
        anchors[low].least < anchors[high].least ? anchors[low].least : anchors[high].least;
    if (!(std::sqrt(least) * inverse_spacing > rows)) return false;
    for (int32_t row = row_of_anchor(low) + 1; row < row_of_anchor(high); ++row)
      put(row, splat<float>(INFINITY));
    return true;
  }

  void halve(int32_t low, int32_t high) const {
    if (far(low, high)) return;
    if (high - low < 2) {
      const int32_t row = row_of_anchor(low) + 1, rest = row_of_anchor(high) - row;
      if (anchors[low].zero && anchors[high].zero && all_zero(row, rest)) {
        for (int32_t i = 0; i < rest; ++i) put(row + i, Vec<float>{});
      } else if (rest == kAnchorStep - 1) {
        between<kAnchorStep - 1>(row, anchors[low].first, anchors[high].last);
      } else {
        for (int32_t i = 0; i < rest; ++i)
          between<1>(row + i, anchors[low].first, anchors[high].last);
      }
      return;
    }
    const int32_t middle = (low + high) / 2;
    anchor(middle, anchors[low].first, anchors[high].last);
    halve(low, middle);
    halve(middle, high);
  }

  FL_INLINE bool all_zero(int32_t row, int32_t rest) const {
    Vec<float> sum{};
    for (int32_t i = 0; i < rest; ++i) sum += source(row + i);
    return largest_lane(sum) == 0;
  }

  template <int N>
  FL_INLINE void between(int32_t row, int32_t first, int32_t last) const {
    Vec<float> least[N];
    for (int i = 0; i < N; ++i) least[i] = splat<float>(INFINITY);
    for (int32_t k = first; k <= last; ++k) {
      const Vec<float> f = source(k);
      const float* square = squares + (row - row_of(k));
      for (int i = 0; i < N; ++i) {
        const Vec<float> at = f + square[i];
        least[i] = at < least[i] ? at : least[i];
      }
    }
    for (int i = 0; i < N; ++i) put(row + i, least[i]);
  }

  void find() const {
    const int32_t end = (n - 1 + kAnchorStep - 1) / kAnchorStep;
    anchor(0, 0, count - 1);
    if (end == 0) return;
    anchor(end, anchors[0].first, count - 1);
    halve(0, end);
  }
};

template <class Put>
void find_envelope(const DistanceJob& job, int axis, const float* from, const int32_t* place,
                   int64_t count, Anchor* anchors, const Put& put) {
  const float limit = job.limit / job.scale * job.inverse_spacing[axis];
  Envelope<Put>{from,
                place,
                int32_t(count),
                int32_t(job.shape[axis]),
                job.squares[axis],
                job.inverse_spacing[axis],
                limit,
                anchors,
                put}
      .find();
}

// Which of 64 voxels are seeds, a bit each.
template <class Index>
FL_INLINE uint64_t seed_bits(const Index* classes, int64_t count, Index wanted, bool others) {
  uint64_t found = 0;
  if (count == 64) {
    uint8_t is[64];
    for (int i = 0; i < 64; ++i) is[i] = classes[i] == wanted;
    for (int i = 0; i < 8; ++i) {
      uint64_t eight;
      std::memcpy(&eight, is + 8 * i, 8);
      // The product gathers the lowest bits of eight bytes in the highest byte.
      found |= ((eight * 0x0102040810204080u) >> 56) << (8 * i);
    }
    return others ? ~found : found;
  }
  for (int64_t i = 0; i < count; ++i) found |= uint64_t((classes[i] == wanted) != others) << i;
  return found;
}

// Squared distances along a row of n voxels; false if it has no seed, and nothing is written.
template <class Index>
bool row_of_distances(const Index* classes, int64_t n, Index wanted, bool others,
                      const float* squares, float* to) {
  int64_t done = 0;   // voxels that are written
  int64_t seed = -1;  // the last one
  const auto write_gap = [&](int64_t next) {
    // Voxels [done, next) lie between two seeds, or before the first one.
    const int64_t rising = seed < 0 ? 0 : (next - done + 1) / 2;
    std::memcpy(to + done, squares + 1, size_t(rising) * sizeof(float));
    const int64_t falling = next - done - rising;
    std::memcpy(to + done + rising, squares - falling, size_t(falling) * sizeof(float));
  };
  for (int64_t base = 0; base < n; base += 64) {
    const int64_t count = n - base < 64 ? n - base : 64;
    uint64_t bits = seed_bits(classes + base, count, wanted, others);
    while (bits) {
      const int skip = __builtin_ctzll(bits);
      const int64_t next = base + skip;
      if (next > done) write_gap(next);
      const uint64_t rest = ~(bits >> skip);
      const int run = rest ? __builtin_ctzll(rest) : 64;
      std::memset(to + next, 0, size_t(run) * sizeof(float));
      done = next + run;
      seed = done - 1;
      if (skip + run >= 64) break;
      bits = bits >> (skip + run) << (skip + run);
    }
  }
  if (seed < 0) return false;
  std::memcpy(to + done, squares + 1, size_t(n - done) * sizeof(float));
  return true;
}

// Copies lines [first, first + count) of the given rows into vectors of kLanes lines, each with its
// rows one after the other. Lanes behind the last line repeat it.
FL_INLINE void gather_lines(const float* from, int64_t stride, const int32_t* rows, int64_t n,
                            int64_t count, float* to) {
  for (int64_t r = 0; r < n; ++r) {
    const float* row = from + (rows ? rows[r] : r) * stride;
    float* at = to + r * kLanes;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes, at += n * kLanes)
      store<float>(at, load<float>(row + i));
    if (i < count) {
      for (int64_t j = 0; j < kLanes; ++j) at[j] = row[i + j < count ? i + j : count - 1];
    }
  }
}

FL_INLINE void store_lanes(float* to, Vec<float> v, int64_t count) {
  if (count >= kLanes) store<float>(to, v);
  else std::memcpy(to, &v, size_t(count) * sizeof(float));
}

template <class Index>
bool plane_of(const DistanceJob& job, int64_t z, void* scratch) {
  const int64_t ny = job.shape[1], nx = job.shape[2];
  float* work = job.work + z * job.work_plane;
  const Index* classes = static_cast<const Index*>(job.classes) + z * job.class_plane;
  auto* lines = static_cast<float*>(scratch);
  auto* rows = reinterpret_cast<int32_t*>(lines + ny * fastloss::kLineBlock);
  auto* anchors = reinterpret_cast<Anchor*>(rows + ny);
  int64_t found = 0;
  for (int64_t y = 0; y < ny; ++y) {
    if (row_of_distances<Index>(classes + y * job.class_row, nx, Index(job.wanted), job.others,
                                job.squares[2], work + y * job.work_row))
      rows[found++] = int32_t(y);
  }
  if (!found) return false;
  if (ny == 1) return true;
  const bool all = found == ny;
  for (int64_t x = 0; x < nx; x += fastloss::kLineBlock) {
    const int64_t count = nx - x < fastloss::kLineBlock ? nx - x : fastloss::kLineBlock;
    gather_lines(work + x, job.work_row, all ? nullptr : rows, found, count, lines);
    for (int64_t i = 0; i < count; i += kLanes) {
      find_envelope(job, 1, lines + i * found, all ? nullptr : rows, found, anchors,
                    [&](int64_t y, Vec<float> least) {
                      store_lanes(work + y * job.work_row + x + i, least, count - i);
                    });
    }
  }
  return true;
}

bool plane_of_distances(const DistanceJob& job, int64_t z, void* scratch) {
  return (job.item == 1 ? plane_of<uint8_t> : plane_of<uint16_t>)(job, z, scratch);
}

// Writes the numbers of a vector of lines in plane z, from their squared distances.
struct Finisher {
  const DistanceJob& job;
  int64_t at;  // of the first line, within a plane
  int64_t count;

  FL_INLINE void operator()(int64_t z, Vec<float> squared) const {
    Vec<float> distance = square_root<float>(squared) * job.scale;
    const Vec<float> limit = splat(job.limit);
    distance = distance < limit ? distance : limit;
    const int64_t where = z * job.out_plane + at;
    if (job.finish == Finish::distance) {
      if (job.half) put(reinterpret_cast<Half*>(job.out) + where, distance);
      else store_lanes(reinterpret_cast<float*>(job.out) + where, distance, count);
      return;
    }
    const Vec<float> wanted = job.sign * distance + job.shift;
    if (job.half) mix(reinterpret_cast<uint16_t*>(job.out) + where, wanted, squared);
    else mix(reinterpret_cast<float*>(job.out) + where, wanted, squared);
  }

 private:
  FL_INLINE void put(Half* to, Vec<float> v) const {
#ifdef FL_HALVES
    if (count >= kLanes) {
      const auto halves = narrow_vector<Half>(v);
      std::memcpy(to, &halves, sizeof halves);
      return;
    }
#endif
    for (int64_t i = 0; i < kLanes && i < count; ++i) to[i] = narrow_half(v[i]);
  }

  // Writes where squared distances are above 0.
  FL_INLINE void mix(float* to, Vec<float> v, Vec<float> squared) const {
    if (count >= kLanes) {
      store<float>(to, squared > 0 ? v : load<float>(to));
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[i] = squared[i] > 0 ? v[i] : to[i];
  }
  FL_INLINE void mix(uint16_t* to, Vec<float> v, Vec<float> squared) const {
    uint16_t halves[kLanes];
#ifdef FL_HALVES
    const auto narrowed = narrow_vector<Half>(v);
    std::memcpy(halves, &narrowed, sizeof halves);
#else
    for (int i = 0; i < kLanes; ++i) halves[i] = narrow_half(v[i]).bits;
#endif
    float inside[kLanes];
    std::memcpy(inside, &squared, sizeof inside);
    const int64_t n = count < kLanes ? count : kLanes;
    for (int64_t i = 0; i < n; ++i) to[i] = inside[i] > 0 ? halves[i] : to[i];
  }
};

void lines_of_distances(const DistanceJob& job, const int32_t* planes, int64_t found, int64_t row,
                        int64_t first, int64_t last, void* scratch) {
  const int64_t nz = job.shape[0];
  auto* lines = static_cast<float*>(scratch);
  auto* anchors = reinterpret_cast<Anchor*>(lines + nz * fastloss::kLineBlock);
  const bool all = found == nz;
  for (int64_t x = first; x < last; x += fastloss::kLineBlock) {
    const int64_t count = last - x < fastloss::kLineBlock ? last - x : fastloss::kLineBlock;
    gather_lines(job.work + row * job.work_row + x, job.work_plane, all ? nullptr : planes, found,
                 count, lines);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Finisher put{job, row * job.out_row + x + i, count - i};
      if (nz == 1) put(0, load<float>(lines + i));
      else find_envelope(job, 0, lines + i * found, all ? nullptr : planes, found, anchors, put);
    }
  }
}

}  // namespace
