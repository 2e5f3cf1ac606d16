// Volumes of class indices: the boxes that classes lie in, and the spacing of voxels. For what is
// compiled once, beside the binding.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "distance_job.h"
#include "threads.h"

namespace fastloss {

// Voxels [low, high) along z, y and x; empty: of no voxel.
struct Box {
  int64_t low[3] = {INT64_MAX, INT64_MAX, INT64_MAX}, high[3] = {0, 0, 0};

  bool empty() const { return high[0] <= low[0]; }
  void add(int axis, int64_t first, int64_t end) {
    low[axis] = std::min(low[axis], first);
    high[axis] = std::max(high[axis], end);
  }
  void add(const Box& other) {
    if (other.empty()) return;
    for (int axis = 0; axis < 3; ++axis) add(axis, other.low[axis], other.high[axis]);
  }
  // With margins, as far as the volume reaches.
  Box wider(const std::array<int64_t, 3>& margin, const int64_t* shape) const {
    Box wide;
    for (int axis = 0; axis < 3; ++axis) {
      wide.low[axis] = std::max<int64_t>(low[axis] - margin[axis], 0);
      wide.high[axis] =
          high[axis] < shape[axis] - margin[axis] ? high[axis] + margin[axis] : shape[axis];
    }
    return wide;
  }
  Box common(const Box& other) const {
    Box both;
    for (int axis = 0; axis < 3; ++axis) {
      both.low[axis] = std::max(low[axis], other.low[axis]);
      both.high[axis] = std::min(high[axis], other.high[axis]);
    }
    return both;
  }
  bool covers(const int64_t* shape) const {
    for (int axis = 0; axis < 3; ++axis)
      if (low[axis] > 0 || high[axis] < shape[axis]) return false;
    return true;
  }
};

// The voxels' spacing: tables of squares, of a spacing near 1 so that none of them overflows.
class Metric {
 public:
  Metric(const int64_t* shape, const std::array<double, 3>& spacing, double limit) {
    double largest = 0;
    for (int axis = 0; axis < 3; ++axis)
      if (shape[axis] > 1) largest = std::max(largest, spacing[axis]);
    int exponent = 0;
    std::frexp(largest > 0 ? largest : 1.0, &exponent);
    scale = std::ldexp(1.0, exponent);
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t n = shape[axis];
      spacing_[axis] = n > 1 ? spacing[axis] / scale : 1.0;
      tables_[axis].resize(size_t(2 * n + 1));
      for (int64_t d = 0; d <= n; ++d) {
        const double length = spacing_[axis] * double(d);
        tables_[axis][size_t(n + d)] = tables_[axis][size_t(n - d)] = float(length * length);
      }
      const double reach = std::ceil(limit / scale / spacing_[axis]) + 1;
      margin[axis] = reach < double(n) ? int64_t(reach) : n;
    }
  }

  void set(DistanceJob& job) const {
    for (int axis = 0; axis < 3; ++axis) {
      const auto& table = tables_[axis];
      job.squares[axis] = table.data() + table.size() / 2;
      job.inverse_spacing[axis] = float(1 / spacing_[axis]);
    }
    job.scale = float(scale);
  }

  double scale;
  std::array<int64_t, 3> margin;  // voxels beyond which distances exceed the limit

 private:
  std::array<double, 3> spacing_;
  std::array<std::vector<float>, 3> tables_;
};

// The volume that is read: class indices (z, y, x) in C order.
struct Volume {
  const char* classes;
  int item;
  int64_t shape[3];

  int64_t row() const { return shape[2]; }
  int64_t plane() const { return shape[1] * shape[2]; }
  int64_t voxels() const { return shape[0] * plane(); }
};

inline Volume volume_of(const pybind11::array& classes, int64_t index) {
  Volume v;
  v.item = int(classes.itemsize());
  for (int axis = 0; axis < 3; ++axis) v.shape[axis] = classes.shape(axis + 1);
  v.classes = static_cast<const char*>(classes.data()) + index * v.voxels() * v.item;
  return v;
}

// The bounding boxes of every class.
template <class Index>
std::vector<Box> boxes_of(const Volume& v, int64_t classes) {
  const int64_t nz = v.shape[0], ny = v.shape[1], nx = v.shape[2];
  std::vector<Box> of_planes(size_t(nz * classes));
  parallel(nz, 1, [&](int64_t z, void*) {
    Box* boxes = of_planes.data() + z * classes;
    const Index* row = reinterpret_cast<const Index*>(v.classes) + z * v.plane();
    for (int64_t y = 0; y < ny; ++y, row += nx) {
      for (int64_t x = 0; x < nx;) {
        const Index c = row[x];
        const int64_t first = x++;
        constexpr int64_t kStep = 8 / sizeof(Index);
        uint64_t eight, same;
        Index repeated[kStep];
        std::fill_n(repeated, kStep, c);
        std::memcpy(&same, repeated, 8);
        while (x + kStep <= nx) {
          std::memcpy(&eight, row + x, 8);
          if (eight != same) break;
          x += kStep;
        }
        while (x < nx && row[x] == c) ++x;
        if (int64_t(c) >= classes) continue;
        Box& box = boxes[c];
        box.add(1, y, y + 1);
        box.add(2, first, x);
        box.add(0, z, z + 1);
      }
    }
  });
  std::vector<Box> boxes(static_cast<size_t>(classes));
  for (int64_t z = 0; z < nz; ++z)
    for (int64_t c = 0; c < classes; ++c) boxes[size_t(c)].add(of_planes[size_t(z * classes + c)]);
  return boxes;
}

inline std::vector<Box> boxes_of(const Volume& v, int64_t classes) {
  return v.item == 1 ? boxes_of<uint8_t>(v, classes) : boxes_of<uint16_t>(v, classes);
}

}  // namespace fastloss
