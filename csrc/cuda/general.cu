// The kernels of general.h: for one kind of call (FL_SPECIAL), or for any.
#include "general.h"

#ifdef FL_SPECIAL

#define FL_BOUNDS __launch_bounds__(FL_warps* kLanes)
#define FL_PASS(pass) pass<InMemory<FL_logits_type>::type>(call)

#else

#define FL_BOUNDS
#define FL_PASS(pass)            \
  switch (call.logits_type) {    \
    case kF16:                   \
      return pass<Half>(call);   \
    case kBF16:                  \
      return pass<BFloat>(call); \
    case kF64:                   \
      return pass<double>(call); \
    default:                     \
      return pass<float>(call);  \
  }

#endif

#if !defined(FL_SPECIAL) || defined(FL_REDUCE)
extern "C" __global__ void FL_BOUNDS fastloss_reduce(const __grid_constant__ GeneralCall call) {
  FL_PASS(general_reduce);
}

extern "C" __global__ void __launch_bounds__(kFinishSlices* kLanes, 1)
    fastloss_finish(const __grid_constant__ GeneralCall call) {
  general_finish(call);
}
#endif

#if !defined(FL_SPECIAL) || defined(FL_APPLY)
extern "C" __global__ void FL_BOUNDS fastloss_apply(const __grid_constant__ GeneralCall call) {
  FL_PASS(general_apply);
}
#endif

#if !defined(FL_SPECIAL) || defined(FL_MAP)
extern "C" __global__ void FL_BOUNDS fastloss_map(const __grid_constant__ GeneralCall call) {
  FL_PASS(general_map);
}
#endif

#if !defined(FL_SPECIAL) || defined(FL_LARGEST)
extern "C" __global__ void FL_BOUNDS
fastloss_largest_weight(const __grid_constant__ GeneralCall call) {
  FL_PASS(find_largest_weight);
}
#endif
