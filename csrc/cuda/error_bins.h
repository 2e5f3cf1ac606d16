// The errors of a voxel: the bin that counts each, and how the number that it is found by changes.
#pragma once

#include "numbers.h"

#include "errors.h"  // after call.h

using fastloss::ErrorKind;

struct Binned {
  int place;  // among the bins of the background, then those of the foreground
  int rest;   // d, in units of its bin
  int slope;  // of v by p, of a hinge by the logit: 1 or −1
};

// Any numbers, NaN too, have a place.
template <class T>
FL_DEVICE Binned bin_of(ErrorKind kind, T p, T q, T x, T g) {
  const bool foreground = g > T(0.5);
  Binned found;
  if (kind == ErrorKind::hinge) {
    const float error = float(T(1) + (foreground ? -x : x));
    fastloss::find_place(fastloss::kHingeErrors, __float_as_int(error), found.place, found.rest);
    found.slope = foreground ? -1 : 1;
  } else {
    const float error = float(foreground ? q : p), others = float(foreground ? p : q);
    const bool large = error > others;
    int from_end, rest;
    fastloss::find_place(fastloss::kSmallErrors, __float_as_int(error), found.place, found.rest);
    fastloss::find_place(fastloss::kLargeErrors, __float_as_int(others), from_end, rest);
    if (large) {
      found.place = fastloss::bins_of(kind) - 1 - from_end;
      found.rest = rest;
    }
    found.slope = foreground == large ? 1 : -1;
  }
  if (foreground) found.place += fastloss::bins_of(kind);
  return found;
}

// Which kinds of error are counted, as bits; and how many places they have.
FL_DEVICE bool has_kind(int histograms, ErrorKind kind) { return histograms >> int(kind) & 1; }
FL_DEVICE int tally_places(int histograms) {
  int places = 0;
  for (int kind = 0; kind < fastloss::kMaxHistograms; ++kind)
    if (has_kind(histograms, ErrorKind(kind))) places += 2 * fastloss::bins_of(ErrorKind(kind));
  return places;
}

// The power of 2 by which voxel weights become integers, given the bits of the largest as double.
FL_DEVICE double weight_scale(unsigned long long largest) {
  if (largest == 0) return 1.0;
  int exponent;
  frexp(__longlong_as_double(static_cast<long long>(largest)), &exponent);
  return ldexp(1.0, fastloss::kWeightBits - exponent);
}
