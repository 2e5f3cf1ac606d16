// The largest losses of all voxels, by radix selection. Its counts are integers, so the order of
// the blocks does not matter.
#include "numbers.h"

constexpr int kDigits = 256;
constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/top_k.py.
struct TopKCall {
  void* losses;  // (count,), of the working type: losses, then shares in their mean
  double* mean;  // the mean of the largest
  unsigned long long*
      found;  // (2,): the leading digits of the least loss kept; how many equal ones are kept
  unsigned long long* histogram;  // (rounds, kDigits)
  double* partial;                // (blocks,)
  long long count;
  long long chunk;  // numbers of a block
  long long kept;
  double least;  // of losses that are kept in any case, which are above it
  int is_double;
  int blocks;
  int round;
};

// Losses are not negative, so their bits are ordered like them; NaN ranks highest.
FL_DEVICE unsigned long long key_of(float x) { return __float_as_uint(x); }
FL_DEVICE unsigned long long key_of(double x) {
  return static_cast<unsigned long long>(__double_as_longlong(x));
}

template <class T>
FL_DEVICE T loss_at(const TopKCall& call, long long i) {
  return static_cast<const T*>(call.losses)[i];
}

FL_DEVICE long long end_of_block(const TopKCall& call) {
  long long end = (static_cast<long long>(blockIdx.x) + 1) * call.chunk;
  return end < call.count ? end : call.count;
}

extern "C" __global__ void __launch_bounds__(kDigits)
    fastloss_top_k_begin(const __grid_constant__ TopKCall call) {
  call.histogram[blockIdx.x * kDigits + threadIdx.x] = 0;
}

// Counts the digits of this round among the losses with the leading digits found so far.
template <class T>
FL_DEVICE void count_digits(const TopKCall& call) {
  __shared__ unsigned counts[kDigits];
  for (int d = int(threadIdx.x); d < kDigits; d += kThreads) counts[d] = 0;
  __syncthreads();
  int shift = int(sizeof(T)) * 8 - 8 * (call.round + 1);
  unsigned long long leading = call.round ? call.found[0] : 0;
  for (long long i = blockIdx.x * call.chunk + threadIdx.x; i < end_of_block(call); i += kThreads) {
    unsigned long long key = key_of(loss_at<T>(call, i)) >> shift;
    if (key >> 8 == leading) atomicAdd(&counts[key & 255], 1u);
  }
  __syncthreads();
  unsigned long long* to = call.histogram + call.round * kDigits;
  for (int d = int(threadIdx.x); d < kDigits; d += kThreads)
    if (counts[d]) atomicAdd(&to[d], static_cast<unsigned long long>(counts[d]));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_top_k_count(const __grid_constant__ TopKCall call) {
  if (call.is_double) count_digits<double>(call);
  else count_digits<float>(call);
}

// One thread: finds the digit of the least loss kept.
extern "C" __global__ void fastloss_top_k_choose(const __grid_constant__ TopKCall call) {
  const unsigned long long* counts = call.histogram + call.round * kDigits;
  unsigned long long left = call.round ? call.found[1] : call.kept;
  int digit = kDigits - 1;
  while (digit > 0 && counts[digit] < left) left -= counts[digit--];
  call.found[0] = (call.round ? call.found[0] : 0) << 8 | static_cast<unsigned>(digit);
  call.found[1] = left;
}

// Sums the block's losses above the least one kept, and replaces each loss by its share in the
// mean.
template <class T>
FL_DEVICE void share(const TopKCall& call) {
  __shared__ double sums[kThreads / kLanes];
  unsigned long long least = call.found[0];
  unsigned long long alike =
      call.histogram[(int(sizeof(T)) - 1) * kDigits + static_cast<int>(least & 255)];
  T above = T(1.0 / double(call.kept));
  // Voxels that tie for the last places share them.
  T at = T(double(call.found[1]) / (double(call.kept) * double(alike)));
  double sum = 0;
  for (long long i = blockIdx.x * call.chunk + threadIdx.x; i < end_of_block(call); i += kThreads) {
    T loss = loss_at<T>(call, i);
    unsigned long long key = key_of(loss);
    if (key > least) sum += double(loss);
    static_cast<T*>(call.losses)[i] = key > least ? above : key == least ? at : T(0);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kLanes == 0) sums[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / kLanes; ++w) sum += sums[w];
  call.partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_top_k_share(const __grid_constant__ TopKCall call) {
  if (call.is_double) share<double>(call);
  else share<float>(call);
}

// Marks the losses above `least`, and the largest ones with all that equal the last of them: each
// loss is replaced by 1 or 0. NaN is above all.
template <class T>
FL_DEVICE void mark(const TopKCall& call) {
  for (long long i = blockIdx.x * call.chunk + threadIdx.x; i < end_of_block(call); i += kThreads) {
    T loss = loss_at<T>(call, i);
    bool kept = !(loss <= T(call.least)) || (call.kept > 0 && key_of(loss) >= call.found[0]);
    static_cast<T*>(call.losses)[i] = kept ? T(1) : T(0);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_top_k_mark(const __grid_constant__ TopKCall call) {
  if (call.is_double) mark<double>(call);
  else mark<float>(call);
}

// One warp: computes the mean.
extern "C" __global__ void __launch_bounds__(kLanes)
    fastloss_top_k_mean(const __grid_constant__ TopKCall call) {
  double sum = 0;
  for (int block = int(threadIdx.x); block < call.blocks; block += kLanes)
    sum += call.partial[block];
  sum = warp_sum(sum);
  if (threadIdx.x != 0) return;
  unsigned long long least = call.found[0];
  double loss = call.is_double ? __longlong_as_double(static_cast<long long>(least))
                               : double(__uint_as_float(static_cast<unsigned>(least)));
  *call.mean = (sum + double(call.found[1]) * loss) / double(call.kept);
}
