// Class indices of labels, and 0 and 1 of masks, of any number type, strides and alignment.
#include "anywhere.h"

constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/indices.py.
struct IndexCall {
  const char* from;
  char* to;  // uint8, or uint16 where `wide`
  unsigned long long count;
  unsigned long long shape[kAnyAxes];
  long long from_stride[kAnyAxes], to_stride[kAnyAxes];  // bytes
  long long from_channel, to_channel;  // the same between classes, of a dense target
  double ignored;                      // a label, or the number of a dense target
  int axes;
  int type;
  int aligned;  // numbers lie at multiples of their size
  int classes;  // labels beyond become this; 0: a mask, 1 for what is not 0
  int ignores;  // of enum Ignore
  int wide;
};

template <class T>
FL_DEVICE T load_anywhere(const IndexCall& call, const char* from) {
  return load_anywhere<T>(from, call.aligned != 0);
}

FL_DEVICE int index_of(const IndexCall& call, long long label) {
  return label >= 0 && label < call.classes ? int(label) : call.classes;
}
FL_DEVICE int index_of(const IndexCall& call, unsigned long long label) {
  return label < static_cast<unsigned long long>(call.classes) ? int(label) : call.classes;
}
// Labels with a fraction are of no class, nor is NaN.
FL_DEVICE int index_of(const IndexCall& call, double label) {
  const bool known = label >= 0 && label < double(call.classes);
  const int index = known ? int(label) : call.classes;
  return known && double(index) != label ? call.classes : index;
}

template <class Label>
FL_DEVICE int floating_index(const IndexCall& call, const char* from) {
  return index_of(call, double(as_number(load_anywhere<Label>(call, from))));
}
template <class Label>
FL_DEVICE int integer_index(const IndexCall& call, const char* from) {
  return index_of(call, static_cast<long long>(load_anywhere<Label>(call, from)));
}

// By their bits: 0 has none but the sign, and a GPU may take small numbers for 0.
template <class Bits>
FL_DEVICE int mask_at(const IndexCall& call, const char* from, bool is_signed) {
  const Bits bits = load_anywhere<Bits>(call, from);
  return (is_signed ? Bits(bits << 1) : bits) != 0;
}

FL_DEVICE int index_at(const IndexCall& call, const char* from) {
  using Unsigned = unsigned long long;
  if (call.classes == 0) {
    const bool floating = call.type <= kF64;
    switch (call.type) {
      case kU8:
      case kI8:
        return mask_at<unsigned char>(call, from, false);
      case kF16:
      case kBF16:
      case kU16:
      case kI16:
        return mask_at<unsigned short>(call, from, floating);
      case kF32:
      case kU32:
      case kI32:
        return mask_at<unsigned>(call, from, floating);
      default:
        return mask_at<Unsigned>(call, from, floating);
    }
  }
  switch (call.type) {
    case kF32:
      return floating_index<float>(call, from);
    case kF16:
      return floating_index<Half>(call, from);
    case kBF16:
      return floating_index<BFloat>(call, from);
    case kF64:
      return floating_index<double>(call, from);
    case kU8:
      return integer_index<unsigned char>(call, from);
    case kI8:
      return integer_index<signed char>(call, from);
    case kU16:
      return integer_index<unsigned short>(call, from);
    case kI16:
      return integer_index<short>(call, from);
    case kU32:
      return integer_index<unsigned>(call, from);
    case kI32:
      return integer_index<int>(call, from);
    case kU64:
      return index_of(call, load_anywhere<Unsigned>(call, from));
    default:
      return integer_index<long long>(call, from);
  }
}

// The voxel i, from the slowest axis to the fastest.
FL_DEVICE void walk(const IndexCall& call, unsigned long long i, const char*& from, char*& to) {
  for (int axis = call.axes - 1; axis >= 0; --axis) {
    const unsigned long long next = i / call.shape[axis];
    const long long at = static_cast<long long>(i - next * call.shape[axis]);
    from += at * call.from_stride[axis];
    to += at * call.to_stride[axis];
    i = next;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_class_indices(const __grid_constant__ IndexCall call) {
  const unsigned long long step = static_cast<unsigned long long>(kThreads) * gridDim.x;
  for (unsigned long long i = static_cast<unsigned long long>(kThreads) * blockIdx.x + threadIdx.x;
       i < call.count; i += step) {
    const char* from = call.from;
    char* to = call.to;
    walk(call, i, from, to);
    int index = index_at(call, from);
    if (call.ignores != kNothing && double(index) == call.ignored) index = call.classes;
    if (call.wide) *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(index);
    else *reinterpret_cast<unsigned char*>(to) = static_cast<unsigned char>(index);
  }
}

// A thread for each voxel of a dense target: where a class is above one half, unless the voxel is
// ignored, because of the class of this number or of a number anywhere.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_dense_masks(const __grid_constant__ IndexCall call) {
  const unsigned long long step = static_cast<unsigned long long>(kThreads) * gridDim.x;
  for (unsigned long long i = static_cast<unsigned long long>(kThreads) * blockIdx.x + threadIdx.x;
       i < call.count; i += step) {
    const char* from = call.from;
    char* to = call.to;
    walk(call, i, from, to);
    const auto number = [&](long long c) {
      return number_anywhere(call.type, from + c * call.from_channel, call.aligned != 0);
    };
    bool counts = true;
    if (call.ignores == kClass) counts = !(number(static_cast<long long>(call.ignored)) > 0.5);
    if (call.ignores == kValue)
      for (int c = 0; c < call.classes; ++c) counts = counts && number(c) != call.ignored;
    for (int c = 0; c < call.classes; ++c)
      to[c * call.to_channel] = counts && number(c) > 0.5 ? 1 : 0;
  }
}
