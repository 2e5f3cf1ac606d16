// Lovász losses from histograms of errors, as fastloss/terms/lovasz.py derives them.
//
// A loss becomes one sum more, from which the combine step takes it and by which it differentiates.
// The derivatives by Σ v of the bins are then that derivative times slopes that are kept here.
#include "error_bins.h"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kMostSums = 64;

// Mirrored in fastloss/backends/cuda/lovasz.py. A row is a sample, or all of them.
struct LovaszCall {
  const double* sums;       // (S, B, C): those of the table, then of histograms
  const double* histogram;  // those of this kind
  const double* predicted;  // Σ p
  const double* wanted;     // (C,): 1 where a class is named; null: those with foreground
  double* slopes;           // (2 · bins, rows, C)
  double* of_class;     // (3, rows, C): loss, foreground, all voxels; then the share of the loss
  double* inner;        // (S', B, C): the table of the combine step, or the derivatives by it
  double* derivatives;  // (S, B, C)
  double* by_bins;      // those by Σ v of the bins of this kind
  int kind;
  int batch, classes, rows;
  int sums_of_table;
  int slot;                // of this loss among those of `inner`
  int first;               // whether no other term did: copies the table
  int adds;                // whether another one wrote derivatives by these bins
  int slot_of[kMostSums];  // of every sum of the table among those of `inner`
};

// The sum over the threads of a block, in a fixed order, and over those before this one.
FL_DEVICE double block_sum(double x, double* of_warps, double& before) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  double sum = x;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const double other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kLanes - 1) of_warps[warp] = sum;
  __syncthreads();
  double all = 0;
  before = sum - x;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warps[w];
    all += of_warps[w];
  }
  __syncthreads();
  return all;
}

// A number of a bin in a row: `sum` 0 to 3 are counts, then Σ v, of background and foreground.
FL_DEVICE double number_of(const LovaszCall& call, int bins, int sum, int bin, int row, int c) {
  const double* from =
      call.histogram + (static_cast<long long>(sum) * bins + bin) * call.batch * call.classes + c;
  if (call.rows == call.batch) return from[row * call.classes];
  double all = 0;
  for (int b = 0; b < call.batch; ++b) all += from[b * call.classes];
  return all;
}

// A block for every row and class: the loss and its slopes by Σ v of every bin. Sums of counts are
// exact, in whatever order.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_lovasz_scan(const __grid_constant__ LovaszCall call) {
  __shared__ double of_warps[kWarps];
  const ErrorKind kind = ErrorKind(call.kind);
  const bool hinge = kind == ErrorKind::hinge;
  const int bins = fastloss::bins_of(kind), row = int(blockIdx.x) / call.classes;
  const int c = int(blockIdx.x) - row * call.classes, each = call.rows * call.classes;
  // In the first bin of hinges there is no error.
  const int least = hinge ? 1 : 0, used = bins - least;
  const int share = (used + kThreads - 1) / kThreads, start = int(threadIdx.x) * share;
  const int end = start + share < used ? start + share : used;
  double f = 0, n = 0, found_f, found_n;
  for (int k = start; k < end; ++k) {  // errors fall
    n += number_of(call, bins, 0, bins - 1 - k, row, c);
    f += number_of(call, bins, 1, bins - 1 - k, row, c);
  }
  double total = block_sum(f, of_warps, found_f), voxels = block_sum(n, of_warps, found_n) + total;
  if (hinge) {
    const double foreground = number_of(call, bins, 1, 0, row, c);
    total += foreground;
    voxels += foreground + number_of(call, bins, 0, 0, row, c);
  }
  const int small = fastloss::last_place(fastloss::kSmallErrors) + 1;
  double loss = 0;
  double* to = call.slopes + blockIdx.x;
  for (int k = start; k < end; ++k) {
    const int bin = bins - 1 - k;
    n = number_of(call, bins, 0, bin, row, c);
    f = number_of(call, bins, 1, bin, row, c);
    double of_f = 0, of_n = 0;
    if (total <= 0) {
      if (n > 0 && found_n == 0) of_n = 1 / n;
    } else if (n > 0 || f > 0) {
      const double a = total + found_n, b = a + n, t = n / a;
      const double rest = total > found_f ? total - found_f : 0;
      const bool few = t < 1e-3;
      const double logarithm = log1p(t);
      of_f = few ? (1 - t / 2 + t * t / 3) / a : logarithm / n;
      const double inner =
          few ? (0.5 - 2 * t / 3 + 0.75 * t * t) / (a * a) : (logarithm - n / b) / (n * n);
      of_n = rest / (a * b) - f * inner;
      of_n = of_n > 0 ? of_n : 0;
    }
    found_n += n;
    found_f += f;
    double sign = 1;
    if (n > 0 || f > 0) {
      double error_n = number_of(call, bins, 2, bin, row, c);
      double error_f = number_of(call, bins, 3, bin, row, c);
      if (!hinge && bin >= small) {  // v is 1 − e
        error_n = n - error_n;
        error_f = f - error_f;
        sign = -1;
      }
      loss += of_n * error_n + of_f * error_f;
    }
    to[static_cast<long long>(bin) * each] = sign * of_n;
    to[static_cast<long long>(bins + bin) * each] = sign * of_f;
  }
  if (hinge && threadIdx.x == 0) to[0] = to[static_cast<long long>(bins) * each] = 0;
  double before;
  loss = block_sum(loss, of_warps, before);
  if (threadIdx.x != 0) return;
  call.of_class[blockIdx.x] = loss;
  call.of_class[each + blockIdx.x] = total;
  call.of_class[2 * each + blockIdx.x] = voxels;
}

// One block: the mean over classes and rows, as a sum of the combine step.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_lovasz_value(const __grid_constant__ LovaszCall call) {
  __shared__ double of_warps[kWarps];
  const int thread = int(threadIdx.x), each = call.rows * call.classes;
  const int of_sum = call.batch * call.classes;
  double bad = 0, value = 0, before;
  // NaN is in no bin.
  for (int i = thread; i < of_sum; i += kThreads)
    bad += call.predicted[i] - call.predicted[i] == 0 ? 0 : 1;
  const double not_a_number = __longlong_as_double(0x7ff8000000000000ll);
  const double factor = block_sum(bad, of_warps, before) > 0 ? not_a_number : 1.0;
  for (int row = 0; row < call.rows; ++row) {
    double* of_row = call.of_class + row * call.classes;
    double chosen = 0;
    for (int c = thread; c < call.classes; c += kThreads) {
      const bool named = call.wanted ? call.wanted[c] != 0 : of_row[each + c] > 0;
      of_row[2 * each + c] = named && of_row[2 * each + c] > 0 ? 1 : 0;
      chosen += of_row[2 * each + c];
    }
    const double count = block_sum(chosen, of_warps, before);
    const double share = count > 0 ? factor / (call.rows * count) : factor * 0;
    for (int c = thread; c < call.classes; c += kThreads) {
      of_row[2 * each + c] *= share;
      value += of_row[c] * of_row[2 * each + c];
    }
  }
  value = block_sum(value, of_warps, before) + (factor - 1);
  for (int i = thread; i < of_sum; i += kThreads) {
    if (call.first)
      for (int s = 0; s < call.sums_of_table; ++s)
        call.inner[call.slot_of[s] * of_sum + i] = call.sums[s * of_sum + i];
    call.inner[call.slot * of_sum + i] = i == 0 ? value : 0;
  }
}

// The derivatives by the sums, from those of the combine step. Those by counts are not written, as
// nothing reads them.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_lovasz_slopes(const __grid_constant__ LovaszCall call) {
  const int of_sum = call.batch * call.classes, each = call.rows * call.classes;
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  const long long start = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x;
  for (long long i = start; call.first && i < call.sums_of_table * of_sum; i += step) {
    const int s = int(i / of_sum);
    call.derivatives[i] = call.inner[call.slot_of[s] * of_sum + int(i - s * of_sum)];
  }
  const double by_loss = call.inner[call.slot * of_sum];
  const double* share = call.of_class + 2 * each;
  // 32 bits suffice, as 2^32 places would take 32 GiB, and are divided without a call.
  const unsigned count = 2u * unsigned(fastloss::bins_of(ErrorKind(call.kind)) * of_sum);
  for (unsigned i = unsigned(start); i < count; i += unsigned(step)) {
    const unsigned place = i / unsigned(of_sum);
    const int at = int(i - place * unsigned(of_sum));
    const int own = call.rows == call.batch ? at : at % call.classes;
    const double slope =
        by_loss * share[own] * call.slopes[static_cast<long long>(place) * each + own];
    call.by_bins[i] = call.adds ? call.by_bins[i] + slope : slope;
  }
}
