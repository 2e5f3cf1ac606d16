// Exact Euclidean distance transforms: what has to be computed of a volume, and by which threads.
//
// Most of a volume needs no computing. Distances inside a class are 0 beyond its bounding box, and
// no seed nearer than those in a margin of one voxel lies farther out; seeds of distances outside
// it lie in the box, and where distances are clamped, nothing but the clamped value lies farther
// out than that.
#include "distance.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "vec.h"  // before voxel.h

#include "job.h"
#include "rows.h"
#include "threads.h"
#include "volume.h"

namespace py = pybind11;

namespace fastloss {
namespace {

constexpr int64_t kLinesPerTask = 512;

// A number as it is written: float32 or float16.
void fill(char* out, bool half, int64_t first, int64_t count, float value) {
  if (half) {
    std::fill_n(reinterpret_cast<uint16_t*>(out) + first, count, narrow_half(value).bits);
  } else {
    std::fill_n(reinterpret_cast<float*>(out) + first, count, value);
  }
}

void fill_box(char* out, bool half, const Volume& v, const Box& box, float value) {
  if (box.empty()) return;
  parallel(box.high[0] - box.low[0], 1, [&](int64_t i, void*) {
    for (int64_t y = box.low[1]; y < box.high[1]; ++y) {
      const int64_t first = (box.low[0] + i) * v.plane() + y * v.row() + box.low[2];
      fill(out, half, first, box.high[2] - box.low[2], value);
    }
  });
}

// The same past the caches.
void stream(char* out, bool half, int64_t first, int64_t count, float value) {
#if defined(__SSE2__)
  const int64_t size = half ? 2 : 4;
  char* to = out + first * size;
  const int64_t lead = std::min(int64_t(-reinterpret_cast<uintptr_t>(to) % 64) / size, count);
  const int64_t lines = (count - lead) * size / 64, streamed = lines * 64 / size;
  const __m128i part = half ? _mm_set1_epi16(int16_t(narrow_half(value).bits))
                            : _mm_castps_si128(_mm_set1_ps(value));
  fill(to, half, 0, lead, value);
  auto* parts = reinterpret_cast<__m128i*>(to + lead * size);
  for (int64_t i = 0; i < 4 * lines; ++i) _mm_stream_si128(parts + i, part);
  fill(to, half, lead + streamed, count - lead - streamed, value);
#else
  fill(out, half, first, count, value);
#endif
}

// Fills the volume but a box, past the caches if it is large: nobody reads these numbers soon, and
// a store that first read its line would double the traffic.
void fill_around(char* out, bool half, const Volume& v, const Box& box, float value) {
  const auto write = v.voxels() * (half ? 2 : 4) >= (int64_t(1) << 20) ? stream : fill;
  const int64_t rows = v.shape[0] * v.shape[1];
  const int64_t some = std::max<int64_t>((int64_t(1) << 16) / v.row(), 1);
  parallel((rows + some - 1) / some, 1, [&](int64_t i, void*) {
    const int64_t first = i * some, last = std::min(first + some, rows);
    int64_t done = first * v.row();
    for (int64_t row = first; row < last; ++row) {
      const int64_t z = row / v.shape[1], y = row % v.shape[1];
      if (z < box.low[0] || z >= box.high[0] || y < box.low[1] || y >= box.high[1]) continue;
      write(out, half, done, row * v.row() + box.low[2] - done, value);
      done = row * v.row() + box.high[2];
    }
    write(out, half, done, last * v.row() - done, value);
#if defined(__SSE2__)
    _mm_sfence();
#endif
  });
}

// Distances in a box of the volume, whose seeds lie in planes [first, last) of it; false if there
// is no seed, and nothing is written.
bool transform(DistanceJob& job, const Volume& v, const Box& box, int64_t first, int64_t last) {
  const int64_t corner = box.low[0] * v.plane() + box.low[1] * v.row() + box.low[2];
  job.classes = v.classes + corner * v.item;
  job.item = v.item;
  job.class_row = job.out_row = v.row();
  job.class_plane = job.out_plane = v.plane();
  for (int axis = 0; axis < 3; ++axis) job.shape[axis] = box.high[axis] - box.low[axis];
  const bool in_place = static_cast<void*>(job.work) == job.out;
  job.out += corner * (job.half ? 2 : 4);
  if (in_place) {
    job.work = reinterpret_cast<float*>(job.out);
    job.work_row = v.row();
    job.work_plane = v.plane();
  } else {
    job.work_row = job.shape[2];
    job.work_plane = job.shape[1] * job.shape[2];
  }
  const auto& kernel = kernels->distance;
  std::vector<char> has(static_cast<size_t>(last - first));
  parallel(last - first, distance_scratch(job.shape[1]), [&](int64_t i, void* scratch) {
    has[size_t(i)] = kernel.plane(job, first + i, scratch);
  });
  std::vector<int32_t> planes;
  for (int64_t i = 0; i < last - first; ++i)
    if (has[size_t(i)]) planes.push_back(int32_t(first + i));
  if (planes.empty()) return false;
  const int64_t lanes = job.lanes(), per_row = (lanes + kLinesPerTask - 1) / kLinesPerTask;
  parallel(job.rows() * per_row, distance_scratch(job.shape[0]), [&](int64_t i, void* scratch) {
    const int64_t start = i % per_row * kLinesPerTask;
    kernel.lines(job, planes.data(), int64_t(planes.size()), i / per_row, start,
                 std::min(start + kLinesPerTask, lanes), scratch);
  });
  return true;
}

// `mask`: 0 and 1, (V, z, y, x) of uint8; `out`: float32; both in C order.
void distance_transform(const py::array& mask, const std::array<double, 3>& spacing, double limit,
                        py::array out) {
  const Volume shape = volume_of(mask, 0);
  const Metric metric(shape.shape, spacing, limit);
  auto* to = static_cast<char*>(out.mutable_data());
  const int64_t count = shape.voxels() ? mask.shape(0) : 0;
  std::vector<Volume> volumes;
  for (int64_t i = 0; i < count; ++i) volumes.push_back(volume_of(mask, i));
  py::gil_scoped_release release;
  for (const Volume& v : volumes) {
    const auto boxes = boxes_of(v, 2);
    const Box inside = boxes[1].empty() ? Box() : boxes[1].wider({1, 1, 1}, v.shape);
    if (boxes[0].empty()) {
      fill_around(to, false, v, Box(), float(limit));
    } else {
      const Box near = boxes[0].wider(metric.margin, v.shape);
      if (inside.empty() || !inside.covers(v.shape)) fill_around(to, false, v, inside, 0);
      if (!inside.empty()) {
        const Box box = inside.common(near);
        if (!near.covers(v.shape)) fill_box(to, false, v, inside, float(limit));
        DistanceJob job{};
        metric.set(job);
        job.wanted = 0;
        job.limit = float(limit);
        job.out = to;
        job.work = reinterpret_cast<float*>(to);
        const int64_t first = std::max(boxes[0].low[0], box.low[0]);
        const int64_t last = std::min(boxes[0].high[0], box.high[0]);
        if (!box.empty()) transform(job, v, box, first - box.low[0], last - box.low[0]);
      }
    }
    to += v.voxels() * 4;
  }
}

enum Convention { kKervadec, kExact, kUnsigned };  // as in fastloss/backends/distances.py

// `classes`: class indices (V, z, y, x) of uint8 or uint16; `out`: (V, count, z, y, x) of float32
// or float16, for the classes [first, first + count); both in C order.
void signed_distance(const py::array& classes, int64_t first, const std::array<double, 3>& spacing,
                     int convention, double limit, py::array out) {
  const bool kervadec = convention == kKervadec, exact = convention == kExact;
  const int64_t count = out.shape(1);
  const Volume shape = volume_of(classes, 0);
  const Metric metric(shape.shape, spacing, limit);
  const bool half = out.itemsize() == 2;
  auto* to = static_cast<char*>(out.mutable_data());
  std::vector<Volume> volumes;
  for (int64_t i = 0; i < (shape.voxels() ? classes.shape(0) : 0); ++i)
    volumes.push_back(volume_of(classes, i));
  py::gil_scoped_release release;
  std::unique_ptr<float[]> memory;
  int64_t held = 0;
  const auto hold = [&](const Box& box) {
    int64_t wanted = 1;
    for (int axis = 0; axis < 3; ++axis) wanted *= box.high[axis] - box.low[axis];
    if (wanted > held) {
      memory.reset();
      memory.reset(new float[size_t(wanted)]);
      held = wanted;
    }
    return memory.get();
  };
  for (const Volume& v : volumes) {
    const auto boxes = boxes_of(v, first + count);
    for (int64_t c = first; c < first + count; ++c, to += v.voxels() * (half ? 2 : 4)) {
      const Box& own = boxes[size_t(c)];
      const float far = float(limit);
      if (own.empty()) {
        fill_around(to, half, v, Box(), exact ? far : 0);
        continue;
      }
      DistanceJob job{};
      metric.set(job);
      job.wanted = uint32_t(c);
      job.limit = far;
      job.half = half;
      const Box near = own.wider(metric.margin, v.shape);
      if (!near.covers(v.shape)) fill_around(to, half, v, near, far);
      DistanceJob outside = job;
      outside.out = to;
      outside.work = half ? hold(near) : reinterpret_cast<float*>(to);
      transform(outside, v, near, own.low[0] - near.low[0], own.high[0] - near.low[0]);
      const Box box = own.wider({1, 1, 1}, v.shape);
      DistanceJob inside = job;
      inside.others = true;
      inside.finish = Finish::inside;
      inside.sign = convention == kUnsigned ? 1 : -1;
      inside.shift = kervadec ? 1 : 0;
      inside.out = to;
      inside.work = hold(box);
      if (!transform(inside, v, box, 0, box.high[0] - box.low[0]))
        fill_around(to, half, v, Box(), exact ? -far : 0);
    }
  }
}

// ------------------------------------------------------------------ class indices

// Labels of one row as class indices, `classes` standing for all that are none; how many have a
// fraction or are NaN.
template <class Label, class Index>
int64_t row_of_indices(const char* from, int64_t stride, int64_t n, int64_t classes, Index* to) {
  int64_t fractions = 0;
  for (int64_t i = 0; i < n; ++i) {
    Label label;
    std::memcpy(&label, from + i * stride, sizeof label);
    if constexpr (std::is_floating_point<Label>::value) {
      const bool known = label >= 0 && label < Label(classes);
      to[i] = known ? Index(label) : Index(classes);
      fractions += known ? Label(to[i]) != label : label != label;
    } else {
      to[i] = label >= 0 && uint64_t(label) < uint64_t(classes) ? Index(label) : Index(classes);
    }
  }
  return fractions;
}

template <class Label, class Index>
int64_t indices_of(const py::array& labels, int64_t classes, Index* to) {
  const auto* from = static_cast<const char*>(labels.data());
  std::array<int64_t, 4> shape, strides;
  for (int axis = 0; axis < 4; ++axis) {
    shape[size_t(axis)] = labels.shape(axis);
    strides[size_t(axis)] = labels.strides(axis);
  }
  const int64_t tasks = shape[0] * shape[1];
  std::vector<int64_t> fractions(static_cast<size_t>(tasks));
  py::gil_scoped_release release;
  parallel(shape[2] && shape[3] ? tasks : 0, 1, [&](int64_t i, void*) {
    const char* plane = from + i / shape[1] * strides[0] + i % shape[1] * strides[1];
    for (int64_t y = 0; y < shape[2]; ++y)
      fractions[size_t(i)] +=
          row_of_indices<Label, Index>(plane + y * strides[2], strides[3], shape[3], classes,
                                       to + (i * shape[2] + y) * shape[3]);
  });
  int64_t sum = 0;
  for (int64_t each : fractions) sum += each;
  return sum;
}

// Writes the class indices of labels (V, z, y, x) of any number type and strides; how many of them
// have a fraction or are NaN.
int64_t class_indices(const py::array& labels, int64_t classes, py::array out) {
  const char kind = labels.dtype().kind();
  const auto size = labels.itemsize();
  const auto run = [&](auto label) -> int64_t {
    using Label = decltype(label);
    if (out.itemsize() == 1)
      return indices_of<Label>(labels, classes, static_cast<uint8_t*>(out.mutable_data()));
    return indices_of<Label>(labels, classes, static_cast<uint16_t*>(out.mutable_data()));
  };
  if (kind == 'f') return size == 4 ? run(float()) : run(double());
  const bool is_signed = kind == 'i';
  if (size == 1) return is_signed ? run(int8_t()) : run(uint8_t());
  if (size == 2) return is_signed ? run(int16_t()) : run(uint16_t());
  if (size == 4) return is_signed ? run(int32_t()) : run(uint32_t());
  return is_signed ? run(int64_t()) : run(uint64_t());
}

}  // namespace

void bind_distance(py::module_& m) {
  m.def("distance_transform", &distance_transform);
  m.def("signed_distance", &signed_distance);
  m.def("class_indices", &class_indices);
}

}  // namespace fastloss
