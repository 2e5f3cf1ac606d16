// Adds the blocks' sums to those of the batch in one block of threads. The combine step begins with
// it where the sums are few, which saves a launch.
#pragma once

// From (B, blocks, S · C + 2), the results of `Sums` in reduce.h, to (S, B, C) and the voxel
// weights (B). Threads that share a column take consecutive blocks each; the order of summation is
// fixed.
template <int kThreads, class Number>
static __device__ __forceinline__ void fl_finish(const Number* partial, int blocks, int batch,
                                                 int slots, int classes, double* sums,
                                                 double* voxels) {
  __shared__ double parts[kThreads];
  const int count = slots * classes + 1, columns = batch * count;
  const int thread = int(threadIdx.x), wide = columns < kThreads ? columns : kThreads;
  const int slices = kThreads / wide, slice = thread / wide;
  const int share = (blocks + slices - 1) / slices;
  for (int before = 0; before < columns; before += wide) {
    const int column = before + thread - slice * wide;
    double sum = 0;
    if (slice < slices && column < columns) {
      const int sample = column / count, i = column - sample * count;
      const Number* from = partial + (size_t(sample) * blocks) * (count + 1) + i;
      const int first = slice * share, last = first + share < blocks ? first + share : blocks;
#pragma unroll 8
      for (int block = first; block < last; ++block)
        sum += double(from[size_t(block) * (count + 1)]);
      parts[thread] = sum;
    }
    __syncthreads();
    if (slice == 0 && column < columns) {
      for (int other = 1; other < slices; ++other) sum += parts[other * wide + thread];
      const int sample = column / count, i = column - sample * count;
      if (i == count - 1) {
        voxels[sample] = sum;
      } else {
        const int slot = i / classes, c = i - slot * classes;
        sums[(size_t(slot) * batch + sample) * classes + c] = sum;
      }
    }
    __syncthreads();
  }
}
