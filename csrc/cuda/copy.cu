// Copies numbers byte by byte between a misaligned array and aligned memory: a GPU accesses numbers
// only at multiples of their size.

// Mirrored in fastloss/backends/cuda/copies.py.
constexpr int kCopyAxes = 18;

struct CopyCall {
  unsigned char* array;
  unsigned char* copy;
  unsigned long long count;  // numbers
  unsigned long long shape[kCopyAxes];
  long long array_stride[kCopyAxes], copy_stride[kCopyAxes];  // bytes
  int axes;
  int item;  // bytes of a number
  int back;  // from the copy to the array
};

extern "C" __global__ void __launch_bounds__(256)
    fastloss_copy(const __grid_constant__ CopyCall call) {
  const unsigned long long step = 256ull * gridDim.x;
  for (unsigned long long i = 256ull * blockIdx.x + threadIdx.x; i < call.count; i += step) {
    unsigned char* array = call.array;
    unsigned char* copy = call.copy;
    unsigned long long rest = i;
    for (int axis = call.axes - 1; axis >= 0; --axis) {
      const unsigned long long next = rest / call.shape[axis];
      const long long at = rest - next * call.shape[axis];
      array += at * call.array_stride[axis];
      copy += at * call.copy_stride[axis];
      rest = next;
    }
    for (int byte = 0; byte < call.item; ++byte) {
      if (call.back) array[byte] = copy[byte];
      else copy[byte] = array[byte];
    }
  }
}
