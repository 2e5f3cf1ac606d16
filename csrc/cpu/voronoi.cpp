// The nearest component of every voxel, exactly: along x between seeds, then along y and z by the
// lower envelope of parabolas, as in distance_kernels.h. Compiled once per instruction set.
//
// Each axis keeps for every voxel the least pair (squared distance f, component c), ordered by f
// and then by c, so that of components that are equally far the lowest wins:
//
//     g(i) = min over k of (f(k) + (s (i − k))², c(k)).
//
// Let k minimise the first number at row a, and k' at row b > a. Two parabolas of equal width cross
// once, so k ≤ k' for whichever minima are chosen: if k' < k, then
//
//     f(k) + (b − k)² s² − f(k') − (b − k')² s² = [the same at a] − 2 s² (b − a)(k − k') < 0.
//
// So rows between two known ones need the sources between their minima alone, those that are
// equally far included. It holds for rounded sums too while their errors are below 2 s², and they
// are: they are double, or whole numbers that float holds exactly.
#include "vec.h"  // before voxel.h

#include <cmath>

#include "voronoi.h"

namespace {

using fastloss::kVoronoiBlock;
using fastloss::VoronoiJob;

constexpr int kAnchorStep = 8;

template <class T>
using Int = typename Types<T>::Int;

template <class V, class T>
FL_INLINE T largest_of(V v, T) {
  constexpr int n = sizeof(V) / sizeof(T);
  T lane[n];
  std::memcpy(lane, &v, sizeof v);
  for (int half = n / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

template <class T>
struct Nearest {
  Vec<T> squared;
  IVec<T> component;

  FL_INLINE void meet(Vec<T> at, IVec<T> other) {
    const IVec<T> better = (at < squared) | ((at == squared) & (other < component));
    squared = better ? at : squared;
    component = better ? other : component;
  }
};

// A row that is known before those between it and the next anchor: the sources that are nearest to
// some line, and whether all of its voxels are seeds.
struct Anchor {
  int32_t first, last;
  bool zero;
};

// One vector of lines: sources at rows `place` (ascending; null: source k is row k); put(row,
// nearest) for each of n rows.
template <class T, class Put>
struct CellEnvelope {
  static constexpr int kLanes = lanes<T>;
  const T* from;
  const Int<T>* components;
  const int32_t* place;
  int32_t count;
  int32_t n;
  const T* squares;
  double inverse_spacing;
  Anchor* anchors;
  const Put& put;

  FL_INLINE Vec<T> source(int32_t k) const { return load<T>(from + int64_t(k) * kLanes); }
  FL_INLINE IVec<T> component(int32_t k) const {
    IVec<T> v;
    std::memcpy(&v, components + int64_t(k) * kLanes, sizeof v);
    return v;
  }
  FL_INLINE int32_t row_of(int32_t k) const { return place ? place[k] : k; }
  FL_INLINE int32_t row_of_anchor(int32_t m) const {
    return m * kAnchorStep < n ? m * kAnchorStep : n - 1;
  }

  // The minimum at a row over the sources [first, last], and where lines attain it.
  void anchor(int32_t m, int32_t first, int32_t last) const {
    const int32_t row = row_of_anchor(m);
    if (!place) {
      // Its own source bounds the distance, and so how far the nearest may lie.
      const T own = largest_of(source(row), T());
      if (own == 0) {
        anchors[m] = {row, row, true};
        put(row, Nearest<T>{Vec<T>{}, component(row)});
        return;
      }
      const double rows = std::sqrt(double(own)) * inverse_spacing + 1;
      if (rows < double(n)) {
        const int32_t reach = int32_t(rows);
        first = first > row - reach ? first : row - reach;
        last = last < row + reach ? last : row + reach;
      }
    }
    Nearest<T> nearest{source(first) + squares[row - row_of(first)], component(first)};
    IVec<T> where = IVec<T>{} + Int<T>(first);
    for (int32_t k = first + 1; k <= last; ++k) {
      const Vec<T> at = source(k) + squares[row - row_of(k)];
      where = at < nearest.squared ? IVec<T>{} + Int<T>(k) : where;
      nearest.meet(at, component(k));
    }
    anchors[m] = {int32_t(-largest_of(-where, Int<T>())), int32_t(largest_of(where, Int<T>())),
                  false};
    put(row, nearest);
  }

  void halve(int32_t low, int32_t high) const {
    if (high - low < 2) {
      const int32_t row = row_of_anchor(low) + 1, rest = row_of_anchor(high) - row;
      const int32_t first = anchors[low].first, last = anchors[high].last;
      if (anchors[low].zero && anchors[high].zero && all_zero(row, rest)) {
        for (int32_t i = 0; i < rest; ++i) put(row + i, Nearest<T>{Vec<T>{}, component(row + i)});
      } else if (rest == kAnchorStep - 1) {
        between<kAnchorStep - 1>(row, first, last);
      } else {
        for (int32_t i = 0; i < rest; ++i) between<1>(row + i, first, last);
      }
      return;
    }
    const int32_t middle = (low + high) / 2;
    anchor(middle, anchors[low].first, anchors[high].last);
    halve(low, middle);
    halve(middle, high);
  }

  FL_INLINE bool all_zero(int32_t row, int32_t rest) const {
    Vec<T> sum{};
    for (int32_t i = 0; i < rest; ++i) sum += source(row + i);
    return largest_of(sum, T()) == 0;
  }

  template <int N>
  FL_INLINE void between(int32_t row, int32_t first, int32_t last) const {
    Nearest<T> nearest[N];
    for (int i = 0; i < N; ++i)
      nearest[i] = {source(first) + squares[row + i - row_of(first)], component(first)};
    for (int32_t k = first + 1; k <= last; ++k) {
      const Vec<T> f = source(k);
      const IVec<T> c = component(k);
      const T* square = squares + (row - row_of(k));
      for (int i = 0; i < N; ++i) nearest[i].meet(f + square[i], c);
    }
    for (int i = 0; i < N; ++i) put(row + i, nearest[i]);
  }

  void find() const {
    const int32_t end = (n - 1 + kAnchorStep - 1) / kAnchorStep;
    anchor(0, 0, count - 1);
    if (end == 0) return;
    anchor(end, anchors[0].first, count - 1);
    halve(0, end);
  }
};

// The nearest along a row of n voxels; false if it has no seed, and nothing is written.
template <class T>
bool nearest_in_row(const int32_t* from, int64_t n, const T* squares, T* to, int32_t* out) {
  int64_t seed = -1;
  for (int64_t x = 0; x < n;) {
    int64_t next = x;
    for (; next + 4 <= n; next += 4) {
      uint64_t words[2];
      std::memcpy(words, from + next, sizeof words);
      if (words[0] | words[1]) break;
    }
    while (next < n && from[next] <= 0) ++next;
    if (next == n) break;
    if (seed < 0) {
      for (int64_t i = x; i < next; ++i) to[i] = squares[next - i], out[i] = from[next];
    } else {
      const int64_t gap = next - x, half = gap / 2, middle = x + half;
      for (int64_t i = x; i < middle; ++i) to[i] = squares[i - seed], out[i] = from[seed];
      if (gap % 2) {
        to[middle] = squares[half + 1];
        out[middle] = from[seed] < from[next] ? from[seed] : from[next];
      }
      for (int64_t i = middle + gap % 2; i < next; ++i)
        to[i] = squares[next - i], out[i] = from[next];
    }
    for (; next < n && from[next] > 0; ++next) to[next] = 0, out[next] = from[next];
    seed = next - 1;
    x = next;
  }
  if (seed < 0) return false;
  for (int64_t i = seed + 1; i < n; ++i) to[i] = squares[i - seed], out[i] = from[seed];
  return true;
}

// Copies lines [first, first + count) of the given rows into vectors of lines, each with its rows
// one after the other. Lanes behind the last line repeat it.
template <class To, class From>
FL_INLINE void gather(const From* from, int64_t stride, const int32_t* rows, int64_t n,
                      int64_t count, int64_t width, To* to) {
  for (int64_t r = 0; r < n; ++r) {
    const From* row = from + (rows ? rows[r] : r) * stride;
    To* at = to + r * width;
    int64_t i = 0;
    for (; i + width <= count; i += width, at += n * width)
      for (int64_t j = 0; j < width; ++j) at[j] = To(row[i + j]);
    if (i < count)
      for (int64_t j = 0; j < width; ++j) at[j] = To(row[i + j < count ? i + j : count - 1]);
  }
}

template <class To, class V, class T>
FL_INLINE void scatter(To* to, V v, T, int64_t count) {
  constexpr int n = sizeof(V) / sizeof(T);
  T lane[n];
  std::memcpy(lane, &v, sizeof v);
  if (count >= n) {
    for (int i = 0; i < n; ++i) to[i] = To(lane[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = To(lane[i]);
  }
}

// Lines [first, last) along an axis, `stride` numbers from row to row of it.
template <class T>
void along(const VoronoiJob& job, int axis, T* work, int32_t* out, int64_t stride,
           const int32_t* rows, int64_t found, int64_t first, int64_t last, bool keeps,
           void* scratch) {
  constexpr int kLanes = lanes<T>;
  const int64_t n = job.shape[axis];
  auto* from = static_cast<T*>(scratch);
  auto* components = reinterpret_cast<Int<T>*>(from + found * kVoronoiBlock);
  auto* anchors = reinterpret_cast<Anchor*>(components + found * kVoronoiBlock);
  const int32_t* place = found == n ? nullptr : rows;
  for (int64_t x = first; x < last; x += kVoronoiBlock) {
    const int64_t count = last - x < kVoronoiBlock ? last - x : kVoronoiBlock;
    gather(work + x, stride, place, found, count, kLanes, from);
    gather(out + x, stride, place, found, count, kLanes, components);
    for (int64_t i = 0; i < count; i += kLanes) {
      const auto put = [&](int64_t row, const Nearest<T>& nearest) {
        const int64_t at = row * stride + x + i;
        if (keeps) scatter(work + at, nearest.squared, T(), count - i);
        scatter(out + at, nearest.component, Int<T>(), count - i);
      };
      CellEnvelope<T, decltype(put)>{from + i * found,
                                     components + i * found,
                                     place,
                                     int32_t(found),
                                     int32_t(n),
                                     static_cast<const T*>(job.squares[axis]),
                                     job.inverse_spacing[axis],
                                     anchors,
                                     put}
          .find();
    }
  }
}

template <class T>
bool plane_of_cells(const VoronoiJob& job, int64_t z, void* scratch) {
  const int64_t ny = job.shape[1], nx = job.shape[2];
  T* work = static_cast<T*>(job.work) + z * ny * nx;
  int32_t* out = job.out + z * ny * nx;
  const int32_t* seeds = job.components + z * ny * nx;
  auto* rows = static_cast<int32_t*>(scratch);
  int64_t found = 0;
  for (int64_t y = 0; y < ny; ++y) {
    if (nearest_in_row(seeds + y * nx, nx, static_cast<const T*>(job.squares[2]), work + y * nx,
                       out + y * nx))
      rows[found++] = int32_t(y);
  }
  if (!found) return false;
  if (ny > 1) {
    char* rest = static_cast<char*>(scratch) + (ny * 4 + 63) / 64 * 64;
    along<T>(job, 1, work, out, nx, rows, found, 0, nx, true, rest);
  }
  return true;
}

bool voronoi_plane(const VoronoiJob& job, int64_t z, void* scratch) {
  return (job.wide ? plane_of_cells<double> : plane_of_cells<float>)(job, z, scratch);
}

void voronoi_lines(const VoronoiJob& job, const int32_t* planes, int64_t count, int64_t first,
                   int64_t last, void* scratch) {
  const int64_t plane = job.shape[1] * job.shape[2];
  if (job.wide)
    along(job, 0, static_cast<double*>(job.work), job.out, plane, planes, count, first, last, false,
          scratch);
  else
    along(job, 0, static_cast<float*>(job.work), job.out, plane, planes, count, first, last, false,
          scratch);
}

}  // namespace

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)
#define FASTLOSS_TEXT_(a) #a
#define FASTLOSS_TEXT(a) FASTLOSS_TEXT_(a)

namespace fastloss {
extern const VoronoiKernels FASTLOSS_JOIN(voronoi_kernels_, FASTLOSS_ISA);
const VoronoiKernels FASTLOSS_JOIN(voronoi_kernels_, FASTLOSS_ISA) = {FASTLOSS_TEXT(FASTLOSS_ISA),
                                                                      voronoi_plane, voronoi_lines};
}  // namespace fastloss
