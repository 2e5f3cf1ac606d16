// The surface of a structure, and the distances from its elements to those of another surface; see
// fastloss/backends/surfaces.py for what these are.
//
// All is done in the box of the structure. distance.cu makes distances in float32, which tell where
// the nearest element is: it is looked up, and the whole numbers of voxels to it are written, of
// which the host makes distances in float64.
#include "numbers.h"

constexpr int kThreads = 256;
constexpr int kNowhere = 0x7fffffff;  // beyond all voxels

// Mirrored in fastloss/backends/cuda/surfaces.py.
struct SurfaceCall {
  const void* classes;             // class indices of a volume
  const unsigned char* counted;    // of its voxels, or null
  const unsigned char* structure;  // by class index, whether it belongs to the structure
  int* boxes;                      // (indices, 6): the first voxel along z, y and x, and one beyond
                                   // the last
  unsigned char* elements;         // (z, y, x) of the box: 0 where there is an element, and else 1
  const unsigned char* ends;       // the same of the other surface
  const float* distances;          // from every place in the box to the nearest of `ends`
  long long* places;               // (count,): where there are elements, in any order
  long long* found;                // (count,): voxels to the nearest end along z, y and x
  unsigned char* numbers;          // (count,): of the elements' surroundings, or null
  unsigned long long* count;       // of elements
  long long shape[3];              // of the volume
  long long low[3], size[3];       // of the box: its first voxel, and its places
  int axes;                        // of the image, the last of z, y and x
  int points;                      // elements lie between voxels
  int item;                        // bytes of a class index: 1 or 2
  int indices;
  int shared;            // blocks find boxes in shared memory
  float inverse;         // of the unit of squares
  float square[3];       // of the spacing
  float inverse_square;  // of the last of them; 0 along an axis of one place
};

FL_DEVICE int index_at(const SurfaceCall& call, long long i) {
  return call.item == 1 ? static_cast<const unsigned char*>(call.classes)[i]
                        : static_cast<const unsigned short*>(call.classes)[i];
}

// --- Boxes

// A number that other threads may be changing.
FL_DEVICE int latest(const int* at) {
#ifdef FL_EMULATION
  return __atomic_load_n(at, __ATOMIC_RELAXED);
#else
  return *static_cast<const volatile int*>(at);
#endif
}

FL_DEVICE void extend(int* box, const int* at) {
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    // Most voxels extend nothing; a number that is out of date does no harm.
    if (at[axis] < latest(box + axis)) atomicMin(box + axis, at[axis]);
    if (at[axis] >= latest(box + 3 + axis)) atomicMax(box + 3 + axis, at[axis] + 1);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_surface_boxes(const __grid_constant__ SurfaceCall call) {
  FL_DYNAMIC_SHARED(shared);
  int* boxes = call.shared ? reinterpret_cast<int*>(shared) : call.boxes;
  if (call.shared) {
    for (int i = int(threadIdx.x); i < 6 * call.indices; i += kThreads)
      boxes[i] = i % 6 < 3 ? kNowhere : 0;
    __syncthreads();
  }
  const long long nx = call.shape[2], ny = call.shape[1], voxels = call.shape[0] * ny * nx;
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; i < voxels;
       i += step) {
    const int index = index_at(call, i);
    if (index >= call.indices) continue;
    const long long row = i / nx, z = row / ny;
    const int at[3] = {int(z), int(row - z * ny), int(i - row * nx)};
    extend(boxes + 6 * index, at);
  }
  if (!call.shared) return;
  __syncthreads();
  for (int i = int(threadIdx.x); i < call.indices; i += kThreads) {
    const int* own = boxes + 6 * i;
    if (own[0] == kNowhere) continue;
    const int last[3] = {own[3] - 1, own[4] - 1, own[5] - 1};
    extend(call.boxes + 6 * i, own);
    extend(call.boxes + 6 * i, last);
  }
}

// --- Elements

struct Place {
  long long at[3];
};

FL_DEVICE Place place_of(const SurfaceCall& call, long long i) {
  const long long row = i / call.size[2], z = row / call.size[1];
  return {{z, row - z * call.size[1], i - row * call.size[2]}};
}

// A voxel of the volume; beyond it there is nothing.
struct Voxel {
  bool inside, counted;
};

FL_DEVICE Voxel voxel_at(const SurfaceCall& call, long long z, long long y, long long x) {
  if (z < 0 || y < 0 || x < 0 || z >= call.shape[0] || y >= call.shape[1] || x >= call.shape[2])
    return {false, false};
  const long long i = (z * call.shape[1] + y) * call.shape[2] + x;
  return {call.structure[index_at(call, i)] != 0, !call.counted || call.counted[i] != 0};
}

// The number of a point's surroundings, whose bits are the voxels in C order; 0 if it is no
// element.
FL_DEVICE unsigned point_at(const SurfaceCall& call, const Place& p) {
  unsigned number = 0, all = 0;
  bool counted = false;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    if (call.axes < 3 && corner >= 4) continue;  // axes of one voxel have no surroundings
    const long long z = call.low[0] + p.at[0] + (call.axes < 3 ? 0 : (corner >> 2) - 1);
    const Voxel v = voxel_at(call, z, call.low[1] + p.at[1] + (corner >> 1 & 1) - 1,
                             call.low[2] + p.at[2] + (corner & 1) - 1);
    number = number << 1 | unsigned(v.inside);
    all = all << 1 | 1u;
    counted = counted || v.counted;
  }
  return counted && number != all ? number : 0;
}

FL_DEVICE bool is_edge(const SurfaceCall& call, const Place& p) {
  const long long z = call.low[0] + p.at[0], y = call.low[1] + p.at[1], x = call.low[2] + p.at[2];
  const Voxel own = voxel_at(call, z, y, x);
  if (!own.inside || !own.counted) return false;
  bool inner = voxel_at(call, z, y, x - 1).inside && voxel_at(call, z, y, x + 1).inside;
  if (call.axes > 1)
    inner = inner && voxel_at(call, z, y - 1, x).inside && voxel_at(call, z, y + 1, x).inside;
  if (call.axes > 2)
    inner = inner && voxel_at(call, z - 1, y, x).inside && voxel_at(call, z + 1, y, x).inside;
  return !inner;
}

// Marks and counts the elements.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_surface_elements(const __grid_constant__ SurfaceCall call) {
  const long long places = call.size[0] * call.size[1] * call.size[2];
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long base = static_cast<long long>(kThreads) * blockIdx.x; base < places;
       base += step) {
    const long long i = base + threadIdx.x;
    bool element = false;
    if (i < places) {
      const Place p = place_of(call, i);
      element = call.points ? point_at(call, p) != 0 : is_edge(call, p);
      call.elements[i] = !element;
    }
    const int count = __syncthreads_count(element);
    if (threadIdx.x == 0 && count) atomicAdd(call.count, static_cast<unsigned long long>(count));
  }
}

// Lists the places of the elements. A warp takes room for all of its own at once.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_surface_places(const __grid_constant__ SurfaceCall call) {
  const long long places = call.size[0] * call.size[1] * call.size[2];
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  const int lane = int(threadIdx.x) % kLanes;
  for (long long base = static_cast<long long>(kThreads) * blockIdx.x; base < places;
       base += step) {
    const long long i = base + threadIdx.x;
    const bool element = i < places && call.elements[i] == 0;
    const unsigned all = __ballot_sync(kAllLanes, element);
    if (!all) continue;
    unsigned long long to = 0;
    if (lane == 0) to = atomicAdd(call.count, static_cast<unsigned long long>(__popc(all)));
    to = __shfl_sync(kAllLanes, to, 0);
    if (element) call.places[to + __popc(all & ((1u << lane) - 1))] = i;
  }
}

// --- Distances

// Whether there is an end so many voxels away along the axes, before or behind.
FL_DEVICE bool is_end(const SurfaceCall& call, const Place& p, const long long* steps) {
  for (int signs = 0; signs < 8; ++signs) {
    long long i = 0;
    bool within = true;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const long long at = p.at[axis] + (signs >> axis & 1 ? steps[axis] : -steps[axis]);
      within = within && at >= 0 && at < call.size[axis];
      i = i * call.size[axis] + at;
    }
    if (within && call.ends[i] == 0) return true;
  }
  return false;
}

// Voxels to the nearest end, 21 bits for each axis; or, if there is no end at that distance or it
// is infinite, the distance's bits and a minus sign.
FL_DEVICE long long nearest_end(const SurfaceCall& call, const Place& p, float distance) {
  const float length = distance * call.inverse, square = length * length;
  if (square < infinity<float>()) {
    const float slack = square * 1e-6f;  // more than rounding has moved it
    long long steps[3];
    for (steps[0] = 0; steps[0] < call.size[0]; ++steps[0]) {
      const float z = float(steps[0]), of_plane = call.square[0] * (z * z);
      if (of_plane > square + slack) break;
      for (steps[1] = 0; steps[1] < call.size[1]; ++steps[1]) {
        const float y = float(steps[1]), of_row = of_plane + call.square[1] * (y * y);
        if (of_row > square + slack) break;
        const float rest = larger(square - of_row, 0.0f);
        const float x = floorf(sqrtf(rest * call.inverse_square) + 0.5f);
        if (fabsf(of_row + call.square[2] * (x * x) - square) > slack) continue;
        steps[2] = static_cast<long long>(x);
        if (is_end(call, p, steps)) return (steps[0] << 21 | steps[1]) << 21 | steps[2];
      }
    }
  }
  return static_cast<long long>(1ull << 63 | __float_as_uint(distance));
}

// A thread for each element.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_surface_distances(const __grid_constant__ SurfaceCall call) {
  const long long count = static_cast<long long>(*call.count);
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long k = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; k < count;
       k += step) {
    const long long i = call.places[k];
    const Place p = place_of(call, i);
    call.found[k] = nearest_end(call, p, call.distances[i]);
    if (call.numbers) call.numbers[k] = static_cast<unsigned char>(point_at(call, p));
  }
}
