// The arguments of a soft skeleton, or of its gradient. Plain data, as in job.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "job.h"

namespace fastloss {

// An array (B, C, Z, Y, X) in somebody's memory. Strides in bytes.
struct Volumes {
  char* data = nullptr;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int64_t stride[3] = {};
};

struct SkeletonJob {
  DType dtype = DType::f32;  // of all three arrays
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t shape[3] = {1, 1, 1};
  // An image (Z, X) has no axis y, and a line (X) neither. One of length 1 is something else: the
  // erosion along it has a share in the gradient.
  bool has_z = false;
  bool has_y = false;
  int iterations = 0;
  bool backward = false;
  Volumes p, upstream, out;  // upstream: backward only

  // How many planes on either side of one its result depends on.
  int64_t reach() const { return backward ? 2 * int64_t(iterations) + 4 : int64_t(iterations) + 2; }
};

// Bytes of working memory for planes of such a size.
using SkeletonBytes = size_t (*)(const SkeletonJob&);
// Writes the planes [first, last) of a channel, counted through the batch; `memory` holds zeros or
// what an earlier part left there.
using SkeletonPart = void (*)(const SkeletonJob&, int64_t channel, int64_t first, int64_t last,
                              void* memory);

struct SkeletonKernels {
  const char* name;
  SkeletonBytes bytes;
  SkeletonPart part;
};

}  // namespace fastloss
