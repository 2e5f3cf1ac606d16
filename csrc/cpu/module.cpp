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
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "job.h"

namespace py = pybind11;

namespace fastloss {

#define X(name) extern const Kernels kernels_##name;
FASTLOSS_ISAS
#undef X

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

const Kernels* kernels = nullptr;

// ------------------------------------------------------------------ threads

int wanted_threads = 0;   // set_num_threads; 0: not set
int default_threads = 1;  // what OpenMP said at first
bool pool_used = false;
bool orphaned = false;  // a forked child of a process whose OpenMP threads it did not inherit

void in_child() { orphaned = orphaned || pool_used; }

int num_threads() {
#ifdef _OPENMP
  int limit = omp_get_max_threads();
  if (wanted_threads == 0) return limit;
  // A limit below the default comes from a tool such as threadpoolctl: it holds.
  return limit < default_threads ? std::min(limit, wanted_threads) : wanted_threads;
#else
  return 1;
#endif
}

// A thread's working memory, kept for its next call: new pages would take as long as a small call.
void* working_memory(size_t bytes) {
  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory kept;
  if (kept.bytes < bytes) {
    std::free(kept.data);
    kept.data = std::malloc(bytes);
    kept.bytes = kept.data ? bytes : 0;
  }
  return kept.data;
}

// Calls work(i, scratch) for i in [0, count); the order of the calls is free.
template <class Work>
void parallel(int64_t count, size_t scratch_bytes, const Work& work) {
  int threads = int(std::min<int64_t>(orphaned ? 1 : num_threads(), count));
#ifdef _OPENMP
  if (threads > 1) {
    pool_used = true;
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
      void* scratch = working_memory(scratch_bytes);
      if (!scratch) failed = true;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i)
        if (scratch) work(i, scratch);
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  void* scratch = working_memory(scratch_bytes);
  if (!scratch) throw std::bad_alloc();
  for (int64_t i = 0; i < count; ++i) work(i, scratch);
}

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

// The (B[, C], *spatial) array in memory, with axes merged where they step evenly.
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

constexpr int64_t kRangesPerThread = 16;

// One Request, see fastloss/request.py.
class Passes {
 public:
  Passes(int activation, bool dense, py::object ignore, const std::vector<std::string>& slots,
         const std::vector<double>& gammas) {
    job_.activation = Activation(activation);
    job_.dense = dense;
    if (!ignore.is_none()) {
      job_.has_ignore = true;
      job_.ignore = ignore.cast<int64_t>();
    }
    if (gammas.size() > size_t(kMaxGammas))
      throw py::value_error("gamma: at most " + std::to_string(kMaxGammas) +
                            " different focal exponents fit one loss, got " +
                            std::to_string(gammas.size()));
    Slots& s = job_.slots;
    s.count = int32_t(slots.size());
    s.gammas = int32_t(gammas.size());
    std::copy(gammas.begin(), gammas.end(), s.gamma);
    int focal = 0, focal_rest = 0;
    for (int32_t i = 0; i < s.count; ++i) {
      const std::string& name = slots[size_t(i)];
      if (name == "reference") s.reference = i;
      else if (name == "overlap") s.overlap = i;
      else if (name == "predicted") s.predicted = i;
      else if (name == "predicted_squared") s.predicted_squared = i;
      else if (name == "reference_squared") s.reference_squared = i;
      else if (name == "cross_entropy") s.cross_entropy = i;
      else if (name == "cross_entropy_rest") s.cross_entropy_rest = i;
      else if (name == "uniform") s.uniform = i;
      else if (name == "top_k") s.top_k = i;
      else if (name.rfind("focal_rest:", 0) == 0) s.focal_rest[focal_rest++] = i;
      else if (name.rfind("focal:", 0) == 0) s.focal[focal++] = i;
      else throw py::value_error("unknown sum " + name);
    }
  }

  // Returns None, or (bad labels, the first, bad weights, the first).
  py::object reduce(const py::array& logits, const std::string& logits_dtype,
                    const py::array& target, const std::string& target_dtype,
                    const py::object& weight, const std::string& weight_dtype,
                    py::array_t<double> sums, py::array_t<double> voxels, const py::object& losses,
                    const py::object& loss_weights) const {
    Job job = fill(logits, logits_dtype, target, target_dtype, weight, weight_dtype);
    py::array_t<double> weights;
    if (!losses.is_none()) {
      job.losses = losses.cast<py::array>().mutable_data();
      weights = loss_weights.cast<py::array_t<double>>();
      job.loss_weights = weights.data();
    }
    double *to = sums.mutable_data(), *to_voxels = voxels.mutable_data();
    Faults faults;
    {
      py::gil_scoped_release release;
      run_reduce(job, to, to_voxels, &faults);
    }
    if (!faults.labels && !faults.weights) return py::none();
    return py::make_tuple(faults.labels, faults.first_label, faults.weights, faults.first_weight);
  }

  void apply(const py::array& logits, const std::string& logits_dtype, const py::array& target,
             const std::string& target_dtype, const py::object& weight,
             const std::string& weight_dtype, const py::array_t<double>& coefficients,
             py::array out, const py::object& losses) const {
    Job job = fill(logits, logits_dtype, target, target_dtype, weight, weight_dtype);
    if (!losses.is_none()) job.losses = losses.cast<py::array>().mutable_data();
    if (!out.writeable()) throw py::value_error("out: expected a writable array");
    job.out = view(out, logits_dtype, true);
    job.coefficients = coefficients.data();
    // Past the caches a store does not first read the line. In place the line is there already,
    // and a small gradient is better left where its reader finds it.
    int64_t bytes = job.batch * job.classes * job.voxels * item_size(job.out.dtype);
    job.stream = job.out.data != job.logits.data && bytes >= (int64_t(1) << 20);
    py::gil_scoped_release release;
    run_apply(job);
  }

 private:
  Job job_;

  Job fill(const py::array& logits, const std::string& logits_dtype, const py::array& target,
           const std::string& target_dtype, const py::object& weight,
           const std::string& weight_dtype) const {
    Job job = job_;
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
    return job;
  }

  // The blocks of a batch, in ranges that follow each other in memory: few enough that threads
  // mostly go on where they are, and enough that they end together.
  struct Plan {
    int64_t block;           // voxels
    int64_t blocks, ranges;  // of a sample
    int64_t range;           // blocks

    explicit Plan(const Job& job) {
      block = block_voxels(job.classes, job.voxels);
      blocks = (job.voxels + block - 1) / block;
      int64_t wanted = kRangesPerThread * num_threads();
      range = std::max<int64_t>(blocks * job.batch / wanted, 1);
      ranges = (blocks + range - 1) / range;
    }
  };

  static void run_reduce(const Job& job, double* sums, double* voxels, Faults* faults) {
    const Plan plan(job);
    int64_t blocks = plan.blocks, count = job.batch * blocks;
    int64_t size = (job.slots.count + 1) * job.classes;  // see Blocks
    int64_t wanted = job.slots.count * job.classes;
    std::vector<double> partial(size_t(count * size)), weights(static_cast<size_t>(count));
    std::vector<Faults> found(static_cast<size_t>(count));
    parallel(job.batch * plan.ranges, kernels->scratch_size(job), [&](int64_t i, void* scratch) {
      int64_t sample = i / plan.ranges, first = i % plan.ranges * plan.range;
      int64_t last = std::min(first + plan.range, blocks), place = sample * blocks + first;
      Blocks here = {first * plan.block,
                     std::min(last * plan.block, job.voxels),
                     plan.block,
                     partial.data() + place * size,
                     &weights[size_t(place)],
                     &found[size_t(place)]};
      kernels->reduce(job, sample, here, scratch);
    });
    std::fill(sums, sums + wanted * job.batch, 0.0);
    std::fill(voxels, voxels + job.batch, 0.0);
    for (int64_t i = 0; i < count; ++i) {
      int64_t sample = i / blocks;
      voxels[sample] += weights[size_t(i)];
      faults->add(found[size_t(i)]);
      for (int64_t s = 0; s < job.slots.count; ++s) {
        double* to = sums + (s * job.batch + sample) * job.classes;
        const double* from = partial.data() + i * size + s * job.classes;
        for (int64_t c = 0; c < job.classes; ++c) to[c] += from[c];
      }
    }
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
      .def(py::init<int, bool, py::object, const std::vector<std::string>&,
                    const std::vector<double>&>())
      .def("reduce", &Passes::reduce)
      .def("apply", &Passes::apply);
  m.def("isa", [] { return public_name(kernels->name); });
  m.def("built_isas", &built);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.push_back(public_name(k->name));
    return names;
  });
  m.def("get_num_threads", &num_threads);
  m.def("set_num_threads", [](int n) { wanted_threads = n; });
  m.def("copy_bandwidth", &copy_bandwidth);
  m.def("read_bandwidth", &read_bandwidth);
}
