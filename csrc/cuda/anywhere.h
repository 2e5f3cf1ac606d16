// Numbers of any type, at any address.
#pragma once

#include "numbers.h"

constexpr int kAnyAxes = 18;

// A GPU accesses numbers only at multiples of their size.
template <class T>
FL_DEVICE T load_anywhere(const char* from, bool aligned) {
  if (aligned) return load_one<T>(from);
  union {
    T number;
    char bytes[sizeof(T)];
  } found;
  for (unsigned i = 0; i < sizeof(T); ++i) found.bytes[i] = from[i];
  return found.number;
}

// float64 holds every number exactly but integers beyond 2⁵³.
FL_DEVICE double number_anywhere(int type, const char* from, bool aligned) {
  switch (type) {
    case kF32:
      return double(load_anywhere<float>(from, aligned));
    case kF16:
      return double(as_number(load_anywhere<Half>(from, aligned)));
    case kBF16:
      return double(as_number(load_anywhere<BFloat>(from, aligned)));
    case kF64:
      return load_anywhere<double>(from, aligned);
    case kU8:
      return double(load_anywhere<unsigned char>(from, aligned));
    case kI8:
      return double(load_anywhere<signed char>(from, aligned));
    case kU16:
      return double(load_anywhere<unsigned short>(from, aligned));
    case kI16:
      return double(load_anywhere<short>(from, aligned));
    case kU32:
      return double(load_anywhere<unsigned>(from, aligned));
    case kI32:
      return double(load_anywhere<int>(from, aligned));
    case kU64:
      return double(load_anywhere<unsigned long long>(from, aligned));
    default:
      return double(load_anywhere<long long>(from, aligned));
  }
}
