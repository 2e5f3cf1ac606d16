// What metrics read of arrays of any number type: the largest class, labels, masks, and which
// voxels count.
#include "index_call.h"

// Mirrored in fastloss/backends/cuda/metrics.py.
struct ReadCall {
  IndexCall view;              // `classes`: channels, of which `from_channel` apart
  const unsigned char* table;  // which channels count, or which class indices
  int* found;                  // the largest label, and whether one is none
  double threshold;
  int combined;  // what is written is there already, and set to 0 only
};

constexpr long long kNan = 0x7fffffffffffffff;

// Integers in the order of the numbers: kNan is the largest, and the zeros are equal. By their
// bits, as a GPU may take small numbers for 0.
FL_DEVICE long long key_of(float x) {
  const int bits = __float_as_int(x), size = bits & 0x7fffffff;
  if (size > 0x7f800000) return kNan;
  return bits < 0 ? -size : size;
}
FL_DEVICE long long key_of(double x) {
  const long long bits = __double_as_longlong(x), size = bits & kNan;
  if (size > 0x7ff0000000000000ll) return kNan;
  return bits < 0 ? -size : size;
}

// A channel's number as a key: floating types by their bits, integers as float32.
template <class In>
struct Channels {
  const ReadCall& call;
  const char* from;
  FL_DEVICE long long operator()(int c) const {
    return key_of(as_number(
        load_anywhere<In>(call.view, from + static_cast<long long>(c) * call.view.from_channel)));
  }
};
struct IntegerChannels {
  const ReadCall& call;
  const char* from;
  FL_DEVICE long long operator()(int c) const {
    const char* at = from + static_cast<long long>(c) * call.view.from_channel;
    return key_of(float(number_anywhere(call.view.type, at, call.view.aligned != 0)));
  }
};

template <class Keys>
FL_DEVICE int first_largest(const ReadCall& call, Keys key) {
  long long most = key(0);
  int found = 0;
#pragma unroll 4
  for (int c = 1; c < call.view.classes; ++c) {
    const long long other = key(c);
    if (other > most) {
      most = other;
      found = c;
    }
  }
  return found;
}

template <class Keys>
FL_DEVICE bool any_above(const ReadCall& call, Keys key, long long threshold) {
  bool found = false;
  for (int c = 0; c < call.view.classes && !found; ++c) {
    if (!call.table[c]) continue;
    const long long own = key(c);
    found = own > threshold && own != kNan;
  }
  return found;
}

FL_DEVICE void write(const ReadCall& call, char* to, int number) {
  if (call.view.wide) *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(number);
  else *reinterpret_cast<unsigned char*>(to) = static_cast<unsigned char>(number);
}

// Calls `make(from, to)` for the voxels of a thread.
template <class Make>
FL_DEVICE void for_voxels(const ReadCall& call, Make make) {
  const unsigned long long step = static_cast<unsigned long long>(kThreads) * gridDim.x;
  for (unsigned long long i = static_cast<unsigned long long>(kThreads) * blockIdx.x + threadIdx.x;
       i < call.view.count; i += step) {
    const char* from = call.view.from;
    char* to = call.view.to;
    walk(call.view, i, from, to);
    make(from, to);
  }
}

// The class of the largest score, the first of those that are equal; NaN is larger.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_likeliest(const __grid_constant__ ReadCall call) {
  for_voxels(call, [&](const char* from, char* to) {
    int found = 0;
    switch (call.view.type) {
      case kF32:
        found = first_largest(call, Channels<float>{call, from});
        break;
      case kF16:
        found = first_largest(call, Channels<Half>{call, from});
        break;
      case kBF16:
        found = first_largest(call, Channels<BFloat>{call, from});
        break;
      case kF64:
        found = first_largest(call, Channels<double>{call, from});
        break;
      default:
        found = first_largest(call, IntegerChannels{call, from});
    }
    write(call, to, found);
  });
}

// Whether one of some channels is above the threshold. NaN is not.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_masks(const __grid_constant__ ReadCall call) {
  for_voxels(call, [&](const char* from, char* to) {
    bool found = false;
    switch (call.view.type) {
      case kF32:
        found = any_above(call, Channels<float>{call, from}, key_of(float(call.threshold)));
        break;
      case kF16:
        found = any_above(call, Channels<Half>{call, from}, key_of(float(call.threshold)));
        break;
      case kBF16:
        found = any_above(call, Channels<BFloat>{call, from}, key_of(float(call.threshold)));
        break;
      case kF64:
        found = any_above(call, Channels<double>{call, from}, key_of(call.threshold));
        break;
      default:
        found = any_above(call, IntegerChannels{call, from}, key_of(float(call.threshold)));
    }
    write(call, to, found);
  });
}

// Whether a class index is one of some.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_members(const __grid_constant__ ReadCall call) {
  for_voxels(call, [&](const char* from, char* to) {
    const int index = call.view.type == kU8 ? load_anywhere<unsigned char>(call.view, from)
                                            : load_anywhere<unsigned short>(call.view, from);
    write(call, to, call.table[index]);
  });
}

// Whether no channel has a number that is ignored.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_counted(const __grid_constant__ ReadCall call) {
  for_voxels(call, [&](const char* from, char* to) {
    bool counts = !call.combined || *to != 0;
    for (int c = 0; c < call.view.classes && counts; ++c) {
      const char* at = from + static_cast<long long>(c) * call.view.from_channel;
      counts = number_anywhere(call.view.type, at, call.view.aligned != 0) != call.view.ignored;
    }
    write(call, to, counts);
  });
}

// The largest label that is not ignored; and whether one is no class index below `classes`, for it
// is negative, too large, NaN, or has a fraction.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_largest_label(const __grid_constant__ ReadCall call) {
  __shared__ int of_block;
  if (threadIdx.x == 0) of_block = 0;
  int largest = 0;
  bool wrong = false;
  for_voxels(call, [&](const char* from, char*) {
    const double label = number_anywhere(call.view.type, from, call.view.aligned != 0);
    if (call.view.ignores != kNothing && label == call.view.ignored) return;
    const bool known = label >= 0 && label < double(call.view.classes);
    const int index = known ? int(label) : 0;
    largest = max(largest, index);
    wrong = wrong || !known || double(index) != label;
  });
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
  const bool any_wrong = __syncthreads_or(wrong);
  if (threadIdx.x % kLanes == 0) atomicMax(&of_block, largest);
  __syncthreads();
  if (threadIdx.x != 0) return;
  atomicMax(call.found, of_block);
  if (any_wrong) atomicOr(call.found + 1, 1);
}
