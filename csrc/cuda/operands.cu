// Writes numbers to device memory. Numbers known on the host are launch arguments: no copy
// synchronises with the stream, and a captured launch keeps them.

// Mirrored in fastloss/backends/cuda/operands.py.
constexpr int kMost = 384;

struct OperandCall {
  double* to;
  const void* from;  // device memory, or null: `numbers`
  long long count;
  int step;  // 0: the first one every time
  int is_float;
  double numbers[kMost];
};

extern "C" __global__ void __launch_bounds__(256) fastloss_operand(const OperandCall call) {
  for (long long i = threadIdx.x; i < call.count; i += 256) {
    const long long k = i * call.step;
    call.to[i] = !call.from      ? call.numbers[k]
                 : call.is_float ? static_cast<const float*>(call.from)[k]
                                 : static_cast<const double*>(call.from)[k];
  }
}
