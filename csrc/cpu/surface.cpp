// Distances from every element of one surface to the nearest element of another.
//
// All is done in the box of a structure. Squared distances to the other surface are made within
// each of its planes, for all points (distance_kernels.h); along z, only the elements look for
// their nearest plane, outward from their own, until a plane alone is farther than what was found.
// Two surfaces that are compared lie close to each other, so that this ends after a few planes.
//
// The distance is written in double, from the whole numbers of voxels between two elements, so that
// it compares with a tolerance as that of SciPy's transform does. Squared distances in float tell
// the plane; in it the nearest element is found by the sum of table entries that it must have made.
#include "surface.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>

#include "vec.h"  // before voxel.h

#include "job.h"
#include "volume.h"

namespace py = pybind11;

namespace fastloss {
namespace {

// How a surface is found: voxels at the edge (no areas), or points between voxels.
struct Grid {
  int axes;             // the last 1 to 3 of z, y, x
  const double* areas;  // by the number of a point's surroundings; null: voxels at the edge
  bool points() const { return areas != nullptr; }
};

// The surface of a structure in a box of points (z, y, x).
struct Surface {
  int64_t shape[3];
  std::vector<uint8_t> element;  // 1 where there is one
  std::vector<uint8_t> number;   // of its surroundings, if it has an area
  int64_t first = 0, last = 0;   // planes [first, last) that have elements
  std::vector<int64_t> count;    // elements of each plane

  int64_t plane() const { return shape[1] * shape[2]; }
  bool empty() const { return first == last; }
};

// For each class index, whether its voxels belong to the structure.
using Members = const bool*;

// A box of voxels with a margin of one, 1 where `is` says so, 0 beyond the volume.
struct Padded {
  int64_t shape[3];
  std::vector<uint8_t> voxels;
  const uint8_t* row(int64_t z, int64_t y) const {
    return voxels.data() + (z * shape[1] + y) * shape[2];
  }
};

template <class Index>
void copy_members(const Index* from, int64_t n, Members members, uint8_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = members[from[i]];
}

// `margin`: whether voxels of the volume in the margin are copied as well.
Padded padded_of(const Volume& v, const Box& box, Members members, bool margin) {
  Padded p;
  int64_t first[3], end[3];  // that are copied
  for (int axis = 0; axis < 3; ++axis) {
    p.shape[axis] = box.high[axis] - box.low[axis] + 2;
    first[axis] = margin ? std::max<int64_t>(box.low[axis] - 1, 0) : box.low[axis];
    end[axis] = margin ? std::min(box.high[axis] + 1, v.shape[axis]) : box.high[axis];
  }
  p.voxels.assign(size_t(p.shape[0] * p.shape[1] * p.shape[2]), 0);
  parallel(end[0] - first[0], 1, [&](int64_t i, void*) {
    const int64_t z = first[0] + i, n = end[2] - first[2];
    for (int64_t y = first[1]; y < end[1]; ++y) {
      const int64_t from = z * v.plane() + y * v.row() + first[2];
      const int64_t row = (z - box.low[0] + 1) * p.shape[1] + y - box.low[1] + 1;
      uint8_t* to = p.voxels.data() + row * p.shape[2] + first[2] - box.low[2] + 1;
      if (v.item == 1)
        copy_members(reinterpret_cast<const uint8_t*>(v.classes) + from, n, members, to);
      else copy_members(reinterpret_cast<const uint16_t*>(v.classes) + from, n, members, to);
    }
  });
  return p;
}

// The numbers of a row of points: of `rows`, the voxels before and behind them, in C order.
template <int Rows>
void row_of_numbers(const uint8_t* const* rows, int64_t n, uint8_t* to) {
  for (int64_t x = 0; x < n; ++x) {
    uint8_t number = 0;
    for (int i = 0; i < Rows; ++i) {
      number = uint8_t(number << 1 | rows[i][x]);
      number = uint8_t(number << 1 | rows[i][x + 1]);
    }
    to[x] = number;
  }
}

void row_of_numbers(const Padded& p, int axes, int64_t z, int64_t y, int64_t n, uint8_t* to) {
  if (axes == 3) {
    const uint8_t* rows[] = {p.row(z, y), p.row(z, y + 1), p.row(z + 1, y), p.row(z + 1, y + 1)};
    row_of_numbers<4>(rows, n, to);
  } else {
    const uint8_t* rows[] = {p.row(z + 1, y), p.row(z + 1, y + 1)};
    row_of_numbers<2>(rows, n, to);
  }
}

// 1 where a voxel is inside, and a neighbour along one of the axes is not.
void row_of_edges(const Padded& p, int axes, int64_t z, int64_t y, int64_t n, uint8_t* to) {
  const uint8_t* own = p.row(z + 1, y + 1) + 1;
  for (int64_t x = 0; x < n; ++x) to[x] = own[x - 1] & own[x + 1];
  const auto meet = [&](const uint8_t* row) {
    for (int64_t x = 0; x < n; ++x) to[x] &= row[x + 1];
  };
  if (axes > 1) {
    meet(p.row(z + 1, y));
    meet(p.row(z + 1, y + 2));
  }
  if (axes > 2) {
    meet(p.row(z, y + 1));
    meet(p.row(z + 2, y + 1));
  }
  for (int64_t x = 0; x < n; ++x) to[x] = own[x] & uint8_t(~to[x] & 1);
}

// `counted`: of the same box, voxels that count; null: all.
Surface surface_of(const Padded& p, const Padded* counted, const Grid& grid) {
  Surface s;
  for (int axis = 0; axis < 3; ++axis)
    s.shape[axis] = p.shape[axis] - 2 + (grid.points() && axis >= 3 - grid.axes);
  s.element.resize(size_t(s.shape[0] * s.plane()));
  if (grid.points()) s.number.resize(s.element.size());
  s.count.resize(size_t(s.shape[0]));
  const int full = grid.axes == 3 ? 255 : 15;
  const int64_t n = s.shape[2];
  parallel(s.shape[0], size_t(n), [&](int64_t z, void* scratch) {
    int64_t count = 0;
    auto* which = static_cast<uint8_t*>(scratch);
    for (int64_t y = 0; y < s.shape[1]; ++y) {
      uint8_t* element = s.element.data() + z * s.plane() + y * n;
      if (grid.points()) {
        uint8_t* number = s.number.data() + z * s.plane() + y * n;
        row_of_numbers(p, grid.axes, z, y, n, number);
        for (int64_t x = 0; x < n; ++x) element[x] = (number[x] != 0) & (number[x] != full);
        if (counted) {
          row_of_numbers(*counted, grid.axes, z, y, n, which);
          for (int64_t x = 0; x < n; ++x) element[x] &= which[x] != 0;
        }
      } else {
        row_of_edges(p, grid.axes, z, y, n, element);
        if (counted) {
          const uint8_t* row = counted->row(z + 1, y + 1) + 1;
          for (int64_t x = 0; x < n; ++x) element[x] &= row[x];
        }
      }
      int64_t in_row = 0;
      for (int64_t x = 0; x < n; ++x) in_row += element[x];
      count += in_row;
    }
    s.count[size_t(z)] = count;
  });
  s.last = s.shape[0];
  while (s.first < s.last && !s.count[size_t(s.first)]) ++s.first;
  while (s.first < s.last && !s.count[size_t(s.last - 1)]) --s.last;
  return s;
}

// The spacing of voxels, for squared distances in float and in double.
class Lengths {
 public:
  Lengths(const int64_t* shape, const std::array<double, 3>& spacing)
      : metric(shape, spacing, INFINITY) {
    for (int axis = 0; axis < 3; ++axis) {
      inverse[axis] = metric.scale / spacing[size_t(axis)];
      for (int64_t d = 0; d <= shape[axis]; ++d) {
        const double length = spacing[size_t(axis)] * double(d);
        exact_[axis].push_back(length * length);
      }
    }
  }
  // Added as SciPy adds them: no product is near that a compiler could fuse with a sum.
  double distance(int64_t z, int64_t y, int64_t x) const {
    return std::sqrt((exact_[0][size_t(z)] + exact_[1][size_t(y)]) + exact_[2][size_t(x)]);
  }

  Metric metric;
  double inverse[3];  // voxels for a distance of `metric.scale`

 private:
  std::vector<double> exact_[3];
};

struct Element {
  double distance;
  float area;
  bool operator<(const Element& other) const { return distance < other.distance; }
};

// Distances from the elements of one surface to another, within the same box.
class Search {
 public:
  Search(const Surface& to, const Lengths& lengths) : to_(to), lengths_(lengths) {
    if (to.empty()) return;
    const int64_t planes = to.last - to.first;
    squared_.reset(new float[size_t(planes * to.plane())]);
    DistanceJob job{};
    lengths.metric.set(job);
    job.classes = to.element.data() + to.first * to.plane();
    job.item = 1;
    job.class_row = job.work_row = to.shape[2];
    job.class_plane = job.work_plane = to.plane();
    job.wanted = 1;
    job.shape[0] = planes;
    job.shape[1] = to.shape[1];
    job.shape[2] = to.shape[2];
    job.work = squared_.get();
    job.limit = INFINITY;
    for (int axis = 0; axis < 3; ++axis) squares_[axis] = job.squares[axis];
    const auto& kernel = kernels->distance;
    parallel(planes, distance_scratch(to.shape[1]), [&](int64_t z, void* scratch) {
      if (to.count[size_t(to.first + z)]) kernel.plane(job, z, scratch);
    });
  }

  double nearest(int64_t z, int64_t y, int64_t x) const {
    if (to_.empty()) return INFINITY;
    const int64_t at = y * to_.shape[2] + x;
    float least = INFINITY;
    int64_t plane = -1;
    const int64_t farthest = std::max(z - to_.first, to_.last - 1 - z);
    for (int64_t d = 0; d <= farthest; ++d) {
      const float own = squares_[0][d];
      if (own >= least) break;
      for (int64_t k : {z - d, z + d}) {
        if (k < to_.first || k >= to_.last || !to_.count[size_t(k)]) continue;
        const float sum = squared_[size_t((k - to_.first) * to_.plane() + at)] + own;
        if (sum < least) {
          least = sum;
          plane = k;
        }
      }
    }
    if (plane < 0) return INFINITY;  // beyond the range of float
    return within(plane, std::abs(z - plane), y, x,
                  squared_[size_t((plane - to_.first) * to_.plane() + at)]);
  }

 private:
  // The distance to an element of a plane at this squared distance within it.
  double within(int64_t plane, int64_t dz, int64_t y, int64_t x, float squared) const {
    for (int64_t d = 0; d < to_.shape[1]; ++d) {
      const float own = squares_[1][d];
      if (own > squared) break;
      const double rest = std::sqrt(double(squared) - double(own)) * lengths_.inverse[2];
      const int64_t columns = std::min(int64_t(rest + 0.5), to_.shape[2] - 1);
      if (squares_[2][columns] + own != squared) continue;
      for (int64_t row : {y - d, y + d}) {
        if (row < 0 || row >= to_.shape[1]) continue;
        const uint8_t* element = to_.element.data() + plane * to_.plane() + row * to_.shape[2];
        if ((x >= columns && element[x - columns]) ||
            (x + columns < to_.shape[2] && element[x + columns]))
          return lengths_.distance(dz, d, columns);
      }
    }
    // Spacings so unlike that float does not tell them apart.
    return std::sqrt(double(squares_[0][dz]) + double(squared)) * lengths_.metric.scale;
  }

  const Surface& to_;
  const Lengths& lengths_;
  std::unique_ptr<float[]> squared_;  // within planes [first, last)
  const float* squares_[3] = {};
};

std::vector<Element> directed(const Surface& from, const Surface& to, const Lengths& lengths,
                              const Grid& grid) {
  std::vector<int64_t> start(size_t(from.shape[0]) + 1);
  for (int64_t z = 0; z < from.shape[0]; ++z)
    start[size_t(z) + 1] = start[size_t(z)] + from.count[size_t(z)];
  std::vector<Element> found(static_cast<size_t>(start.back()));
  if (found.empty()) return found;
  const Search search(to, lengths);
  parallel(from.last - from.first, 1, [&](int64_t i, void*) {
    const int64_t z = from.first + i;
    Element* next = found.data() + start[size_t(z)];
    for (int64_t y = 0; y < from.shape[1]; ++y) {
      const int64_t row = z * from.plane() + y * from.shape[2];
      const uint8_t* element = from.element.data() + row;
      for (int64_t x = 0; x < from.shape[2]; ++x) {
        if (!element[x]) continue;
        const float area = grid.points() ? float(grid.areas[from.number[size_t(row + x)]]) : 1;
        *next++ = {search.nearest(z, y, x), area};
      }
    }
  });
  return found;
}

py::object array_of(std::vector<double>&& numbers) {
  auto* kept = new std::vector<double>(std::move(numbers));
  const py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<double>*>(p); });
  return py::array_t<double>({py::ssize_t(kept->size())}, {py::ssize_t(sizeof(double))},
                             kept->data(), owner);
}

struct Sorted {
  std::vector<double> distances, areas;
};

Sorted sorted(std::vector<Element>& elements, bool with_areas) {
  std::sort(elements.begin(), elements.end());
  Sorted s;
  s.distances.reserve(elements.size());
  for (const Element& each : elements) s.distances.push_back(each.distance);
  if (with_areas) {
    s.areas.reserve(elements.size());
    for (const Element& each : elements) s.areas.push_back(each.area);
  }
  return s;
}

Box box_of(const std::vector<Box>& boxes, Members members) {
  Box all;
  for (size_t i = 0; i < boxes.size(); ++i)
    if (members[i]) all.add(boxes[i]);
  return all;
}

// See fastloss/backends/surfaces.py.
py::list surface_distances(const py::array& prediction, const py::array& reference,
                           const py::array_t<bool, py::array::c_style>& structures, int axes,
                           const std::array<double, 3>& spacing, const py::object& areas,
                           const py::object& counted) {
  const auto volume = [](const py::array& a) {
    Volume v;
    v.item = int(a.itemsize());
    for (int axis = 0; axis < 3; ++axis) v.shape[axis] = a.shape(axis);
    v.classes = static_cast<const char*>(a.data());
    return v;
  };
  const Volume volumes[2] = {volume(prediction), volume(reference)};
  const int64_t indices = structures.shape(1);
  py::array_t<double, py::array::c_style> table;
  if (!areas.is_none()) table = py::cast<py::array_t<double, py::array::c_style>>(areas);
  const Grid grid{axes, areas.is_none() ? nullptr : table.data()};
  Volume which{};  // voxels that count, if not all do
  py::array kept;
  if (!counted.is_none()) {
    kept = py::cast<py::array>(counted);
    which = volume(kept);
  }
  std::vector<std::array<Sorted, 2>> found(static_cast<size_t>(structures.shape(0)));
  {
    py::gil_scoped_release release;
    const auto boxes = [&](const Volume& v) {
      return v.voxels() ? boxes_of(v, indices) : std::vector<Box>(size_t(indices));
    };
    const std::vector<Box> of_labels[2] = {boxes(volumes[0]), boxes(volumes[1])};
    const bool is[2] = {false, true};
    const auto measure = [&](int64_t k) {
      const Members members = structures.data() + k * indices;
      Box box = box_of(of_labels[0], members);
      box.add(box_of(of_labels[1], members));
      if (box.empty()) return;
      std::unique_ptr<Padded> counts;
      if (which.classes) counts.reset(new Padded(padded_of(which, box, is, true)));
      const Surface surfaces[2] = {
          surface_of(padded_of(volumes[0], box, members, false), counts.get(), grid),
          surface_of(padded_of(volumes[1], box, members, false), counts.get(), grid)};
      const Lengths lengths(surfaces[0].shape, spacing);
      std::vector<Element> elements[2];
      for (int i = 0; i < 2; ++i)
        elements[i] = directed(surfaces[i], surfaces[1 - i], lengths, grid);
      parallel(2, 1, [&](int64_t i, void*) {
        found[size_t(k)][size_t(i)] = sorted(elements[i], grid.points());
      });
    };
    // Structures are measured side by side, a single one by all threads: small loops have no
    // threads of their own within a larger one.
    std::exception_ptr failure;
    const auto one = [&](int64_t k, void*) {
      try {
        measure(k);
      } catch (...) {
#pragma omp critical(fastloss_surface)
        failure = std::current_exception();
      }
    };
    if (found.size() == 1) one(0, nullptr);
    else parallel(int64_t(found.size()), 1, one);
    if (failure) std::rethrow_exception(failure);
  }
  py::list result;
  for (auto& of_structure : found) {
    py::list pair;
    for (Sorted& each : of_structure) {
      py::object distances = array_of(std::move(each.distances));
      py::object weights = py::none();
      if (grid.points()) weights = array_of(std::move(each.areas));
      pair.append(py::make_tuple(distances, weights));
    }
    result.append(py::tuple(pair));
  }
  return result;
}

}  // namespace

void bind_surface(py::module_& m) { m.def("surface_distances", &surface_distances); }

}  // namespace fastloss
