// What the bindings share beside threads: the instruction set that was chosen, and dtypes.
#pragma once

#include <string>

#include "job.h"

namespace fastloss {

// Raises TypeError for a dtype that no kernel reads.
DType dtype_of(const std::string& name);

}  // namespace fastloss
