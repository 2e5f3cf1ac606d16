// The bins of histograms of errors, as fastloss/histogram.py has them, for CPUs and GPUs.
//
// A bin holds numbers of equal leading float32 bits, so that v is the start of its bin plus d units
// in the last place, with d the other bits. Counts and sums of d are integers: they are the same
// bits in whatever order they add, and so for any number of threads.
#pragma once

#ifdef FL_ANYWHERE  // CUDA: see call.h
#define FL_PLACING FL_DEVICE
#define FL_UNROLLED _Pragma("unroll")
#else
#include <math.h>
#include <stddef.h>
#define FL_ANYWHERE
// Internal, as copies for other instruction sets must not be merged.
#define FL_PLACING static inline __attribute__((always_inline))
#define FL_UNROLLED _Pragma("GCC unroll 8")
#endif

namespace fastloss {

// The kinds of error, in the order of `fastloss.histogram.HISTOGRAMS`.
enum class ErrorKind : int { error, hinge };
constexpr int kMaxHistograms = 2;

// Octaves from 2^exponent on, each of 2^bits bins.
struct Octaves {
  int exponent, count, bits;
};
static FL_ANYWHERE constexpr Octaves kSmallErrors[] = {{-24, 16, 6}, {-8, 6, 8}, {-2, 1, 11}};
static FL_ANYWHERE constexpr Octaves kLargeErrors[] = {{-24, 11, 7}, {-13, 11, 10}, {-2, 1, 11}};
static FL_ANYWHERE constexpr Octaves kHingeErrors[] = {{-12, 10, 6}, {-2, 1, 8}, {-1, 3, 11},
                                                       {2, 2, 12},   {4, 1, 10}, {5, 11, 7}};

FL_ANYWHERE constexpr int float_bits(int exponent) { return (exponent + 127) << 23; }

// One more than the bins of the octaves: that of what is above them all.
template <size_t N>
FL_ANYWHERE constexpr int last_place(const Octaves (&octaves)[N]) {
  int count = 1;
  for (size_t i = 0; i < N; ++i) count += octaves[i].count << octaves[i].bits;
  return count;
}
// Where the octaves end, as float32 bits.
template <size_t N>
FL_ANYWHERE constexpr int end_bits(const Octaves (&octaves)[N]) {
  return float_bits(octaves[N - 1].exponent + octaves[N - 1].count);
}

FL_ANYWHERE constexpr int bins_of(ErrorKind kind) {
  return kind == ErrorKind::error ? 2 + last_place(kSmallErrors) + last_place(kLargeErrors)
                                  : 1 + last_place(kHingeErrors);
}

// The place of v among these octaves and d, given the bits of v. I: int, or a vector of them.
template <class I, size_t N>
FL_PLACING void find_place(const Octaves (&octaves)[N], I bits, I& at, I& rest) {
  const int last = last_place(octaves), end = end_bits(octaves);
  bits = bits < end ? bits : I{} + end;
  at = rest = I{};
  int first = 1;
  FL_UNROLLED
  for (size_t o = 0; o < N; ++o) {
    const int start = float_bits(octaves[o].exponent);
    const int shift = 23 - octaves[o].bits;
    at = bits >= start ? ((bits - start) >> shift) + first : at;
    rest = bits >= start ? bits & ((1 << shift) - 1) : rest;
    first += octaves[o].count << octaves[o].bits;
  }
  at = at < last ? at : I{} + last;
}

// v = start + unit · d for the numbers of a bin; of the first bin 0, which they are taken for.
struct BinScale {
  double start, unit;
};
template <size_t N>
FL_PLACING BinScale scale_of_place(const Octaves (&octaves)[N], int place) {
  if (place == 0) return {0, 0};
  int first = 1;
  for (size_t o = 0; o < N; ++o) {
    const int count = octaves[o].count << octaves[o].bits, bins = 1 << octaves[o].bits;
    const int at = place - first;
    if (at < count) {
      const double octave = ldexp(1.0, octaves[o].exponent + at / bins);
      return {octave + octave * (at % bins) / bins, ldexp(octave, -23)};
    }
    first += count;
  }
  return {ldexp(1.0, octaves[N - 1].exponent + octaves[N - 1].count), 0};
}
FL_PLACING BinScale scale_of_bin(ErrorKind kind, int bin) {
  if (kind == ErrorKind::hinge) return scale_of_place(kHingeErrors, bin);
  if (bin <= last_place(kSmallErrors)) return scale_of_place(kSmallErrors, bin);
  return scale_of_place(kLargeErrors, bins_of(kind) - 1 - bin);
}

// Numbers of one class in a tally: background, foreground, and one place for voxels that do not
// count.
FL_ANYWHERE constexpr long long tally_size(ErrorKind kind) {
  return 2 * (long long)(bins_of(kind)) + 1;
}

// Without voxel weights a tally is one word: the count in its upper bits, Σ d in the lower ones.
// With them, m rounded to `kWeightBits` below the largest is an integer, and there are two words, Σ
// m and Σ m d. As d has up to 17 bits, either holds this many voxels.
constexpr int kCountShift = 40;
constexpr int kWeightBits = 21;
constexpr long long kMostTallied = 1ll << 23;

}  // namespace fastloss
