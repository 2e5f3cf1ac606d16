// The Python binding of soft skeletons: cuts a batch into parts and runs them on threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "shared.h"
#include "soft_skeleton.h"
#include "threads.h"

namespace py = pybind11;

namespace fastloss {

#define X(name) extern const SkeletonKernels skeleton_kernels_##name;
FASTLOSS_ISAS
#undef X

namespace {

const SkeletonKernels& chosen() {
  const std::string isa = kernels->name;
#define X(name) \
  if (isa == #name) return skeleton_kernels_##name;
  FASTLOSS_ISAS
#undef X
  throw std::logic_error("no soft skeleton for " + isa);
}

// An array (B, C, *spatial) of the shape of p.
Volumes volumes(const py::array& a, const py::array& p, const char* name) {
  bool same = a.ndim() == p.ndim();
  for (py::ssize_t i = 0; same && i < p.ndim(); ++i) same = a.shape(i) == p.shape(i);
  if (!same) throw py::value_error(std::string(name) + ": expected the shape of p");
  Volumes v;
  v.data = static_cast<char*>(const_cast<void*>(a.data()));
  v.batch_stride = a.strides(0);
  v.channel_stride = a.strides(1);
  const py::ssize_t axes = a.ndim() - 2;
  v.stride[2] = a.strides(a.ndim() - 1);
  if (axes > 1) v.stride[0] = a.strides(2);
  if (axes > 2) v.stride[1] = a.strides(3);
  return v;
}

// The working memory of all threads is to be at most this many times as large as p, unless a
// single one needs more.
constexpr int64_t kTimes = 2;

void run(const SkeletonJob& job) {
  const SkeletonKernels& kernels = chosen();
  const int64_t channels = job.batch * job.channels, planes = job.shape[0];
  const int64_t plane = job.shape[1] * job.shape[2];
  if (channels * planes * plane == 0) return;
  const int64_t item = job.dtype == DType::f64 ? 8 : 4, most = kTimes * channels * planes * plane;
  const int64_t bytes = (int64_t(kernels.bytes(job)) + 4095) / 4096 * 4096;
  int64_t threads = std::min<int64_t>((orphaned ? 1 : num_threads()), most * item / bytes);
  // Channels are cut only where there are few, as each part reads its neighbours' planes as well.
  const int64_t wanted = threads > 1 ? (2 * threads + channels - 1) / channels : 1;
  const int64_t cuts = std::max<int64_t>(std::min<int64_t>(wanted, planes / (3 * job.reach())), 1);
  const int64_t parts = channels * cuts, size = (planes + cuts - 1) / cuts;
  threads = std::max<int64_t>(std::min(threads, parts), 1);
  const std::unique_ptr<char, void (*)(void*)> memory(
      static_cast<char*>(std::calloc(size_t(threads), size_t(bytes))), std::free);
  if (!memory) throw std::bad_alloc();
  std::atomic<int64_t> next{0};
  parallel(threads, 1, [&](int64_t i, void*) {
    for (int64_t part = next++; part < parts; part = next++) {
      const int64_t first = part % cuts * size, last = std::min(first + size, planes);
      if (first < last) kernels.part(job, part / cuts, first, last, memory.get() + i * bytes);
    }
  });
}

void soft_skeleton(const py::array& p, const std::string& dtype, const py::object& upstream,
                   py::array out, int iterations) {
  const py::ssize_t axes = p.ndim() - 2;
  if (axes < 1 || axes > 3)
    throw py::value_error("p: expected 1 to 3 spatial axes, got " + std::to_string(axes));
  if (iterations < 0) throw py::value_error("iterations: expected at least 0");
  if (!out.writeable()) throw py::value_error("out: expected a writable array");
  SkeletonJob job;
  job.dtype = dtype_of(dtype);
  if (job.dtype > DType::f64) throw py::type_error("p: expected floating numbers, got " + dtype);
  job.batch = p.shape(0);
  job.channels = p.shape(1);
  job.has_z = axes > 1;
  job.has_y = axes > 2;
  job.shape[2] = p.shape(p.ndim() - 1);
  if (job.has_z) job.shape[0] = p.shape(2);
  if (job.has_y) job.shape[1] = p.shape(3);
  job.iterations = iterations;
  job.p = volumes(p, p, "p");
  job.out = volumes(out, p, "out");
  if (!upstream.is_none()) {
    job.backward = true;
    job.upstream = volumes(upstream.cast<py::array>(), p, "upstream");
  }
  py::gil_scoped_release release;
  run(job);
}

}  // namespace

void bind_soft_skeleton(py::module_& m) { m.def("soft_skeleton", &soft_skeleton); }

}  // namespace fastloss
