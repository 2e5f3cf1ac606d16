// Labels compared and counted: the likeliest class of every voxel, joint histograms of two label
// maps, and the bounds of numbers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "job.h"
#include "shared.h"
#include "threads.h"

namespace py = pybind11;

namespace fastloss {
namespace {

// Voxels of a task at least.
constexpr int64_t kVoxels = 1 << 16;

// `scores`: (B, C, z, y, x) in any strides; `out`: (B, z, y, x) of uint8 or uint16 in C order.
void likeliest(const py::array& scores, const std::string& dtype, py::array out) {
  Job job;
  job.dense = true;  // there are no labels to check
  job.batch = scores.shape(0);
  job.classes = scores.shape(1);
  job.voxels = job.batch ? out.size() / job.batch : 0;
  job.logits = view(scores, dtype, true);
  if (job.logits.dtype > DType::f64)
    throw py::type_error("scores: expected floating numbers, got " + dtype);
  job.map = MapKind::label;
  job.map_out = out.mutable_data();
  job.map_dtype = out.itemsize() == 1 ? DType::u8 : DType::u16;
  if (job.batch * job.voxels == 0) return;
  py::gil_scoped_release release;
  if (job.classes == 1) {
    std::memset(job.map_out, 0, size_t(out.nbytes()));
    return;
  }
  // Whole tiles, in ranges that follow each other in memory.
  const int64_t tile = tile_voxels(job.classes);
  int64_t size = std::max(job.batch * job.voxels / (16 * num_threads()), kVoxels / job.classes);
  size = (size + tile - 1) / tile * tile;
  const int64_t ranges = (job.voxels + size - 1) / size;
  parallel(job.batch * ranges, kernels->scratch_size(job), [&](int64_t i, void* scratch) {
    const int64_t first = i % ranges * size, last = std::min(first + size, job.voxels);
    Faults none;
    kernels->write_map(job, i / ranges, first, last, &none, scratch);
  });
}

// Indices up to which every task counts into a table of its own.
constexpr int64_t kMostOwn = 1024;
// Indices up to which it has two, for voxels in turn: a processor adds to the same number again
// only once it has been stored.
constexpr int64_t kMostTwice = 64;

// Calls add(i, count) for stretches of equal pairs, of which the first is at i; one(i) for single
// voxels.
template <class Index, class Add, class One>
void each_stretch(const Index* a, const Index* b, int64_t n, const Add& add, const One& one) {
  constexpr int64_t kStep = 8 / sizeof(Index);
  constexpr int kBits = 8 * sizeof(Index);
  const auto word = [](const Index* p) {
    uint64_t w;
    std::memcpy(&w, p, sizeof w);
    return w;
  };
  // Nonzero where the indices of a word differ: one differs from that beside it.
  const auto mixed = [](uint64_t w) { return w ^ (w << kBits | w >> (64 - kBits)); };
  int64_t i = 0;
  while (i + kStep <= n) {
    const uint64_t u = word(a + i), v = word(b + i);
    if (mixed(u) | mixed(v)) {
      for (int64_t end = i + kStep; i < end; ++i) one(i);
      continue;
    }
    const int64_t first = i;
    do i += kStep;
    while (i + kStep <= n && ((word(a + i) ^ u) | (word(b + i) ^ v)) == 0);
    add(first, i - first);
  }
  for (; i < n; ++i) one(i);
}

template <class Index>
void count_pairs(const Index* prediction, const Index* reference, int64_t batch, int64_t voxels,
                 int64_t indices, int64_t* counts) {
  const int64_t pairs = indices * indices;
  const bool own = indices <= kMostOwn;
  const int64_t tables = indices <= kMostTwice ? 2 : own ? 1 : 0;
  const int64_t size = own ? std::max(kVoxels, 8 * pairs) : kVoxels;
  const int64_t ranges = (voxels + size - 1) / size;
  std::fill_n(counts, batch * pairs, int64_t(0));
  parallel(batch * ranges, size_t(tables * pairs) * sizeof(uint32_t) + 1,
           [&](int64_t task, void* scratch) {
             const int64_t first = task % ranges * size, n = std::min(size, voxels - first);
             const int64_t start = task / ranges * voxels + first;
             const Index *p = prediction + start, *r = reference + start;
             int64_t* to = counts + task / ranges * pairs;
             const auto place = [&](int64_t i) { return r[i] * indices + p[i]; };
             const auto share = [&](int64_t pair, int64_t count) {
               __atomic_fetch_add(to + pair, count, __ATOMIC_RELAXED);
             };
             if (!own) {
               each_stretch(
                   p, r, n, [&](int64_t i, int64_t count) { share(place(i), count); },
                   [&](int64_t i) { share(place(i), 1); });
               return;
             }
             auto* table = static_cast<uint32_t*>(scratch);
             const int64_t other = (tables - 1) * pairs;
             std::fill_n(table, tables * pairs, uint32_t(0));
             each_stretch(
                 p, r, n, [&](int64_t i, int64_t count) { table[place(i)] += uint32_t(count); },
                 [&](int64_t i) { ++table[place(i) + (i & 1) * other]; });
             for (int64_t pair = 0; pair < pairs; ++pair) {
               const int64_t count = table[pair] + (other ? int64_t(table[other + pair]) : 0);
               if (count) share(pair, count);
             }
           });
}

// `prediction`, `reference`: class indices (B, …) of uint8 or uint16, both alike; `counts`:
// (B, indices, indices) of int64; all in C order. Every index must be below `indices`.
void confusion(const py::array& prediction, const py::array& reference, py::array counts) {
  const int64_t batch = prediction.shape(0), indices = counts.shape(1);
  const int64_t voxels = batch ? prediction.size() / batch : 0;
  const void *p = prediction.data(), *r = reference.data();
  auto* to = static_cast<int64_t*>(counts.mutable_data());
  const bool bytes = prediction.itemsize() == 1;
  py::gil_scoped_release release;
  if (bytes)
    count_pairs(static_cast<const uint8_t*>(p), static_cast<const uint8_t*>(r), batch, voxels,
                indices, to);
  else
    count_pairs(static_cast<const uint16_t*>(p), static_cast<const uint16_t*>(r), batch, voxels,
                indices, to);
}

// The least and the largest of n numbers; `flip` turns bits of each first. SSE2 compares bytes only
// without signs, which turning the topmost bit makes them.
template <class I>
std::pair<I, I> bounds_of(const I* numbers, int64_t n, I flip) {
  I least = I(numbers[0] ^ flip), most = least;
  for (int64_t i = 1; i < n; ++i) {
    const I number = I(numbers[i] ^ flip);
    least = std::min(least, number);
    most = std::max(most, number);
  }
  return {I(least ^ flip), I(most ^ flip)};
}

template <class I>
std::pair<I, I> bounds_of(const py::array& numbers, I flip = 0) {
  const auto* from = static_cast<const I*>(numbers.data());
  const int64_t n = numbers.size(), ranges = (n + kVoxels - 1) / kVoxels;
  std::vector<std::pair<I, I>> each(static_cast<size_t>(ranges));
  py::gil_scoped_release release;
  parallel(ranges, 1, [&](int64_t i, void*) {
    const int64_t first = i * kVoxels;
    each[size_t(i)] = bounds_of(from + first, std::min(n - first, kVoxels), flip);
  });
  std::pair<I, I> all = each[0];
  for (const auto& [least, most] : each) {
    all.first = I(std::min(I(all.first ^ flip), I(least ^ flip)) ^ flip);
    all.second = I(std::max(I(all.second ^ flip), I(most ^ flip)) ^ flip);
  }
  return all;
}

template <class I>
py::tuple told(const std::pair<I, I>& bounds) {
  return py::make_tuple(bounds.first, bounds.second);
}

// `numbers`: integers in C order, at least one.
py::tuple bounds(const py::array& numbers, const std::string& dtype) {
  switch (dtype_of(dtype)) {
    case DType::u8:
      return told(bounds_of<uint8_t>(numbers));
    case DType::i8: {
      const auto [least, most] = bounds_of<uint8_t>(numbers, 0x80);
      return told(std::pair<int8_t, int8_t>(int8_t(least), int8_t(most)));
    }
    case DType::u16:
      return told(bounds_of<uint16_t>(numbers));
    case DType::i16:
      return told(bounds_of<int16_t>(numbers));
    case DType::u32:
      return told(bounds_of<uint32_t>(numbers));
    case DType::i32:
      return told(bounds_of<int32_t>(numbers));
    case DType::u64:
      return told(bounds_of<uint64_t>(numbers));
    case DType::i64:
      return told(bounds_of<int64_t>(numbers));
    default:
      throw py::type_error("numbers: expected integers, got " + dtype);
  }
}

}  // namespace

void bind_counts(py::module_& m) {
  m.def("likeliest", &likeliest);
  m.def("confusion", &confusion);
  m.def("bounds", &bounds);
}

}  // namespace fastloss
