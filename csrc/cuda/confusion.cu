// How many voxels of each class index of the reference are predicted as each.
#include "numbers.h"

constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/metrics.py.
struct ConfusionCall {
  const void* prediction;  // class indices, (samples, voxels)
  const void* reference;
  unsigned long long* counts;    // (samples, indices, indices)
  const unsigned char* counted;  // (samples, voxels), or null; of `fastloss_choose`
  void* to;                      // where `prediction` counts itself, and `reference` elsewhere
  long long samples;
  long long voxels;  // of a sample
  long long parts;   // blocks of a sample
  int indices;
  int item;      // bytes of a class index: 1 or 2
  int shared;    // blocks count in shared memory
  int constant;  // stands for `reference` where that is null
};

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_confusion_begin(const __grid_constant__ ConfusionCall call) {
  const long long count = call.samples * call.indices * call.indices;
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; i < count;
       i += step)
    call.counts[i] = 0;
}

// Counts runs of equal pairs: most voxels are like the one before them.
template <class Count>
struct Runs {
  Count* counts;
  unsigned indices;
  unsigned last = 0, length = 0;
  FL_DEVICE void add(unsigned reference, unsigned prediction) {
    const unsigned pair = reference * indices + prediction;
    if (pair != last) {
      flush();
      last = pair;
    }
    ++length;
  }
  FL_DEVICE void flush() {
    if (length) atomicAdd(counts + last, Count(length));
    length = 0;
  }
};

// A block's part of a sample. Threads read 16 bytes at once where both volumes allow it.
template <class Index, class Count>
FL_DEVICE void count_part(const ConfusionCall& call, long long sample, long long part,
                          Count* counts) {
  constexpr int kWide = 16 / int(sizeof(Index));
  const Index* p = static_cast<const Index*>(call.prediction) + sample * call.voxels;
  const Index* r = static_cast<const Index*>(call.reference) + sample * call.voxels;
  const auto beyond = [](const Index* at) {  // voxels behind a multiple of 16 bytes
    return int(reinterpret_cast<unsigned long long>(at) % 16 / sizeof(Index));
  };
  long long head = call.voxels;  // that are read one by one
  if (beyond(p) == beyond(r)) head = min(head, static_cast<long long>((kWide - beyond(p)) % kWide));
  const long long packs = (call.voxels - head) / kWide, tail = head + packs * kWide;
  const long long first = part * kThreads + threadIdx.x, step = call.parts * kThreads;
  Runs<Count> runs{counts, unsigned(call.indices)};
  for (long long k = first; k < packs; k += step) {
    const long long at = head + k * kWide;
    const auto predicted = load_pack<Index, kWide>(reinterpret_cast<const char*>(p + at));
    const auto known = load_pack<Index, kWide>(reinterpret_cast<const char*>(r + at));
#pragma unroll
    for (int i = 0; i < kWide; ++i) runs.add(known.item[i], predicted.item[i]);
  }
  for (long long i = first; i < head; i += step) runs.add(r[i], p[i]);
  for (long long i = tail + first; i < call.voxels; i += step) runs.add(r[i], p[i]);
  runs.flush();
}

template <class Count>
FL_DEVICE void count_part(const ConfusionCall& call, long long sample, long long part,
                          Count* counts) {
  if (call.item == 1) count_part<unsigned char>(call, sample, part, counts);
  else count_part<unsigned short>(call, sample, part, counts);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_confusion(const __grid_constant__ ConfusionCall call) {
  FL_DYNAMIC_SHARED(shared);
  const long long sample = blockIdx.x / call.parts, part = blockIdx.x % call.parts;
  const int size = call.indices * call.indices;
  unsigned long long* counts = call.counts + sample * size;
  if (!call.shared) {
    count_part(call, sample, part, counts);
    return;
  }
  unsigned* own = reinterpret_cast<unsigned*>(shared);
  for (int i = int(threadIdx.x); i < size; i += kThreads) own[i] = 0;
  __syncthreads();
  count_part(call, sample, part, own);
  __syncthreads();
  for (int i = int(threadIdx.x); i < size; i += kThreads)
    if (own[i]) atomicAdd(counts + i, static_cast<unsigned long long>(own[i]));
}

template <class Index>
FL_DEVICE void choose(const ConfusionCall& call, long long i) {
  const Index* other = static_cast<const Index*>(call.reference);
  Index chosen = static_cast<const Index*>(call.prediction)[i];
  if (call.counted && !call.counted[i]) chosen = other ? other[i] : Index(call.constant);
  static_cast<Index*>(call.to)[i] = chosen;
}

// One volume where voxels count, and another one elsewhere.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_choose(const __grid_constant__ ConfusionCall call) {
  const long long count = call.samples * call.voxels;
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x; i < count;
       i += step) {
    if (call.item == 1) choose<unsigned char>(call, i);
    else choose<unsigned short>(call, i);
  }
}
