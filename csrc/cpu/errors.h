// The bins of histograms of errors, as fastloss/histogram.py has them.
//
// A bin holds numbers of equal leading float32 bits, so that v is the start of its bin plus d units
// in the last place, with d the other bits. Counts and sums of d are integers: they are the same
// bits in whatever order they add, and so for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastloss {

// The kinds of error, in the order of `fastloss.histogram.HISTOGRAMS`.
enum class ErrorKind : int32_t { error, hinge };
constexpr int kMaxHistograms = 2;

// Octaves from 2^exponent on, each of 2^bits bins.
struct Octaves {
  int exponent, count, bits;
};
constexpr Octaves kSmallErrors[] = {{-24, 16, 6}, {-8, 6, 8}, {-2, 1, 11}};
constexpr Octaves kLargeErrors[] = {{-24, 11, 7}, {-13, 11, 10}, {-2, 1, 11}};
constexpr Octaves kHingeErrors[] = {{-12, 10, 6}, {-2, 1, 8}, {-1, 3, 11},
                                    {2, 2, 12},   {4, 1, 10}, {5, 11, 7}};

constexpr int32_t float_bits(int exponent) { return (exponent + 127) << 23; }

// One more than the bins of the octaves: that of what is above them all.
template <size_t N>
constexpr int32_t last_place(const Octaves (&octaves)[N]) {
  int32_t count = 1;
  for (size_t i = 0; i < N; ++i) count += octaves[i].count << octaves[i].bits;
  return count;
}
// Where the octaves end, as float32 bits.
template <size_t N>
constexpr int32_t end_bits(const Octaves (&octaves)[N]) {
  return float_bits(octaves[N - 1].exponent + octaves[N - 1].count);
}

constexpr int32_t bins_of(ErrorKind kind) {
  return kind == ErrorKind::error ? 2 + last_place(kSmallErrors) + last_place(kLargeErrors)
                                  : 1 + last_place(kHingeErrors);
}

// Numbers of one class in a tally: background, foreground, and one place for voxels that do not
// count.
constexpr int64_t tally_size(ErrorKind kind) { return 2 * int64_t(bins_of(kind)) + 1; }

// Without voxel weights a tally is one word: the count in its upper bits, Σ d in the lower ones.
// With them, m rounded to `kWeightBits` below the largest is an integer, and there are two words, Σ
// m and Σ m d. As d has up to 17 bits, either holds this many voxels.
constexpr int kCountShift = 40;
constexpr int kWeightBits = 21;
constexpr int64_t kMostTallied = int64_t(1) << 23;

}  // namespace fastloss
