// Adds the blocks' sums to those of the batch.
#pragma once

#include "numbers.h"

constexpr int kFinishSlices = 32;

// B · ⌈count / 32⌉ blocks of (32, kFinishSlices) threads: each column of threads adds one of the
// `count` numbers of every row of `partial`, and each of its threads takes consecutive rows. The
// last number of a row is its number of faults: all sums of a sample with a fault become NaN. Calls
// store(sample, i, sum of the i-th number).
template <class Number, class Store>
FL_DEVICE void finish_numbers(const Call& call, int count, const Store& store) {
  __shared__ double parts[kFinishSlices][kLanes + 1];
  __shared__ double faults[kFinishSlices];
  int width = count + 1, columns = (count + kLanes - 1) / kLanes;
  int sample = int(blockIdx.x) / columns, slice = int(threadIdx.y), lane = int(threadIdx.x);
  int i = (int(blockIdx.x) - sample * columns) * kLanes + lane;
  const Number* row =
      static_cast<const Number*>(call.partial) + size_t(sample) * call.blocks * size_t(width);
  int share = (call.blocks + kFinishSlices - 1) / kFinishSlices;
  int first = slice * share, last = first + share < call.blocks ? first + share : call.blocks;
  double sum = 0, bad = 0;
  if (i < count)
    for (int block = first; block < last; ++block) sum += double(row[size_t(block) * width + i]);
  if (lane == 0)
    for (int block = first; block < last; ++block)
      bad += double(row[size_t(block) * width + count]);
  parts[slice][lane] = sum;
  if (lane == 0) faults[slice] = bad;
  __syncthreads();
  if (slice != 0 || i >= count) return;
  for (int s = 1; s < kFinishSlices; ++s) sum += parts[s][lane];
  double all_bad = 0;
  for (int s = 0; s < kFinishSlices; ++s) all_bad += faults[s];
  if (all_bad > 0) sum = __longlong_as_double(0x7ff8000000000000ll);
  store(sample, i, sum);
}
