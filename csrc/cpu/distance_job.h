// The arguments of a distance transform. Plain data: compiled alike for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastloss {

// How distances become the numbers that are written.
enum class Finish : int32_t {
  distance,  // the distance
  inside     // where it is above 0: sign · distance + shift; else nothing is written
};

// An exact transform of a box of voxels (z, y, x): the distance of each to the nearest seed.
struct DistanceJob {
  const void* classes;             // the class index of the first voxel of the box
  int32_t item;                    // bytes of a class index: 1 or 2
  int64_t class_row, class_plane;  // indices from a row to the next one, and from plane to plane
  uint32_t wanted;                 // seeds are the voxels of this class,
  bool others;                     // or those of all others
  int64_t shape[3];
  // (spacing · d)² for d in (−n, n) along every axis; points at that of d = 0.
  const float* squares[3];
  float inverse_spacing[3];
  float* work;  // squared distances of the box
  int64_t work_row, work_plane;
  Finish finish;
  float scale;  // of the distances that are written
  float limit;  // those are clamped to it
  float sign, shift;
  char* out;  // float32, or float16 if `half`; may be `work`
  bool half;
  int64_t out_row, out_plane;  // numbers

  // Rows of voxels that lie next to each other in a plane, in all arrays.
  int64_t lanes() const { return merged() ? shape[1] * shape[2] : shape[2]; }
  int64_t rows() const { return merged() ? 1 : shape[1]; }
  bool merged() const { return work_row == shape[2] && out_row == shape[2]; }
};

constexpr int64_t kLineBlock = 64;  // adjacent lines whose numbers are fetched together

// Bytes of working memory for lines of n voxels.
inline size_t distance_scratch(int64_t n) {
  const size_t line = size_t(n) * size_t(kLineBlock) * sizeof(float);
  return line + size_t(n) * 64 + 4096;
}

// Distances within plane z along x, then y; false if the plane has no seed, and nothing is written.
using DistancePlane = bool (*)(const DistanceJob&, int64_t z, void* scratch);
// Distances along z of the lines [first, last) of a row; `planes` are those that have seeds.
using DistanceLines = void (*)(const DistanceJob&, const int32_t* planes, int64_t count,
                               int64_t row, int64_t first, int64_t last, void* scratch);

struct DistanceKernels {
  DistancePlane plane;
  DistanceLines lines;
};

}  // namespace fastloss
