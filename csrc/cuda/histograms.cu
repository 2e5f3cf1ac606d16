// Histograms of errors: cleared before the reduce pass of general.h counts, and summed after it.
//
// A tally has (parts, places of every kind, B, C) entries, in the order of the sums: so this is one
// pass over adjacent memory. A part is as many voxels as a word counts. The bins of one
// class take 300 KB, more than the shared memory of a block: they lie in global memory, and those
// of a usual call in the L2 cache.
#include "error_bins.h"

constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/histograms.py.
struct HistogramCall {
  unsigned long long* tallies;  // and behind them the largest voxel weight, as bits of a double
  double* sums;                 // (4 · bins, B, C) of this kind
  long long words;              // of all parts
  long long words_of_part;
  long long first;  // the first word of this kind in a part
  int parts;
  int kind;
  int each;      // B · C
  int weighted;  // an entry has two words: Σ m and Σ m d
};

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_histogram_clear(const __grid_constant__ HistogramCall call) {
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; i <= call.words;
       i += step)
    call.tallies[i] = 0;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_histogram_finish(const __grid_constant__ HistogramCall call) {
  const ErrorKind kind = ErrorKind(call.kind);
  const int bins = fastloss::bins_of(kind);
  const long long count = 2ll * bins * call.each;
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  const double unit_weight = call.weighted ? weight_scale(call.tallies[call.words]) : 1.0;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; i < count;
       i += step) {
    double voxels = 0, rest = 0;
    for (int part = 0; part < call.parts; ++part) {
      const unsigned long long* word =
          call.tallies + part * call.words_of_part + call.first + i * (1 + call.weighted);
      if (call.weighted) {
        voxels += double(word[0]);
        rest += double(word[1]);
      } else {
        voxels += double(*word >> fastloss::kCountShift);
        rest += double(*word & ((1ull << fastloss::kCountShift) - 1));
      }
    }
    const int place = int(i / call.each);
    const fastloss::BinScale scale =
        fastloss::scale_of_bin(kind, place < bins ? place : place - bins);
    call.sums[i] = voxels / unit_weight;
    call.sums[count + i] = (scale.start * voxels + scale.unit * rest) / unit_weight;
  }
}
