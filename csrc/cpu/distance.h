// Exact Euclidean distance transforms, as the Python module offers them.
#pragma once

#include <pybind11/pybind11.h>

namespace fastloss {

void bind_distance(pybind11::module_& m);

}  // namespace fastloss
