// Powers of the numbers of one array or two, added: x^e + y^e, of any number type and strides.
#include "anywhere.h"

constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/fields.py.
struct PowerCall {
  const char* from[2];  // the second may be null
  char* to;             // float32, or float16 where `half`
  unsigned long long count;
  unsigned long long shape[kAnyAxes];
  long long stride[3][kAnyAxes];  // bytes, of both and of `to`
  float exponent;
  int axes;
  int type[2];
  int aligned[2];  // numbers lie at multiples of their size
  int half;
};

FL_DEVICE float number_of(const PowerCall& call, int k, long long at) {
  return float(number_anywhere(call.type[k], call.from[k] + at, call.aligned[k] != 0));
}

FL_DEVICE float raised(float x, float exponent) {
  if (exponent == 1.0f) return x;
  return exponent == 2.0f ? x * x : general_power(x, exponent);
}

// `to` may be the place of an array: a thread reads what it overwrites.
extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_powers(const __grid_constant__ PowerCall call) {
  const unsigned long long step = static_cast<unsigned long long>(kThreads) * gridDim.x;
  for (unsigned long long i = static_cast<unsigned long long>(kThreads) * blockIdx.x + threadIdx.x;
       i < call.count; i += step) {
    long long at[3] = {0, 0, 0};
    unsigned long long rest = i;
    for (int axis = call.axes - 1; axis >= 0; --axis) {
      const unsigned long long next = rest / call.shape[axis];
      const long long place = static_cast<long long>(rest - next * call.shape[axis]);
#pragma unroll
      for (int k = 0; k < 3; ++k) at[k] += place * call.stride[k][axis];
      rest = next;
    }
    const float x = number_of(call, 0, at[0]);
    const float y = call.from[1] ? number_of(call, 1, at[1]) : 0.0f;
    float sum = raised(x, call.exponent);
    if (call.from[1]) sum += raised(y, call.exponent);
    char* to = call.to + at[2];
    if (call.half) {
      // The largest numbers of float16 stand for all beyond; NaN stays NaN.
      const float most = 65504.0f;
      *reinterpret_cast<Half*>(to) = from_number<Half>(sum > most    ? most
                                                       : sum < -most ? -most
                                                                     : sum);
    } else {
      *reinterpret_cast<float*>(to) = sum;
    }
  }
}
