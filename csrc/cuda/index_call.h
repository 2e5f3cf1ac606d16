// Arrays of any number type, strides and alignment, from which one number a voxel is made.
#pragma once

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
