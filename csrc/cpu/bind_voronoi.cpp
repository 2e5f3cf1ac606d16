// The Python binding of the nearest components: tables of squared distances, and threads.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "components.h"
#include "shared.h"
#include "threads.h"
#include "voronoi.h"

namespace py = pybind11;

namespace fastloss {

#define X(name) extern const VoronoiKernels voronoi_kernels_##name;
FASTLOSS_ISAS
#undef X

namespace {

const VoronoiKernels& voronoi_kernels() {
  const std::string isa = kernels->name;
#define X(name) \
  if (isa == #name) return voronoi_kernels_##name;
  FASTLOSS_ISAS
#undef X
  throw std::logic_error("no Voronoi kernels for " + isa);
}

// Tables of (spacing · d)² for d in [−n, n], and whether float holds all of their sums exactly.
struct Tables {
  Tables(const int64_t* shape, const std::array<double, 3>& spacing) {
    double most = 0;
    for (size_t axis = 0; axis < 3; ++axis) {
      const int64_t n = shape[axis];
      wide[axis].resize(size_t(2 * n + 1));
      for (int64_t d = 0; d <= n; ++d) {
        const double length = spacing[axis] * double(d), square = length * length;
        wide[axis][size_t(n + d)] = wide[axis][size_t(n - d)] = square;
        exact = exact && square == std::floor(square);
      }
      most += wide[axis][0];
      narrow[axis].assign(wide[axis].begin(), wide[axis].end());
    }
    exact = exact && most < double(1 << 24);
  }
  std::array<std::vector<double>, 3> wide;
  std::array<std::vector<float>, 3> narrow;
  bool exact = true;
};

constexpr int64_t kLinesPerTask = 512;

// Writes the nearest component of every voxel, 0 where there is none; both int32 (z, y, x).
void voronoi(const py::array& numbers, const std::array<double, 3>& spacing, py::array out) {
  VoronoiJob job;
  for (int axis = 0; axis < 3; ++axis) job.shape[axis] = numbers.shape(axis);
  const int64_t nz = job.shape[0], plane = job.shape[1] * job.shape[2];
  job.components = static_cast<const int32_t*>(numbers.data());
  job.out = static_cast<int32_t*>(out.mutable_data());
  if (nz * plane == 0) return;
  py::gil_scoped_release release;
  const Tables tables(job.shape, spacing);
  job.wide = !tables.exact;
  for (size_t axis = 0; axis < 3; ++axis) {
    if (job.wide) job.squares[axis] = tables.wide[axis].data() + job.shape[axis];
    else job.squares[axis] = tables.narrow[axis].data() + job.shape[axis];
    job.inverse_spacing[axis] = 1 / spacing[axis];
  }
  const std::unique_ptr<char[]> work(new char[size_t(nz * plane) * (job.wide ? 8 : 4)]);
  job.work = work.get();
  const VoronoiKernels& kernel = voronoi_kernels();
  std::vector<char> has(static_cast<size_t>(nz));
  parallel(nz, voronoi_scratch(job.shape[1]) + size_t(job.shape[1]) * 4 + 64,
           [&](int64_t z, void* scratch) { has[size_t(z)] = kernel.plane(job, z, scratch); });
  std::vector<int32_t> planes;
  for (int64_t z = 0; z < nz; ++z)
    if (has[size_t(z)]) planes.push_back(int32_t(z));
  if (planes.empty()) {
    std::fill_n(job.out, nz * plane, 0);
    return;
  }
  if (nz == 1) return;
  parallel((plane + kLinesPerTask - 1) / kLinesPerTask, voronoi_scratch(nz),
           [&](int64_t i, void* scratch) {
             kernel.lines(job, planes.data(), int64_t(planes.size()), i * kLinesPerTask,
                          std::min((i + 1) * kLinesPerTask, plane), scratch);
           });
}

}  // namespace

void bind_voronoi(py::module_& m) { m.def("voronoi", &voronoi); }

}  // namespace fastloss
