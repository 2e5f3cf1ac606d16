// Exact Euclidean distances of the voxels of two kinds, inside a class and outside it, to the
// nearest voxel of the other kind; one axis after the other, as
//
//     min over z', y', x' of (s_z (z − z'))² + (s_y (y − y'))² + (s_x (x − x'))²
//
// is a minimum over z' of (s_z (z − z'))² plus what remains, a minimum over y' and x'.
//
// Between the passes a voxel's number is the squared distance so far, to the nearest voxel of the
// other kind in its row or plane, with a minus sign inside; infinite if there is none. One number
// serves both kinds: for a voxel, the row j beside it has its nearest voxel of the other kind at
// f(j) if the voxel in row j is of its own kind, and at that voxel, at 0, if not. Where only
// distances inside are wanted, those outside are 0 from the start.
#include "numbers.h"

constexpr int kThreads = 256;
constexpr int kTile = kLanes * kLanes;  // voxels of a row that a warp processes at once
constexpr int kAtOnce = 4;              // rows on each side that are loaded together

// As in fastloss/backends/cuda/distance.py: which numbers are written.
enum Convention { kInside, kKervadec, kExact, kUnsigned };

constexpr unsigned kSomeOutside = 1, kSomeInside = 2, kBoth = 3;

// Mirrored in fastloss/backends/cuda/distance.py. A map is one class of one volume. A launch takes
// `count` maps from `first` on; `from` and `to` are at the first of them.
struct DistanceCall {
  const void* classes;  // class indices, (volumes, z, y, x)
  const float* from;    // (count, z, y, x), like `to`
  void* to;             // float32, or float16 where `half`
  unsigned* of_map;     // (maps,): which kinds of voxels there are
  unsigned* of_plane;   // (maps, z), or null
  long long maps;       // of all launches
  long long first, count;
  long long per_volume;  // maps
  long long shape[3];
  long long length;    // of the axis of this launch
  long long step;      // from one voxel to the next along it
  long long boxes;     // of `length` · `step` voxels that a map consists of
  long long blocks;    // of work; there may be fewer in the grid
  int item;            // bytes of a class index: 1 or 2
  int any;             // inside is what is not 0; else, what is the class of the map
  int lanes;           // threads of a block along the rows, a power of two
  int last;            // the pass writes what was asked for
  int convention;      // of the last pass
  int half;            // what the last pass writes
  float square;        // of the spacing along the axis, in units of `scale`
  float limit_square;  // of a distance that is beyond the limit
  float scale;
  float limit;
};

// No map has a voxel yet.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_distance_begin(const __grid_constant__ DistanceCall call) {
  const long long count = call.maps * (call.of_plane ? 1 + call.shape[0] : 1);
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; i < count;
       i += step)
    call.of_map[i] = 0;  // those of planes lie behind
}

// --- Along x
// --------------------------------------------------------------------------------------

template <class Index>
struct Row {
  const DistanceCall& call;
  const Index* classes;
  unsigned wanted;

  FL_DEVICE bool inside(long long x) const {
    if (x >= call.shape[2]) return false;
    const unsigned index = classes[x];
    return call.any ? index != 0 : index == wanted;
  }

  // The first voxel from x on that is of the other kind, or the length of the row.
  FL_DEVICE long long first_other(long long x, bool kind, int lane) const {
    const long long n = call.shape[2];
    for (; x < n; x += kLanes) {
      const unsigned found = __ballot_sync(kAllLanes, x + lane < n && inside(x + lane) != kind);
      if (found) return x + __ffs(int(found)) - 1;
    }
    return n;
  }

  // One warp: writes the row, and returns the kinds of its voxels that a lane has seen.
  //
  // A change is a voxel that differs from the one before it. The nearest voxel of the other kind is
  // before the last change up to here, or at the next change. Lane k holds the bits and changes of
  // the voxels [32 k, 32 k + 32) of a tile, and learns the nearest changes on both sides of them.
  FL_DEVICE unsigned write(float* to, int lane) const {
    const long long n = call.shape[2];
    long long last = -1, next = 0;  // the nearest changes before and behind the tile
    unsigned before_tile = 0;       // the word before it
    unsigned kinds = 0;
    for (long long base = 0; base < n; base += kTile) {
      const long long left = n - base;
      const int words = left < kTile ? int((left + kLanes - 1) / kLanes) : kLanes;
      unsigned own = 0;
#pragma unroll 4
      for (int w = 0; w < words; ++w) {
        const unsigned bits = __ballot_sync(kAllLanes, inside(base + w * kLanes + lane));
        if (lane == w) own = bits;
      }
      const long long mine = left - lane * kLanes;
      const unsigned valid = mine >= kLanes ? ~0u : mine > 0 ? ~0u >> (kLanes - int(mine)) : 0;
      if (own & valid) kinds |= kSomeInside;
      if (~own & valid) kinds |= kSomeOutside;

      unsigned before = __shfl_up_sync(kAllLanes, own, 1);
      if (lane == 0) before = base ? before_tile : own << 31;  // the first voxel is no change
      const unsigned changes = (own ^ (own << 1 | before >> 31)) & valid;
      int low = changes ? lane * kLanes + 31 - __clz(int(changes)) : -1;
      int high = changes ? lane * kLanes + __ffs(int(changes)) - 1 : kTile;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        const int lower = __shfl_up_sync(kAllLanes, low, step);
        const int higher = __shfl_down_sync(kAllLanes, high, step);
        if (lane >= step) low = max(low, lower);
        if (lane + step < kLanes) high = min(high, higher);
      }
      const int last_in_tile = __shfl_sync(kAllLanes, low, kLanes - 1);
      low = __shfl_up_sync(kAllLanes, low, 1);
      high = __shfl_down_sync(kAllLanes, high, 1);
      if (lane == 0) low = -1;
      if (lane == kLanes - 1) high = kTile;
      before_tile = __shfl_sync(kAllLanes, own, kLanes - 1);
      if (next < base + kTile) next = first_other(base + kTile, before_tile >> 31, lane);

      for (int w = 0; w < words; ++w) {
        const unsigned bits = __shfl_sync(kAllLanes, own, w);
        const unsigned here = __shfl_sync(kAllLanes, changes, w);
        const int lower = __shfl_sync(kAllLanes, low, w);
        const int higher = __shfl_sync(kAllLanes, high, w);
        const int at = w * kLanes + lane;
        const long long x = base + at;
        const unsigned up_to_here = ~0u >> (31 - lane);
        const unsigned down = here & up_to_here, up = here & ~up_to_here;
        float distance = infinity<float>();
        if (down) distance = float(lane - (31 - __clz(int(down))) + 1);
        else if (lower >= 0) distance = float(at - lower + 1);
        else if (last >= 0) distance = float(x - last + 1);
        float other = infinity<float>();
        if (up) other = float(__ffs(int(up)) - 1 - lane);
        else if (higher < kTile) other = float(higher - at);
        else if (next < n) other = float(next - x);
        distance = smaller(distance, other);
        // A square of 0, of spacings that are far apart, must not meet infinity.
        if (!is_infinite(distance)) distance = call.square * (distance * distance);
        if (x >= n) continue;
        if (bits >> lane & 1) to[x] = -distance;
        else to[x] = call.convention == kInside ? 0 : distance;
      }
      if (last_in_tile >= 0) last = base + last_in_tile;
    }
    return kinds;
  }
};

// A warp for each row, and a block for rows of one plane.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_distance_rows(const __grid_constant__ DistanceCall call) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  const int warps = int(blockDim.x) / kLanes;
  const long long nz = call.shape[0], ny = call.shape[1], nx = call.shape[2];
  const long long tiles = (ny + warps - 1) / warps;
  for (long long block = blockIdx.x; block < call.blocks; block += gridDim.x) {
    const long long plane = block / tiles, y = (block - plane * tiles) * warps + warp;
    const long long number = plane / nz, z = plane - number * nz;
    const long long map = call.first + number;
    const long long volume = map / call.per_volume;
    const unsigned wanted = unsigned(map - volume * call.per_volume);
    unsigned kinds = 0;
    if (y < ny) {
      const long long start = ((volume * nz + z) * ny + y) * nx;
      float* to = static_cast<float*>(call.to) + (plane * ny + y) * nx;
      if (call.item == 1) {
        const auto* classes = static_cast<const unsigned char*>(call.classes) + start;
        kinds = Row<unsigned char>{call, classes, wanted}.write(to, lane);
      } else {
        const auto* classes = static_cast<const unsigned short*>(call.classes) + start;
        kinds = Row<unsigned short>{call, classes, wanted}.write(to, lane);
      }
    }
    const bool some_inside = __syncthreads_or(int(kinds & kSomeInside));
    const bool some_outside = __syncthreads_or(int(kinds & kSomeOutside));
    if (threadIdx.x != 0) continue;
    kinds = (some_inside ? kSomeInside : 0u) | (some_outside ? kSomeOutside : 0u);
    atomicOr(call.of_map + map, kinds);
    if (call.of_plane) atomicOr(call.of_plane + map * nz + z, kinds);
  }
}

// --- Along y and z
// --------------------------------------------------------------------------------

// The squared distance, along the axis too, of the voxel `at`, with `before` and `behind` voxels on
// its line; with the sign of its kind.
//
// It looks outward until rows are farther away than the nearest voxel so far. Looking a few rows
// too far does no harm, so that several are loaded at once.
FL_DEVICE float nearest(const DistanceCall& call, const float* at, long long before,
                        long long behind) {
  const float own = *at;
  const float sign = copysignf(1.0f, own);
  float least = size_of(own);
  float rows = 1.0f;
  const float *low = at, *high = at;
  while ((before > 0 || behind > 0) &&
         call.square * (rows * rows) < smaller(least, call.limit_square)) {
    float below[kAtOnce], above[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      low -= call.step;
      high += call.step;
      below[k] = before > k ? *low : infinity<float>() * sign;
      above[k] = behind > k ? *high : infinity<float>() * sign;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const float square = call.square * (rows * rows);
      // Of another kind: negative, so 0.
      least = smaller(least, larger(below[k] * sign, 0.0f) + square);
      least = smaller(least, larger(above[k] * sign, 0.0f) + square);
      rows += 1.0f;
    }
    before -= kAtOnce;
    behind -= kAtOnce;
  }
  return copysignf(least, own);
}

FL_DEVICE void store(const DistanceCall& call, long long i, float number) {
  if (call.half) static_cast<Half*>(call.to)[i] = from_number<Half>(number);
  else static_cast<float*>(call.to)[i] = number;
}

// The number that is written for a distance.
FL_DEVICE float finished(const DistanceCall& call, bool inside, float distance) {
  switch (call.convention) {
    case kKervadec:
      return inside ? 1.0f - distance : distance;
    case kExact:
      return inside ? -distance : distance;
    default:
      return distance;
  }
}

// The number that is written for every voxel of a map that is all inside or all outside.
FL_DEVICE float finished_alone(const DistanceCall& call, bool inside) {
  if (call.convention == kInside) return inside ? call.limit : 0.0f;
  return call.convention == kExact ? finished(call, inside, call.limit) : 0.0f;
}

// A thread for each voxel, and a block for some rows of neighbouring lines: the rows that its
// threads look at are nearly the same.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_distance_lines(const __grid_constant__ DistanceCall call) {
  const int lane = int(threadIdx.x) & (call.lanes - 1), row = int(threadIdx.x) / call.lanes;
  const int rows = kThreads / call.lanes;
  const long long wide = (call.step + call.lanes - 1) / call.lanes;
  const long long high = (call.length + rows - 1) / rows;
  for (long long block = blockIdx.x; block < call.blocks; block += gridDim.x) {
    const long long tile = block / wide, i = (block - tile * wide) * call.lanes + lane;
    const long long box = tile / high, j = (tile - box * high) * rows + row;
    if (i >= call.step || j >= call.length) continue;
    const long long at = (box * call.length + j) * call.step + i;
    const long long number = box / call.boxes, map = call.first + number;
    const unsigned kinds = call.of_map[map];
    if (kinds != kBoth) {  // nothing more is read
      if (call.last) store(call, at, finished_alone(call, kinds == kSomeInside));
      continue;
    }
    const bool skip = !call.last && call.of_plane &&
                      call.of_plane[map * call.boxes + (box - number * call.boxes)] != kBoth;
    const float found =
        skip ? call.from[at] : nearest(call, call.from + at, j, call.length - 1 - j);
    if (!call.last) {
      static_cast<float*>(call.to)[at] = found;
      continue;
    }
    const bool inside = __float_as_uint(found) >> 31;
    store(call, at,
          finished(call, inside, smaller(sqrtf(size_of(found)) * call.scale, call.limit)));
  }
}
