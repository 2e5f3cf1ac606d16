// Helpers that several bindings use, beside those of threads.h.
#pragma once

#include <pybind11/numpy.h>

#include <string>

#include "job.h"

namespace fastloss {

// Raises TypeError for a dtype that no kernel reads.
DType dtype_of(const std::string& name);

// The (B[, C], *spatial) array in memory, with axes merged where they step evenly.
Array view(const pybind11::array& a, const std::string& dtype, bool channels);

}  // namespace fastloss
