// Connected components by runs: rows are cut into runs of one class, runs of neighbouring rows that
// touch are united (union-find, of which a root is the first run of its component), and roots are
// numbered in their order, which is that of the first voxels. Any number of threads gives the same
// numbers. Overlaps and dilations are computed of the runs as well, so that voxels are looked at
// once, and written where somebody asks for them.
#include "components.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "threads.h"

namespace py = pybind11;

namespace fastloss {
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
      else runs.push_back({int32_t(first), int32_t(x), of_class});
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

// Components by their runs.
class Labelled {
 public:
  // Of class indices (z, y, x), uint8 or uint16; `table`: the class of each, 0 for the background.
  Labelled(const py::array& classes, const py::array& table, int connectivity)
      : nz_(classes.shape(0)), ny_(classes.shape(1)), nx_(classes.shape(2)), planes_(size_t(nz_)) {
    const auto* data = static_cast<const char*>(classes.data());
    const auto* of_index = static_cast<const uint16_t*>(table.data());
    const int item = int(classes.itemsize());
    py::gil_scoped_release release;
    parallel_allocating(nz_, [&](int64_t z) {
      const char* from = data + z * ny_ * nx_ * item;
      Plane& plane = planes_[size_t(z)];
      if (item == 1) find_runs(reinterpret_cast<const uint8_t*>(from), ny_, nx_, of_index, plane);
      else find_runs(reinterpret_cast<const uint16_t*>(from), ny_, nx_, of_index, plane);
    });
    number(connectivity);
  }

  // Of all that is in components, as often grown to neighbours over faces and edges.
  Labelled dilated(int times, int connectivity) const {
    py::gil_scoped_release release;
    Labelled grown(nz_, ny_, nx_);
    grown.planes_ = planes_;
    for (int i = 0; i < std::max(times, 1); ++i) {
      std::vector<Plane> next(static_cast<size_t>(nz_));
      parallel_allocating(nz_, [&](int64_t z) { grown.grow(z, times > 0, next[size_t(z)]); });
      grown.planes_ = std::move(next);
    }
    grown.number(connectivity);
    return grown;
  }

  // A row of `kColumns` numbers for each component.
  py::array rows() const {
    py::array_t<int64_t> rows({int64_t(rows_.size()), kColumns});
    if (!rows_.empty())
      std::memcpy(rows.mutable_data(), rows_.data(), rows_.size() * sizeof(rows_[0]));
    return std::move(rows);
  }

  // Writes the numbers of a box of voxels that starts at (z, y, x) and lies in the volume.
  void write(py::array out, int64_t z, int64_t y, int64_t x) const {
    const int64_t depth = out.shape(0), height = out.shape(1), width = out.shape(2);
    auto* to = static_cast<int32_t*>(out.mutable_data());
    py::gil_scoped_release release;
    const auto plane_of = [&](int64_t i, void*) {
      const Plane& plane = planes_[size_t(z + i)];
      int32_t* row = to + i * height * width;
      std::memset(row, 0, size_t(height * width) * sizeof(int32_t));
      for (int64_t j = y; j < y + height; ++j, row += width) {
        for (int64_t k = plane.rows[size_t(j)]; k < plane.rows[size_t(j) + 1]; ++k) {
          const Run& run = plane.runs[size_t(k)];
          const int64_t first = std::max<int64_t>(run.first - x, 0);
          const int64_t end = std::min<int64_t>(run.end - x, width);
          if (first < end) std::fill(row + first, row + end, numbers_[size_t(plane.base + k)]);
        }
      }
    };
    if (depth * height * width >= kWorthThreads) {
      parallel(depth, 1, plane_of);
    } else {
      for (int64_t i = 0; i < depth; ++i) plane_of(i, nullptr);
    }
  }

  // How many voxels components share with others: rows (own, other, voxels), ascending.
  py::array overlaps(const Labelled& other) const {
    if (other.nz_ != nz_ || other.ny_ != ny_ || other.nx_ != nx_)
      throw py::value_error("overlaps: expected components of one shape");
    std::vector<Shared> all;
    {
      py::gil_scoped_release release;
      for (int64_t z = 0; z < nz_; ++z) share(z, other, all);
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

 private:
  Labelled(int64_t nz, int64_t ny, int64_t nx) : nz_(nz), ny_(ny), nx_(nx) {}

  static constexpr int64_t kWorthThreads = 1 << 18;  // voxels

  struct Shared {
    uint64_t pair;
    int64_t voxels;
    bool operator<(const Shared& other) const { return pair < other.pair; }
  };

  // Sorts by pairs, and adds up the voxels of each.
  static void gather_pairs(std::vector<Shared>& shared) {
    std::sort(shared.begin(), shared.end());
    size_t kept = 0;
    for (size_t i = 0; i < shared.size(); ++i) {
      if (kept && shared[kept - 1].pair == shared[i].pair)
        shared[kept - 1].voxels += shared[i].voxels;
      else shared[kept++] = shared[i];
    }
    shared.resize(kept);
  }

  void share(int64_t z, const Labelled& other, std::vector<Shared>& shared) const {
    const Plane &p = planes_[size_t(z)], &q = other.planes_[size_t(z)];
    if (p.runs.empty() || q.runs.empty()) return;
    for (int64_t y = 0; y < ny_; ++y) {
      int64_t i = p.rows[size_t(y)], j = q.rows[size_t(y)];
      while (i < p.rows[size_t(y) + 1] && j < q.rows[size_t(y) + 1]) {
        const Run &s = p.runs[size_t(i)], &t = q.runs[size_t(j)];
        const int64_t voxels = std::min(s.end, t.end) - std::max(s.first, t.first);
        if (voxels > 0) {
          const auto own = uint32_t(numbers_[size_t(p.base + i)]);
          const auto others = uint32_t(other.numbers_[size_t(q.base + j)]);
          shared.push_back({uint64_t(own) << 32 | others, voxels});
        }
        if (s.end < t.end) ++i;
        else ++j;
      }
    }
  }

  // The runs of plane z, as one class; if `grows`, with neighbours over faces and edges.
  void grow(int64_t z, bool grows, Plane& to) const {
    std::vector<std::pair<int32_t, int32_t>> parts;
    const int64_t far = grows ? 1 : 0;
    for (int64_t y = 0; y < ny_; ++y) {
      to.rows.push_back(int64_t(to.runs.size()));
      parts.clear();
      for (int64_t i = std::max<int64_t>(z - far, 0); i <= std::min(z + far, nz_ - 1); ++i) {
        const Plane& plane = planes_[size_t(i)];
        if (plane.runs.empty()) continue;
        for (int64_t j = std::max<int64_t>(y - far, 0); j <= std::min(y + far, ny_ - 1); ++j) {
          const int32_t wider = grows && (i == z || j == y);
          for (int64_t k = plane.rows[size_t(j)]; k < plane.rows[size_t(j) + 1]; ++k) {
            const Run& run = plane.runs[size_t(k)];
            parts.emplace_back(std::max(run.first - wider, 0),
                               int32_t(std::min<int64_t>(int64_t(run.end) + wider, nx_)));
          }
        }
      }
      std::sort(parts.begin(), parts.end());
      const size_t start = to.runs.size();
      for (const auto& [first, end] : parts) {
        if (to.runs.size() > start && to.runs.back().end >= first)
          to.runs.back().end = std::max(to.runs.back().end, end);
        else to.runs.push_back({first, end, 1});
      }
    }
    to.rows.push_back(int64_t(to.runs.size()));
  }

  void number(int connectivity) {
    int64_t count = 0;
    for (Plane& plane : planes_) {
      plane.base = count;
      count += int64_t(plane.runs.size());
    }
    if (count > INT32_MAX) throw std::length_error("labels: too many runs of equal labels");
    Forest forest(count);
    // Slabs of planes have trees of their own, which are then joined.
    const bool small = count < kRunsWorthThreads;
    const int64_t threads = orphaned || small ? 1 : num_threads();
    const int64_t slab = std::max<int64_t>((nz_ + threads - 1) / threads, 1);
    const auto join_slab = [&](int64_t i, void*) {
      for (int64_t z = i * slab; z < std::min((i + 1) * slab, nz_); ++z) {
        join_within(planes_[size_t(z)], ny_, connectivity, forest);
        if (z > i * slab)
          join_planes(planes_[size_t(z - 1)], planes_[size_t(z)], ny_, connectivity, forest);
      }
    };
    if (small) join_slab(0, nullptr);
    else parallel((nz_ + slab - 1) / slab, 1, join_slab);
    for (int64_t z = slab; z < nz_; z += slab)
      join_planes(planes_[size_t(z - 1)], planes_[size_t(z)], ny_, connectivity, forest);
    numbers_.resize(size_t(count));
    for (int64_t z = 0; z < nz_; ++z) {
      const Plane& plane = planes_[size_t(z)];
      if (plane.runs.empty()) continue;
      for (int64_t y = 0; y < ny_; ++y)
        for (int64_t i = plane.rows[size_t(y)]; i < plane.rows[size_t(y) + 1]; ++i)
          add(z, y, plane.base + i, plane.runs[size_t(i)], forest.parent(plane.base + i));
    }
  }

  // Numbers a run, the parent of which has a number, and adds it to its component.
  void add(int64_t z, int64_t y, int64_t index, const Run& run, int64_t parent) {
    int32_t& number = numbers_[size_t(index)];
    if (parent == index) {
      rows_.push_back({run.of_class, 0, z, y, run.first, z + 1, y + 1, run.end, 0, 0, 0});
      number = int32_t(rows_.size());
    } else {
      number = numbers_[size_t(parent)];
    }
    auto& row = rows_[size_t(number) - 1];
    const int64_t length = run.end - run.first;
    const int64_t low[3] = {z, y, run.first}, high[3] = {z + 1, y + 1, run.end};
    for (size_t axis = 0; axis < 3; ++axis) {
      row[2 + axis] = std::min(row[2 + axis], low[axis]);
      row[5 + axis] = std::max(row[5 + axis], high[axis]);
    }
    row[1] += length;
    row[8] += z * length;
    row[9] += y * length;
    row[10] += (int64_t(run.first) + run.end - 1) * length / 2;
  }

  static constexpr int64_t kRunsWorthThreads = 1 << 15;

  int64_t nz_, ny_, nx_;
  std::vector<Plane> planes_;
  std::vector<int32_t> numbers_;  // of the component of every run
  std::vector<std::array<int64_t, kColumns>> rows_;
};

}  // namespace

void bind_components(py::module_& m) {
  py::class_<Labelled>(m, "Labelled")
      .def(py::init<const py::array&, const py::array&, int>())
      .def("dilated", &Labelled::dilated)
      .def("write", &Labelled::write)
      .def("overlaps", &Labelled::overlaps)
      .def_property_readonly("rows", &Labelled::rows);
}

}  // namespace fastloss
