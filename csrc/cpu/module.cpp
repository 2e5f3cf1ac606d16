// The Python binding: takes arrays, chooses the instruction set, and runs blocks on threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "components.h"
#include "distance.h"
#include "job.h"
#include "shared.h"
#include "surface.h"
#include "tallies.h"
#include "threads.h"

namespace py = pybind11;

namespace fastloss {

#define X(name) extern const Kernels kernels_##name;
FASTLOSS_ISAS
#undef X

void bind_soft_skeleton(py::module_& m);
void bind_counts(py::module_& m);

namespace {

// ------------------------------------------------------------------ instruction sets

bool runs_here(const std::string& name) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (name == "x86_64_v2")
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  if (name == "x86_64_v3")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (name == "x86_64_v4")
    return runs_here("x86_64_v3") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return name == "baseline";
}

// "x86-64-v3" for the C++ name x86_64_v3.
std::string public_name(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#define X(name) \
  if (runs_here(#name)) found.push_back(&kernels_##name);
  FASTLOSS_ISAS
#undef X
  return found;
}

std::vector<std::string> built() {
  std::vector<std::string> names;
#define X(name) names.push_back(public_name(#name));
  FASTLOSS_ISAS
#undef X
  return names;
}

const Kernels* choose() {
  auto found = available();
  const char* forced = std::getenv("FASTLOSS_ISA");
  if (!forced || !*forced) return found.back();
  std::string wanted = public_name(forced), names;
  for (const Kernels* k : found) {
    if (public_name(k->name) == wanted) return k;
    names += (names.empty() ? "" : ", ") + public_name(k->name);
  }
  throw std::runtime_error("FASTLOSS_ISA: expected one of " + names + " on this processor, got '" +
                           forced + "'");
}

}  // namespace

const Kernels* kernels = nullptr;

// ------------------------------------------------------------------ arrays

DType dtype_of(const std::string& name) {
  static const std::pair<const char*, DType> names[] = {
      {"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16},
      {"float64", DType::f64}, {"uint8", DType::u8},    {"bool", DType::u8},
      {"int8", DType::i8},     {"uint16", DType::u16},  {"int16", DType::i16},
      {"uint32", DType::u32},  {"int32", DType::i32},   {"uint64", DType::u64},
      {"int64", DType::i64}};
  for (const auto& entry : names)
    if (name == entry.first) return entry.second;
  throw py::type_error("unsupported dtype " + name);
}

Array view(const py::array& a, const std::string& dtype, bool channels) {
  Array r;
  r.data = static_cast<char*>(const_cast<void*>(a.data()));
  r.dtype = dtype_of(dtype);
  py::ssize_t first = channels ? 2 : 1;
  r.batch_stride = a.strides(0);
  r.channel_stride = channels ? a.strides(1) : 0;
  for (py::ssize_t i = first; i < a.ndim(); ++i) {
    int64_t n = a.shape(i), stride = a.strides(i);
    if (n == 1) continue;
    int last = r.axes - 1;
    if (last >= 0 && r.stride[last] == stride * n) {
      r.shape[last] *= n;
      r.stride[last] = stride;
    } else {
      r.shape[r.axes] = n;
      r.stride[r.axes++] = stride;
    }
  }
  if (r.axes == 0) {
    r.shape[0] = 1;
    r.stride[0] = item_size(r.dtype);
    r.axes = 1;
  }
  return r;
}

namespace {

constexpr int64_t kRangesPerThread = 16;

// One Request, see fastloss/request.py.
class Passes {
 public:
  // Sums are (weight, function, parameter, place among the fields or −1); histograms are kinds of
  // error, whose sums are behind the others.
  Passes(int activation, bool dense, py::object ignore,
         const std::vector<std::tuple<int, int, double, int>>& sums,
         const std::vector<int>& histograms) {
    for (int kind : histograms) job_.error_kinds[job_.histograms++] = ErrorKind(kind);
    job_.activation = Activation(activation);
    job_.dense = dense;
    if (!ignore.is_none()) {
      job_.has_ignore = true;
      job_.ignore = ignore.cast<int64_t>();
    }
    if (sums.size() > size_t(kMaxSums))
      throw py::value_error("terms: at most " + std::to_string(kMaxSums) +
                            " different sums fit one loss, got " + std::to_string(sums.size()));
    for (const auto& [weight, function, parameter, field] : sums) {
      sums_.push_back({Weight(weight), Function(function), parameter, field});
      name(sums_.back(), int32_t(sums_.size()) - 1);
    }
    job_.slots.count = int32_t(sums_.size());
  }

  // Returns None, or (bad labels, the first, bad weights, the first). `voxel_map`: None or (kind,
  // out, its dtype, coefficients); `more`: see `Operands`. `weight_scale`: see `Job`.
  py::object reduce(const py::array& logits, const std::string& logits_dtype,
                    const py::array& target, const std::string& target_dtype,
                    const py::object& weight, const std::string& weight_dtype,
                    py::array_t<double> sums, py::array_t<double> voxels,
                    const py::object& voxel_map, const py::object& more,
                    double weight_scale) const {
    Operands operands;
    Job job =
        fill(logits, logits_dtype, target, target_dtype, weight, weight_dtype, more, operands);
    job.weight_scale = weight_scale;
    if (!voxel_map.is_none()) set_map(job, voxel_map.cast<py::tuple>(), operands, true);
    double *to = sums.mutable_data(), *to_voxels = voxels.mutable_data();
    Faults faults;
    {
      py::gil_scoped_release release;
      run_reduce(job, to, to_voxels, &faults);
    }
    return told(faults);
  }

  void apply(const py::array& logits, const std::string& logits_dtype, const py::array& target,
             const std::string& target_dtype, const py::object& weight,
             const std::string& weight_dtype, const py::array_t<double>& coefficients,
             py::array out, const py::object& more) const {
    Operands operands;
    Job job =
        fill(logits, logits_dtype, target, target_dtype, weight, weight_dtype, more, operands);
    find_losses(job);
    if (!out.writeable()) throw py::value_error("out: expected a writable array");
    job.out = view(out, logits_dtype, true);
    job.coefficients = coefficients.data();
    std::vector<float> slopes;
    std::vector<double> slopes_of_double;
    if (job.histograms) {
      const double* by = job.coefficients + job.slots.count * job.batch * job.classes;
      if (job.logits.dtype == DType::f64) {
        slopes_of_double = slopes_of<double>(job, by);
        job.slopes = slopes_of_double.data();
      } else {
        slopes = slopes_of<float>(job, by);
        job.slopes = slopes.data();
      }
    }
    // Past the caches a store does not first read the line. In place the line is there already,
    // and a small gradient is better left where its reader finds it.
    int64_t bytes = job.batch * job.classes * job.voxels * item_size(job.out.dtype);
    job.stream = job.out.data != job.logits.data && bytes >= (int64_t(1) << 20);
    py::gil_scoped_release release;
    run_apply(job);
  }

  // Returns as `reduce`.
  py::object write_map(const py::array& logits, const std::string& logits_dtype,
                       const py::array& target, const std::string& target_dtype,
                       const py::object& weight, const std::string& weight_dtype,
                       const py::object& voxel_map, const py::object& more) const {
    Operands operands;
    Job job =
        fill(logits, logits_dtype, target, target_dtype, weight, weight_dtype, more, operands);
    set_map(job, voxel_map.cast<py::tuple>(), operands, false);
    Faults faults;
    {
      py::gil_scoped_release release;
      run_map(job, &faults);
    }
    return told(faults);
  }

 private:
  Job job_;
  std::vector<Sum> sums_;

  // Owns the arrays that a job points at during a call.
  struct Operands {
    std::vector<Field> fields;
    Array regions;
    py::array_t<double> coefficients;
  };

  // Remembers where a named sum is.
  void name(const Sum& sum, int32_t i) {
    Slots& s = job_.slots;
    uint32_t kind = name_of(sum);
    int32_t* const places[] = {&s.reference,          &s.overlap,           &s.predicted,
                               &s.predicted_squared,  &s.reference_squared, &s.cross_entropy,
                               &s.cross_entropy_rest, &s.uniform,           &s.uniform_rest};
    for (size_t bit = 0; bit < std::size(places); ++bit)
      if (kind == uint32_t(1) << bit) *places[bit] = i;
    if (kind == kFocal) {
      if (s.gammas < kMaxGammas) {
        s.gamma[s.gammas] = sum.parameter;
        s.focal[s.gammas++] = i;
      } else {
        kind = kUnnamed;
      }
    }
    if (kind == kFieldPredicted) {
      if (s.field_predicted < 0) s.field_predicted = i;
      else kind = kUnnamed;
    }
    s.kinds |= kind;
  }

  static py::object told(const Faults& faults) {
    if (!faults.labels && !faults.weights) return py::none();
    return py::make_tuple(faults.labels, faults.first_label, faults.weights, faults.first_weight);
  }

  // `more`: None or (fields: (array, dtype, kind) each, regions or None, their dtype, rows).
  Job fill(const py::array& logits, const std::string& logits_dtype, const py::array& target,
           const std::string& target_dtype, const py::object& weight,
           const std::string& weight_dtype, const py::object& more, Operands& operands) const {
    Job job = job_;
    job.sums = sums_.data();
    job.batch = logits.shape(0);
    job.classes = logits.shape(1);
    job.voxels = 1;
    for (py::ssize_t i = 2; i < logits.ndim(); ++i) job.voxels *= logits.shape(i);
    if (logits.ndim() - 2 > kMaxAxes)
      throw py::value_error("logits: at most " + std::to_string(kMaxAxes) + " spatial axes");
    job.logits = view(logits, logits_dtype, true);
    job.target = view(target, target_dtype, job.dense);
    if (!weight.is_none()) {
      job.weighted = true;
      job.weight = view(weight.cast<py::array>(), weight_dtype, false);
    }
    if (more.is_none()) return job;
    const auto parts = more.cast<py::tuple>();
    for (const auto& part : parts[0].cast<py::tuple>()) {
      const auto [array, dtype, kind] = part.cast<std::tuple<py::array, std::string, int>>();
      const FieldKind what = FieldKind(kind);
      operands.fields.push_back({view(array, dtype, what == FieldKind::of_class), what});
    }
    job.fields = operands.fields.data();
    job.field_count = int32_t(operands.fields.size());
    if (!parts[1].is_none()) {
      const auto regions = parts[1].cast<py::array>();
      job.regions_by_class = regions.ndim() == logits.ndim();
      operands.regions = view(regions, parts[2].cast<std::string>(), job.regions_by_class);
      job.regions = &operands.regions;
      job.rows = parts[3].cast<int64_t>();
    }
    return job;
  }

  // A field of one number per voxel that lies as the passes of labels read it: theirs to apply.
  void find_losses(Job& job) const {
    const DType working = job.logits.dtype == DType::f64 ? DType::f64 : DType::f32;
    for (int32_t i = 0; i < job.slots.count; ++i) {
      const Sum& sum = sums_[size_t(i)];
      if (sum.field < 0 || sum.weight != Weight::target || sum.function != Function::log) continue;
      const Field& field = job.fields[sum.field];
      const Array& a = field.array;
      const int64_t item = item_size(working);
      const bool flat = a.axes == 1 && a.stride[0] == item &&
                        (job.batch == 1 || a.batch_stride == item * job.voxels);
      if (job.field_count != 1 || field.kind != FieldKind::voxel || a.dtype != working || !flat)
        return;
      for (int32_t other = 0; other < job.slots.count; ++other)
        if (other != i && sums_[size_t(other)].field >= 0) return;
      uint32_t kinds = kTopK;
      for (const Sum& each : sums_)
        if (each.field < 0) kinds |= name_of(each);
      job.slots.kinds = kinds;
      job.slots.top_k = i;
      job.losses = a.data;
      return;
    }
  }

  void set_map(Job& job, const py::tuple& given, Operands& operands, bool beside_sums) const {
    job.map = MapKind(given[0].cast<int>());
    job.map_out = given[1].cast<py::array>().mutable_data();
    job.map_dtype = dtype_of(given[2].cast<std::string>());
    if (given[3].is_none()) return;
    operands.coefficients = given[3].cast<py::array_t<double>>();
    job.map_coefficients = operands.coefficients.data();
    // The cross-entropy of the voxels alone is what the passes of labels know.
    const int32_t own = job.slots.cross_entropy;
    bool alone = beside_sums && job.map == MapKind::voxel && own >= 0;
    for (int64_t i = 0; i < job.slots.count * job.classes; ++i)
      alone = alone && (i / job.classes == own || job.map_coefficients[i] == 0.0);
    if (!alone || job.activation != Activation::softmax || job.dense || job.regions ||
        job.field_count || job.histograms || (job.slots.kinds & ~kWithLosses) != 0)
      return;
    job.losses = job.map_out;
    job.loss_weights = job.map_coefficients + own * job.classes;
    job.map = MapKind::none;
  }

  // The blocks of a batch, in ranges that follow each other in memory: few enough that threads
  // mostly go on where they are, and enough that they end together.
  struct Plan {
    int64_t block;           // voxels
    int64_t blocks, ranges;  // of a sample
    int64_t range;           // blocks

    explicit Plan(const Job& job) {
      const int64_t sums = job.regions ? job.rows * (job.slots.count + 1) * job.classes : 0;
      block = block_voxels(job.classes, job.voxels, sums);
      blocks = (job.voxels + block - 1) / block;
      int64_t wanted = kRangesPerThread * num_threads();
      range = std::max<int64_t>(blocks * job.batch / wanted, 1);
      if (job.histograms)
        range = std::max<int64_t>(std::min(range, int64_t(kMostTallied) / 2 / block), 1);
      ranges = (blocks + range - 1) / range;
    }
  };

  static void run_reduce(const Job& job, double* sums, double* voxels, Faults* faults) {
    std::fill(sums, sums + job.slots.count * job.batch * job.rows * job.classes, 0.0);
    std::fill(voxels, voxels + job.batch * job.rows, 0.0);
    const Plan plan(job);
    std::vector<Faults> found(size_t(job.batch * plan.blocks));
    if (job.regions) reduce_regions(job, plan, sums, voxels, found.data());
    else reduce_samples(job, plan, sums, voxels, found.data());
    for (const Faults& each : found) faults->add(each);
  }

  // Adds a block's sums of a row, and its voxel weight.
  static void add_row(const Job& job, int64_t row, const double* from, double weight, double* sums,
                      double* voxels) {
    voxels[row] += weight;
    for (int64_t s = 0; s < job.slots.count; ++s) {
      double* to = sums + (s * job.batch * job.rows + row) * job.classes;
      for (int64_t c = 0; c < job.classes; ++c) to[c] += from[s * job.classes + c];
    }
  }

  // Sums of blocks are added in their order.
  static void reduce_samples(const Job& job, const Plan& plan, double* sums, double* voxels,
                             Faults* found) {
    const int64_t blocks = plan.blocks, count = job.batch * blocks;
    const int64_t row = (job.slots.count + 1) * job.classes;  // see Blocks
    std::vector<double> partial(size_t(count * row)), weights(static_cast<size_t>(count));
    Tallies tallies(job, sums + job.slots.count * job.batch * job.classes);
    parallel(job.batch * plan.ranges, kernels->scratch_size(job), [&](int64_t i, void* scratch) {
      const int64_t sample = i / plan.ranges, first = i % plan.ranges * plan.range;
      const int64_t last = std::min(first + plan.range, blocks), place = sample * blocks + first;
      const int64_t begin = first * plan.block, end = std::min(last * plan.block, job.voxels);
      const Blocks here = {begin,
                           end,
                           plan.block,
                           partial.data() + place * row,
                           &weights[size_t(place)],
                           found + place,
                           job.histograms ? tallies.of_thread(sample, end - begin) : nullptr};
      kernels->reduce(job, sample, here, scratch);
    });
    tallies.finish();
    for (int64_t i = 0; i < count; ++i)
      add_row(job, i / blocks, partial.data() + i * row, weights[size_t(i)], sums, voxels);
  }

  // Whether any number is not 0.
  static bool any_number(const double* numbers, int64_t count) {
    return std::any_of(numbers, numbers + count, [](double number) { return number != 0; });
  }

  // A block has voxels of few regions: a range keeps the sums of those alone.
  static void reduce_regions(const Job& job, const Plan& plan, double* sums, double* voxels,
                             Faults* found) {
    const int64_t row = (job.slots.count + 1) * job.classes, rows = job.rows;  // see Blocks
    struct Part {
      std::vector<int64_t> rows;
      std::vector<double> numbers;  // of each, its weight and its sums
    };
    const int64_t count = job.batch * plan.ranges;
    std::vector<Part> parts(static_cast<size_t>(count));
    const size_t own = (kernels->scratch_size(job) + 63) / 64 * 64;
    const size_t table = size_t(rows * (row + 1)) * sizeof(double);
    parallel(count, own + table, [&](int64_t i, void* scratch) {
      const int64_t sample = i / plan.ranges, first = i % plan.ranges * plan.range;
      const int64_t last = std::min(first + plan.range, plan.blocks);
      Part& part = parts[size_t(i)];
      double *weights = reinterpret_cast<double*>(static_cast<char*>(scratch) + own),
             *partial = weights + rows;
      for (int64_t block = first; block < last; ++block) {
        std::memset(weights, 0, table);
        const Blocks here = {block * plan.block,
                             std::min((block + 1) * plan.block, job.voxels),
                             plan.block,
                             partial,
                             weights,
                             found + sample * plan.blocks + block,
                             nullptr};
        kernels->reduce(job, sample, here, scratch);
        for (int64_t r = 0; r < rows; ++r) {
          const double* own = partial + r * row;
          if (weights[r] == 0 && !(job.regions_by_class && any_number(own, row))) continue;
          part.rows.push_back(sample * rows + r);
          part.numbers.push_back(weights[r]);
          part.numbers.insert(part.numbers.end(), own, own + row);
        }
      }
    });
    for (const Part& part : parts) {
      const double* from = part.numbers.data();
      for (int64_t r : part.rows) {
        add_row(job, r, from + 1, from[0], sums, voxels);
        from += row + 1;
      }
    }
  }

  static void run_map(const Job& job, Faults* faults) {
    const Plan plan(job);
    const int64_t size = plan.range * plan.block, count = job.batch * plan.ranges;
    std::vector<Faults> found(static_cast<size_t>(count));
    parallel(count, kernels->scratch_size(job), [&](int64_t i, void* scratch) {
      const int64_t first = i % plan.ranges * size, last = std::min(first + size, job.voxels);
      kernels->write_map(job, i / plan.ranges, first, last, &found[size_t(i)], scratch);
    });
    for (const Faults& each : found) faults->add(each);
  }

  static void run_apply(const Job& job) {
    const Plan plan(job);
    const int64_t size = plan.range * plan.block, count = job.batch * plan.ranges;
    parallel(count, kernels->scratch_size(job), [&](int64_t i, void* scratch) {
      // Backwards: what the reduce pass read last is in the caches still.
      i = count - 1 - i;
      int64_t sample = i / plan.ranges, lead = voxels_to_line(job, sample);
      int64_t first = i % plan.ranges * size, last = std::min(first + size + lead, job.voxels);
      kernels->apply(job, sample, first ? std::min(first + lead, last) : 0, last, scratch);
    });
  }
};

// ------------------------------------------------------------------ the machine's bandwidth

constexpr int64_t kChunk = 1 << 18;

// Bytes per second of `pass` over chunks of two buffers; the median of several runs.
template <class Pass>
double bandwidth(int64_t bytes, int64_t per_byte, const Pass& pass) {
  bytes = std::max<int64_t>(bytes / kChunk, 1) * kChunk;
  std::vector<char> memory(size_t(2 * bytes + 64), 1);
  char* from = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  char* to = from + bytes;
  std::vector<double> rates;
  for (int run = 0; run < 8; ++run) {
    auto start = std::chrono::steady_clock::now();
    parallel(bytes / kChunk, 1,
             [&](int64_t i, void*) { pass(from + i * kChunk, to + i * kChunk); });
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (run) rates.push_back(double(per_byte * bytes) / took.count());
  }
  std::nth_element(rates.begin(), rates.begin() + long(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

double copy_bandwidth(int64_t bytes) {
  py::gil_scoped_release release;
  return bandwidth(bytes, 2, [](const char* from, char* to) {
#if defined(__SSE2__)
    for (int64_t i = 0; i < kChunk; i += 64)
      for (int j = 0; j < 64; j += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(from + i + j)));
    _mm_sfence();
#else
    std::memcpy(to, from, size_t(kChunk));
#endif
  });
}

double read_bandwidth(int64_t bytes) {
  py::gil_scoped_release release;
  return bandwidth(bytes, 1, [](const char* from, char*) {
    // Four sums in registers: one vector as wide as a cache line would be spilled to memory.
    typedef int64_t Words __attribute__((vector_size(16)));
    Words sum[4] = {};
    for (int64_t i = 0; i < kChunk; i += 64) {
      Words words[4];
      std::memcpy(words, from + i, sizeof words);
      for (int j = 0; j < 4; ++j) sum[j] ^= words[j];
    }
    Words all = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
    volatile int64_t sink = all[0] ^ all[1];
    (void)sink;
  });
}

}  // namespace
}  // namespace fastloss

PYBIND11_MODULE(_cpu, m) {
  using namespace fastloss;
  m.doc() = "The two passes over the logits in C++.";
  try {
    kernels = choose();
  } catch (const std::exception& error) {
    throw py::import_error(error.what());
  }
#ifdef _OPENMP
  default_threads = omp_get_max_threads();
#endif
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, in_child);
#endif
  py::class_<Passes>(m, "Passes")
      .def(py::init<int, bool, py::object, const std::vector<std::tuple<int, int, double, int>>&,
                    const std::vector<int>&>())
      .def("reduce", &Passes::reduce)
      .def("apply", &Passes::apply)
      .def("write_map", &Passes::write_map);
  m.def("isa", [] { return public_name(kernels->name); });
  m.def("built_isas", &built);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.push_back(public_name(k->name));
    return names;
  });
  m.def("get_num_threads", &num_threads);
  m.def("set_num_threads", [](int n) { wanted_threads = n; });
  bind_components(m);
  bind_distance(m);
  bind_surface(m);
  bind_counts(m);
  m.def("copy_bandwidth", &copy_bandwidth);
  m.def("read_bandwidth", &read_bandwidth);
  bind_soft_skeleton(m);
  bind_voronoi(m);
}
