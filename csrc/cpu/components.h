// Connected components, and each voxel's nearest one, as the Python module offers them.
#pragma once

#include <pybind11/pybind11.h>

namespace fastloss {

void bind_components(pybind11::module_& m);
void bind_voronoi(pybind11::module_& m);

}  // namespace fastloss
