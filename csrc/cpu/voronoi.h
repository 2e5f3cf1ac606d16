// The nearest component of every voxel. Plain data: compiled alike for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastloss {

struct VoronoiJob {
  const int32_t* components = nullptr;  // (z, y, x) in C order; seeds are above 0
  int64_t shape[3] = {};
  bool wide = false;  // squared distances are double, not float
  // (spacing · d)² for d in (−n, n) along every axis; points at that of d = 0.
  const void* squares[3] = {};
  double inverse_spacing[3] = {};
  void* work = nullptr;    // squared distances, (z, y, x)
  int32_t* out = nullptr;  // (z, y, x), other memory than `components`
};

constexpr int64_t kVoronoiBlock = 64;  // adjacent lines whose numbers are fetched together

// Bytes of working memory for lines of n voxels.
inline size_t voronoi_scratch(int64_t n) { return size_t(n) * (kVoronoiBlock + 2) * 16 + 4096; }

// The nearest within plane z; false if the plane has no seed, and nothing is written.
using VoronoiPlane = bool (*)(const VoronoiJob&, int64_t z, void* scratch);
// The nearest along z for the lines [first, last) of a plane, given those within the planes that
// have seeds.
using VoronoiLines = void (*)(const VoronoiJob&, const int32_t* planes, int64_t count,
                              int64_t first, int64_t last, void* scratch);

struct VoronoiKernels {
  const char* name;
  VoronoiPlane plane;
  VoronoiLines lines;
};

}  // namespace fastloss
