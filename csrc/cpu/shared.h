// Helpers that several bindings use, beside those of threads.h.
#pragma once

#include <string>

#include "job.h"

namespace fastloss {

// Raises TypeError for a dtype that no kernel reads.
DType dtype_of(const std::string& name);

}  // namespace fastloss
