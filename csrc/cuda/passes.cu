// The kernels: for one kind of call (FL_SPECIAL), or for any.
#include "apply.h"
#include "reduce.h"

#ifdef FL_SPECIAL

using In = InMemory<FL_logits_type>::type;
// Stating the number of resident blocks gives a kernel all registers that they leave; without it
// some kernels spill.
#define FL_BOUNDS __launch_bounds__(FL_warps * FL_groups * kLanes, FL_least_blocks)
#define FL_PASS(pass) pass<In, FL_vector, FL_per_thread>(call)

#else

constexpr int kMostPerThread = 53;

#define FL_BOUNDS
#define FL_VECTORS(pass, In, most)                                \
  switch (call.vector) {                                          \
    case 1:                                                       \
      return pass<In, 1, kMostPerThread>(call);                   \
    case 2:                                                       \
      return pass<In, 2, kMostPerThread>(call);                   \
    case 4:                                                       \
      return pass < In, most<4 ? most : 4, kMostPerThread>(call); \
    default:                                                      \
      return pass<In, most, kMostPerThread>(call);                \
  }
#define FL_PASS(pass)             \
  switch (call.logits_type) {     \
    case kF16:                    \
      FL_VECTORS(pass, Half, 8)   \
    case kBF16:                   \
      FL_VECTORS(pass, BFloat, 8) \
    case kF64:                    \
      FL_VECTORS(pass, double, 2) \
    default:                      \
      FL_VECTORS(pass, float, 4)  \
  }

#endif

#if !defined(FL_SPECIAL) || defined(FL_REDUCE)
extern "C" __global__ void FL_BOUNDS fastloss_reduce(const __grid_constant__ Call call) {
  FL_PASS(reduce_block);
}

extern "C" __global__ void __launch_bounds__(kFinishSlices* kLanes, 1)
    fastloss_finish(const __grid_constant__ Call call) {
  finish_sums(call);
}
#endif

#if !defined(FL_SPECIAL) || defined(FL_APPLY)
extern "C" __global__ void FL_BOUNDS fastloss_apply(const __grid_constant__ Call call) {
  FL_PASS(apply_block);
}
#endif
