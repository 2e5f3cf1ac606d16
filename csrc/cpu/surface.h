// Distances between the surfaces of two label maps, as the Python module offers them.
#pragma once

#include <pybind11/pybind11.h>

namespace fastloss {

void bind_surface(pybind11::module_& m);

}  // namespace fastloss
