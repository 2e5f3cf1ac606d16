// The sums of a batch, from those of its blocks.
#pragma once

#include "block.h"

constexpr int kFinishSlices = 32;

// B · ⌈(S · C + 1) / 32⌉ blocks of (32, kFinishSlices) threads: every column of threads adds one
// sum, its threads the sums of consecutive blocks each. A sample with a fault becomes NaN
// throughout.
FL_DEVICE void finish_sums(const Call& call) {
  __shared__ double parts[kFinishSlices][kLanes + 1];
  __shared__ double faults[kFinishSlices];
  int count = CONST(slots) * CONST(classes), width = count + 2;
  int columns = (count + kLanes) / kLanes;
  int sample = int(blockIdx.x) / columns, slice = int(threadIdx.y), lane = int(threadIdx.x);
  int i = (int(blockIdx.x) - sample * columns) * kLanes + lane;
  const double* row = call.partial + size_t(sample) * call.blocks * size_t(width);
  int share = (call.blocks + kFinishSlices - 1) / kFinishSlices;
  int first = slice * share, last = first + share < call.blocks ? first + share : call.blocks;
  double sum = 0, bad = 0;
  if (i <= count)
    for (int block = first; block < last; ++block) sum += row[size_t(block) * width + i];
  if (lane == 0)
    for (int block = first; block < last; ++block) bad += row[size_t(block) * width + count + 1];
  parts[slice][lane] = sum;
  if (lane == 0) faults[slice] = bad;
  __syncthreads();
  if (slice != 0 || i > count) return;
  for (int s = 1; s < kFinishSlices; ++s) sum += parts[s][lane];
  double all_bad = 0;
  for (int s = 0; s < kFinishSlices; ++s) all_bad += faults[s];
  if (all_bad > 0) sum = __longlong_as_double(0x7ff8000000000000ll);
  if (i == count) {
    call.voxel_sums[sample] = sum;
  } else {
    int slot = i / CONST(classes), c = i - slot * CONST(classes);
    call.sums[(size_t(slot) * call.batch + sample) * CONST(classes) + c] =
        slot == CONST(slot_top_k) ? 0.0 : sum;
  }
}
