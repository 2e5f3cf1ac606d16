// The voxels at the boundary of their class: those that share a face with a voxel of another one,
// or lie at the edge of the array.
#include "anywhere.h"

constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/fields.py.
struct BoundaryCall {
  const void* classes;  // class indices or masks, (volumes, *spatial)
  unsigned char* to;    // of the same shape
  unsigned long long count;
  unsigned long long shape[kAnyAxes];  // of the spatial axes
  int axes;
  int item;   // bytes of a class index: 1 or 2
  int masks;  // only what is not 0 has a boundary
};

template <class Index>
FL_DEVICE bool is_at_boundary(const BoundaryCall& call, unsigned long long i) {
  const Index* own = static_cast<const Index*>(call.classes) + i;
  const Index index = *own;
  if (call.masks && index == 0) return false;
  unsigned long long rest = i;
  long long step = 1;
  bool found = false;
  for (int axis = call.axes - 1; axis >= 0; --axis) {
    const unsigned long long n = call.shape[axis], next = rest / n, place = rest - next * n;
    found = found || place == 0 || place == n - 1 || own[-step] != index || own[step] != index;
    step *= static_cast<long long>(n);
    rest = next;
  }
  return found;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_boundary_voxels(const __grid_constant__ BoundaryCall call) {
  const unsigned long long step = static_cast<unsigned long long>(kThreads) * gridDim.x;
  for (unsigned long long i = static_cast<unsigned long long>(kThreads) * blockIdx.x + threadIdx.x;
       i < call.count; i += step)
    call.to[i] = call.item == 1 ? is_at_boundary<unsigned char>(call, i)
                                : is_at_boundary<unsigned short>(call, i);
}
