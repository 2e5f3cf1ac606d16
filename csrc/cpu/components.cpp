// Connected components by runs: rows are cut into runs of one class, runs of neighbouring rows that
// touch are united (union-find, of which a root is the first run of its component), and roots are
// numbered in their order, which is that of the first voxels. Nothing looks at a voxel twice, and
// any number of threads gives the same numbers.
#include "components.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "shared.h"
#include "threads.h"
#include "voronoi.h"

namespace py = pybind11;

namespace fastloss {

#define X(name) extern const VoronoiKernels voronoi_kernels_##name;
FASTLOSS_ISAS
#undef X

namespace {

// As `parallel`, for work that allocates memory: no exception may leave a thread.
template <class Work>
void parallel_allocating(int64_t count, const Work& work) {
  std::atomic<bool> failed{false};
  parallel(count, 1, [&](int64_t i, void*) {
    try {
      work(i);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

// ------------------------------------------------------------------ components

struct Run {
  int32_t first, end;  // voxels [first, end) of a row
  uint16_t of_class;
};

struct Plane {
  std::vector<Run> runs;
  std::vector<int64_t> rows;  // where those of every row start, and where the last ones end
  int64_t base = 0;           // runs of the planes before
};

// Runs of classes above 0; `table` has the class of every index.
template <class Index>
void find_runs(const Index* row, int64_t ny, int64_t nx, const uint16_t* table, Plane& plane) {
  plane.rows.reserve(size_t(ny) + 1);
  for (int64_t y = 0; y < ny; ++y, row += nx) {
    const size_t start = plane.runs.size();
    plane.rows.push_back(int64_t(start));
    for (int64_t x = 0; x < nx;) {
      const Index index = row[x];
      const int64_t first = x++;
      constexpr int64_t kStep = 8 / sizeof(Index);
      uint64_t eight, same;
      Index repeated[kStep];
      std::fill_n(repeated, kStep, index);
      std::memcpy(&same, repeated, 8);
      for (; x + kStep <= nx; x += kStep) {
        std::memcpy(&eight, row + x, 8);
        if (eight != same) break;
      }
      while (x < nx && row[x] == index) ++x;
      const uint16_t of_class = table[index];
      if (!of_class) continue;
      auto& runs = plane.runs;
      if (runs.size() > start && runs.back().end == first && runs.back().of_class == of_class)
        runs.back().end = int32_t(x);
      else
        runs.push_back({int32_t(first), int32_t(x), of_class});
    }
  }
  plane.rows.push_back(int64_t(plane.runs.size()));
}

// Of every run the root of its component, or one that leads to it and comes before.
class Forest {
 public:
  explicit Forest(int64_t count) : parents_(size_t(count)) {
    for (int64_t i = 0; i < count; ++i) parents_[size_t(i)] = int32_t(i);
  }
  void unite(int64_t a, int64_t b) {
    const int32_t i = root(int32_t(a)), j = root(int32_t(b));
    if (i < j) parents_[size_t(j)] = i;
    else parents_[size_t(i)] = j;
  }
  int32_t parent(int64_t i) const { return parents_[size_t(i)]; }

 private:
  int32_t root(int32_t i) {
    while (parents_[size_t(i)] != i) {
      parents_[size_t(i)] = parents_[size_t(parents_[size_t(i)])];
      i = parents_[size_t(i)];
    }
    return i;
  }
  std::vector<int32_t> parents_;
};

// Unites the runs of two rows that touch; `reach` is 1 where corners touch as well.
void join(const Plane& p, int64_t p_row, const Plane& q, int64_t q_row, int32_t reach,
          Forest& forest) {
  int64_t i = p.rows[size_t(p_row)], j = q.rows[size_t(q_row)];
  const int64_t i_end = p.rows[size_t(p_row) + 1], j_end = q.rows[size_t(q_row) + 1];
  const auto meet = [&](int64_t a, int64_t b) {
    const Run &s = p.runs[size_t(a)], &t = q.runs[size_t(b)];
    if (s.of_class == t.of_class && t.first < s.end + reach && s.first < t.end + reach)
      forest.unite(p.base + a, q.base + b);
  };
  while (i < i_end && j < j_end) {
    meet(i, j);
    const int32_t ends[2] = {p.runs[size_t(i)].end, q.runs[size_t(j)].end};
    if (ends[0] < ends[1]) {
      ++i;
    } else if (ends[1] < ends[0]) {
      ++j;
    } else {  // each may touch the corner of what follows the other
      if (i + 1 < i_end) meet(i + 1, j);
      if (j + 1 < j_end) meet(i, j + 1);
      ++i;
      ++j;
    }
  }
}

void join_within(const Plane& plane, int64_t ny, int connectivity, Forest& forest) {
  for (int64_t y = 1; y < ny; ++y) join(plane, y - 1, plane, y, connectivity > 6, forest);
}

void join_planes(const Plane& above, const Plane& below, int64_t ny, int connectivity,
                 Forest& forest) {
  for (int64_t y = 0; y < ny; ++y) {
    join(above, y, below, y, connectivity > 6, forest);
    if (connectivity == 6) continue;
    if (y > 0) join(above, y - 1, below, y, connectivity == 26, forest);
    if (y + 1 < ny) join(above, y + 1, below, y, connectivity == 26, forest);
  }
}

constexpr int64_t kColumns = 11;  // class, size, low and high end of the box, sums of coordinates

// Writes the components of class indices (z, y, x), uint8 or uint16, numbered from 1.
//
// `table`: the class of every index, 0 for the background. Returns a row of `kColumns` numbers for
// each component.
py::array components(const py::array& classes, const py::array& table, int connectivity,
                     py::array out) {
  const int64_t nz = classes.shape(0), ny = classes.shape(1), nx = classes.shape(2);
  const auto* data = static_cast<const char*>(classes.data());
  const auto* of_index = static_cast<const uint16_t*>(table.data());
  auto* to = static_cast<int32_t*>(out.mutable_data());
  const int item = int(classes.itemsize());
  std::vector<std::array<int64_t, kColumns>> found;
  {
    py::gil_scoped_release release;
    std::vector<Plane> planes(static_cast<size_t>(nz));
    parallel_allocating(nz, [&](int64_t z) {
      const char* from = data + z * ny * nx * item;
      Plane& plane = planes[size_t(z)];
      if (item == 1)
        find_runs(reinterpret_cast<const uint8_t*>(from), ny, nx, of_index, plane);
      else
        find_runs(reinterpret_cast<const uint16_t*>(from), ny, nx, of_index, plane);
    });
    int64_t count = 0;
    for (Plane& plane : planes) {
      plane.base = count;
      count += int64_t(plane.runs.size());
    }
    if (count > INT32_MAX) throw std::length_error("labels: too many runs of equal labels");
    Forest forest(count);
    // Slabs of planes have forests of their own, which are then joined.
    const int64_t threads = orphaned ? 1 : num_threads();
    const int64_t slab = std::max<int64_t>((nz + threads - 1) / threads, 1);
    parallel((nz + slab - 1) / slab, 1, [&](int64_t i, void*) {
      for (int64_t z = i * slab; z < std::min((i + 1) * slab, nz); ++z) {
        join_within(planes[size_t(z)], ny, connectivity, forest);
        if (z > i * slab)
          join_planes(planes[size_t(z - 1)], planes[size_t(z)], ny, connectivity, forest);
      }
    });
    for (int64_t z = slab; z < nz; z += slab)
      join_planes(planes[size_t(z - 1)], planes[size_t(z)], ny, connectivity, forest);
    std::vector<int32_t> numbers(static_cast<size_t>(count));
    for (int64_t z = 0; z < nz; ++z) {
      const Plane& plane = planes[size_t(z)];
      for (int64_t y = 0; y < ny; ++y) {
        for (int64_t i = plane.rows[size_t(y)]; i < plane.rows[size_t(y) + 1]; ++i) {
          const Run& run = plane.runs[size_t(i)];
          const int64_t parent = forest.parent(plane.base + i), length = run.end - run.first;
          int32_t& number = numbers[size_t(plane.base + i)];
          if (parent == plane.base + i) {
            found.push_back({run.of_class, 0, z, y, run.first, z + 1, y + 1, run.end, 0, 0, 0});
            number = int32_t(found.size());
          } else {
            number = numbers[size_t(parent)];
          }
          auto& row = found[size_t(number) - 1];
          row[1] += length;
          const int64_t low[3] = {z, y, run.first}, high[3] = {z + 1, y + 1, run.end};
          for (size_t axis = 0; axis < 3; ++axis) {
            row[2 + axis] = std::min(row[2 + axis], low[axis]);
            row[5 + axis] = std::max(row[5 + axis], high[axis]);
          }
          row[8] += z * length;
          row[9] += y * length;
          row[10] += (int64_t(run.first) + run.end - 1) * length / 2;
        }
      }
    }
    parallel(nz, 1, [&](int64_t z, void*) {
      const Plane& plane = planes[size_t(z)];
      int32_t* row = to + z * ny * nx;
      std::memset(row, 0, size_t(ny * nx) * sizeof(int32_t));
      for (int64_t y = 0; y < ny; ++y, row += nx)
        for (int64_t i = plane.rows[size_t(y)]; i < plane.rows[size_t(y) + 1]; ++i)
          std::fill(row + plane.runs[size_t(i)].first, row + plane.runs[size_t(i)].end,
                    numbers[size_t(plane.base + i)]);
    });
  }
  py::array_t<int64_t> rows({int64_t(found.size()), kColumns});
  if (!found.empty())
    std::memcpy(rows.mutable_data(), found.data(), found.size() * sizeof(found[0]));
  return std::move(rows);
}

// ------------------------------------------------------------------ overlaps

struct Shared {
  uint64_t pair;
  int64_t voxels;
  bool operator<(const Shared& other) const { return pair < other.pair; }
};

// Sorts by pairs, and adds up the voxels of each.
void gather_pairs(std::vector<Shared>& shared) {
  std::sort(shared.begin(), shared.end());
  size_t kept = 0;
  for (size_t i = 0; i < shared.size(); ++i) {
    if (kept && shared[kept - 1].pair == shared[i].pair) shared[kept - 1].voxels += shared[i].voxels;
    else shared[kept++] = shared[i];
  }
  shared.resize(kept);
}

// How many voxels two components share: rows (a, b, voxels) in the order of (a, b), of int32 arrays
// (rows, voxels) in C order. Numbers below 1 are of no component.
py::array overlaps(const py::array& a, const py::array& b) {
  const int64_t count = a.shape(0), n = a.shape(1);
  const auto* first = static_cast<const int32_t*>(a.data());
  const auto* second = static_cast<const int32_t*>(b.data());
  std::vector<Shared> all;
  {
    py::gil_scoped_release release;
    std::vector<std::vector<Shared>> of_rows(static_cast<size_t>(count));
    parallel_allocating(count, [&](int64_t r) {
      const int32_t *p = first + r * n, *q = second + r * n;
      auto& shared = of_rows[size_t(r)];
      for (int64_t i = 0; i < n;) {
        if (p[i] <= 0 || q[i] <= 0) {
          ++i;
          while (i + 2 <= n) {  // two of nothing
            uint64_t words[2];
            std::memcpy(words, p + i, 8);
            std::memcpy(words + 1, q + i, 8);
            if (words[0] && words[1]) break;
            i += 2;
          }
          continue;
        }
        const int64_t start = i++;
        while (i < n && p[i] == p[start] && q[i] == q[start]) ++i;
        const uint64_t pair = uint64_t(uint32_t(p[start])) << 32 | uint32_t(q[start]);
        shared.push_back({pair, i - start});
      }
      gather_pairs(shared);
    });
    for (const auto& shared : of_rows) all.insert(all.end(), shared.begin(), shared.end());
    gather_pairs(all);
  }
  py::array_t<int64_t> rows({int64_t(all.size()), int64_t(3)});
  int64_t* to = rows.mutable_data();
  for (const Shared& each : all) {
    *to++ = int64_t(each.pair >> 32);
    *to++ = int64_t(uint32_t(each.pair));
    *to++ = each.voxels;
  }
  return std::move(rows);
}

// ------------------------------------------------------------------ the nearest component

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

void bind_components(py::module_& m) {
  m.def("components", &components);
  m.def("overlaps", &overlaps);
  m.def("voronoi", &voronoi);
}

}  // namespace fastloss
