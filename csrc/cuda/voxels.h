// The voxels of a thread: their offsets, weights and labels.
#pragma once

#include "numbers.h"

// Labels that are no class.
constexpr int kIgnored = -1;
constexpr int kFault = -2;

FL_DEVICE int size_of_type(int type) {
  return type == kF64 || type >= kU64   ? 8
         : type == kF32 || type >= kU32 ? 4
         : type == kU8 || type == kI8   ? 1
                                        : 2;
}

// Bytes from a voxel to the next, for arrays with one axis: a compile-time constant where
// neighbours are loaded in one access.
FL_DEVICE long long step_of(const Call& call, int operand) {
  bool logits = operand == kLogits || operand == kOut;
  if (logits && CONST(interleaved)) return CONST(classes) * size_of_type(CONST(logits_type));
  if (logits && CONST(vector) > 1 && !CONST(staged)) return size_of_type(CONST(logits_type));
  if (operand == kTarget && CONST(packed_target)) return size_of_type(CONST(target_type));
  if (operand == kWeight && CONST(packed_weight)) return size_of_type(CONST(weight_type));
  return call.stride[operand][0];
}

// The offsets of a voxel in every array, in bytes from the start of its sample.
FL_DEVICE void offsets_of(const Call& call, Index voxel, long long (&offset)[kOperands]) {
#pragma unroll
  for (int o = 0; o < kOperands; ++o)
    offset[o] = CONST(axes) == 1 ? static_cast<long long>(voxel) * step_of(call, o) : 0;
  if (CONST(axes) == 1) return;
#pragma unroll
  for (int axis = CONST(axes) - 1; axis >= 0; --axis) {
    Index place = voxel;
    if (axis > 0) {
      voxel = place / Index(call.shape[axis]);
      place -= voxel * Index(call.shape[axis]);
    }
#pragma unroll
    for (int o = 0; o < kOperands; ++o)
      offset[o] += static_cast<long long>(place) * call.stride[o][axis];
  }
}

// Converts a label to its class, kIgnored or kFault, and counts faults.
FL_DEVICE int class_of(const Call& call, long long label, int& faults) {
  if (CONST(ignore_kind) != kNothing && label == call.ignore) return kIgnored;
  bool good = label >= 0 && label < CONST(classes);
  faults += good ? 0 : 1;
  return good ? int(label) : kFault;
}
FL_DEVICE int class_of(const Call& call, unsigned long long label, int& faults) {
  // Labels beyond int64 are neither a class nor ignored.
  if (label >> 63) {
    faults += 1;
    return kFault;
  }
  return class_of(call, static_cast<long long>(label), faults);
}
FL_DEVICE int class_of(const Call& call, double label, int& faults) {
  if (CONST(ignore_kind) != kNothing && label == double(call.ignore)) return kIgnored;
  // A comparison with NaN is false.
  bool good = label >= 0 && label < double(CONST(classes));
  int number = good ? int(label) : 0;
  good = good && double(number) == label;
  faults += good ? 0 : 1;
  return good ? number : kFault;
}

template <class L>
struct LabelAs {
  using type = long long;
};
template <>
struct LabelAs<unsigned long long> {
  using type = unsigned long long;
};

template <class L, int V>
FL_DEVICE void load_labels_as(const Call& call, const char* from, long long step, int (&y)[V],
                              int& faults) {
  using As = typename LabelAs<L>::type;
  if (CONST(packed_target)) {
    Pack<L, V> pack = load_pack<L, V>(from);
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = class_of(call, As(pack.item[j]), faults);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = class_of(call, As(load_one<L>(from + j * step)), faults);
  }
}

// Byte labels, extracted from 32-bit words by one instruction each.
template <int V>
FL_DEVICE void load_byte_labels(const Call& call, const char* from, long long step, int (&y)[V],
                                int& faults) {
  if constexpr (V % 4 == 0) {
    if (CONST(packed_target)) {
      Pack<unsigned, V / 4> words = load_pack<unsigned, V / 4>(from);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        unsigned label = words.item[j / 4] >> (8 * (j % 4)) & 0xffu;
        y[j] = class_of(call, static_cast<long long>(label), faults);
      }
      return;
    }
  }
  load_labels_as<unsigned char>(call, from, step, y, faults);
}

template <int V>
FL_DEVICE void load_labels(const Call& call, const char* from, long long step, int (&y)[V],
                           int& faults) {
  switch (CONST(target_type)) {
    case kU8:
      return load_byte_labels(call, from, step, y, faults);
    case kI8:
      return load_labels_as<signed char>(call, from, step, y, faults);
    case kU16:
      return load_labels_as<unsigned short>(call, from, step, y, faults);
    case kI16:
      return load_labels_as<short>(call, from, step, y, faults);
    case kU32:
      return load_labels_as<unsigned>(call, from, step, y, faults);
    case kI32:
      return load_labels_as<int>(call, from, step, y, faults);
    case kU64:
      return load_labels_as<unsigned long long>(call, from, step, y, faults);
    case kI64:
      return load_labels_as<long long>(call, from, step, y, faults);
    default:
#pragma unroll
      for (int j = 0; j < V; ++j)
        y[j] = class_of(call, floating_at(from + j * step, CONST(target_type)), faults);
  }
}

template <class T, class L>
FL_DEVICE T number_as(L x) {
  return T(x);
}
template <class T>
FL_DEVICE T number_as(Half x) {
  return T(as_number(x));
}
template <class T>
FL_DEVICE T number_as(BFloat x) {
  return T(as_number(x));
}

template <class L, class T, int V>
FL_DEVICE void load_numbers_as(const char* from, long long step, bool packed, T (&to)[V]) {
  if (packed) {
    Pack<L, V> pack = load_pack<L, V>(from);
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = number_as<T>(pack.item[j]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = number_as<T>(load_one<L>(from + j * step));
  }
}

// Loads V numbers of a target or of voxel weights.
template <class T, int V>
FL_DEVICE void load_numbers(const char* from, long long step, int type, bool packed, T (&to)[V]) {
  switch (type) {
    case kF32:
      return load_numbers_as<float>(from, step, packed, to);
    case kF16:
      return load_numbers_as<Half>(from, step, packed, to);
    case kBF16:
      return load_numbers_as<BFloat>(from, step, packed, to);
    case kF64:
      return load_numbers_as<double>(from, step, packed, to);
    case kU8:
      return load_numbers_as<unsigned char>(from, step, packed, to);
    case kI8:
      return load_numbers_as<signed char>(from, step, packed, to);
    case kU16:
      return load_numbers_as<unsigned short>(from, step, packed, to);
    case kI16:
      return load_numbers_as<short>(from, step, packed, to);
    case kU32:
      return load_numbers_as<unsigned>(from, step, packed, to);
    case kI32:
      return load_numbers_as<int>(from, step, packed, to);
    case kU64:
      return load_numbers_as<unsigned long long>(from, step, packed, to);
    default:
      return load_numbers_as<long long>(from, step, packed, to);
  }
}

// The V consecutive voxels of a thread.
template <class T, int V>
struct Voxels {
  bool inside;                  // all V or none, as the sample ends at a multiple of V
  Index first;                  // the index of the first one in the sample
  long long offset[kOperands];  // in bytes from `data`, sample included
  T m[V];                       // voxel weights; 0: ignored
  int y[V];                     // labels, or below 0
  int faults;
};

// Whether every voxel inside has weight 1. After a fault the result is NaN anyway.
FL_DEVICE bool counts_all(const Call& call) {
  return CONST(weight_type) == kNoType && CONST(ignore_kind) == kNothing;
}

// Loads the numbers of a dense target.
template <class T, int V>
FL_DEVICE void target_row(const Call& call, const char* from, T (&g)[V]) {
  load_numbers(from, call.stride[kTarget][0], CONST(target_type), CONST(packed_target) != 0, g);
}

// Whether a dense target has integers, which must be 0 or 1.
FL_DEVICE bool checks_numbers(const Call& call) {
  return CONST(dense) && CONST(target_type) >= kU8 && CONST(target_type) != kNoType;
}
// Whether any number is neither 0, 1 nor ignored. As floating-point numbers, all other integers set
// one of the two highest bits.
FL_DEVICE unsigned high_bits(float x) { return __float_as_uint(x); }
FL_DEVICE unsigned high_bits(double x) { return unsigned(__double_as_longlong(x) >> 32); }
template <class T, int V>
FL_DEVICE bool any_bad_number(const Call& call, const T (&g)[V]) {
  if (!checks_numbers(call)) return false;
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    bool ignored = CONST(ignore_kind) == kValue && g[j] == T(call.ignore);
    bits |= ignored ? 0u : high_bits(g[j]);
  }
  return (bits & 0xc0000000u) != 0;
}

template <class T, int V>
FL_DEVICE void move_to(const Call& call, int sample, Index first, Index last,
                       Voxels<T, V>& voxels) {
  voxels.inside = first < last;
  voxels.first = first;
  voxels.faults = 0;
  offsets_of(call, voxels.inside ? first : 0, voxels.offset);
#pragma unroll
  for (int o = 0; o < kOperands; ++o) voxels.offset[o] += sample * call.sample_stride[o];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    voxels.m[j] = T(voxels.inside ? 1 : 0);
    voxels.y[j] = kIgnored;
  }
  if (!voxels.inside) return;
  if (CONST(weight_type) != kNoType) {
    load_numbers(call.data[kWeight] + voxels.offset[kWeight], step_of(call, kWeight),
                 CONST(weight_type), CONST(packed_weight) != 0, voxels.m);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (!(voxels.m[j] >= T(0) && voxels.m[j] < infinity<T>())) {
        voxels.faults += 1;
        voxels.m[j] = T(0);
      }
  }
  const char* row = call.data[kTarget] + voxels.offset[kTarget];
  if (!CONST(dense)) {
    load_labels(call, row, step_of(call, kTarget), voxels.y, voxels.faults);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (!counts_all(call) && voxels.y[j] < 0) voxels.m[j] = T(0);
  } else if (CONST(ignore_kind) == kClass) {
    T g[V];
    target_row(call, row + call.ignore * call.channel_stride[kTarget], g);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (g[j] > T(0.5)) voxels.m[j] = T(0);
  } else if (CONST(ignore_kind) == kValue) {
    for (int c = 0; c < CONST(classes); ++c, row += call.channel_stride[kTarget]) {
      T g[V];
      target_row(call, row, g);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (g[j] == T(call.ignore)) voxels.m[j] = T(0);
    }
  }
}
