// The derivatives by sums, as those by the sums whose summands are the slopes by the target.
//
// A summand is differentiated by g to Σ factor · another sum's summand: see `slopes_by_target` of
// fastloss/sums.py.

constexpr int kMostParts = 96;
constexpr int kThreads = 256;

// Mirrored in fastloss/backends/cuda/by_target.py.
struct TargetCall {
  const double* from;  // (S, rows, C)
  double* to;          // (S', rows, C)
  long long each;      // rows · C
  int sums;            // S'
  int parts;
  int of[kMostParts], is[kMostParts];  // the places among S and S'
  double factor[kMostParts];
};

extern "C" __global__ void __launch_bounds__(kThreads)
    fastloss_by_target(const __grid_constant__ TargetCall call) {
  const long long step = static_cast<long long>(kThreads) * gridDim.x;
  for (long long i = static_cast<long long>(kThreads) * blockIdx.x + threadIdx.x;
       i < call.sums * call.each; i += step) {
    const int s = int(i / call.each);
    double sum = 0;
    for (int k = 0; k < call.parts; ++k)
      if (call.is[k] == s)
        sum += call.factor[k] * call.from[call.of[k] * call.each + (i - s * call.each)];
    call.to[i] = sum;
  }
}
