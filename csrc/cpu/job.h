// The arguments of one call of a pass. Plain data: compiled alike for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "distance_job.h"
#include "errors.h"
#include "voxel.h"

namespace fastloss {

enum class DType : int32_t { f32, f16, bf16, f64, u8, i8, u16, i16, u32, i32, u64, i64 };

inline int item_size(DType dtype) {
  switch (dtype) {
    case DType::u8:
    case DType::i8:
      return 1;
    case DType::f16:
    case DType::bf16:
    case DType::u16:
    case DType::i16:
      return 2;
    case DType::f32:
    case DType::u32:
    case DType::i32:
      return 4;
    default:
      return 8;
  }
}

constexpr int kMaxAxes = 64;
constexpr int kMaxGammas = 8;
constexpr int kMaxSums = 64;

// A borrowed array (B, C, *spatial) or (B, *spatial). Strides in bytes. Spatial axes that step
// through memory evenly are merged, so a contiguous or channels-last array has one.
struct Array {
  char* data = nullptr;
  DType dtype = DType::f32;
  int32_t axes = 0;
  int64_t batch_stride = 0;
  int64_t channel_stride = 0;
  int64_t shape[kMaxAxes];
  int64_t stride[kMaxAxes];
};

enum class Activation : int32_t { softmax, sigmoid, none };

// The functions of the target that weigh a sum, in the order of `fastloss.sums.WEIGHTS`.
enum class Weight : int32_t { one, target, rest, target_squared };

// Σ over voxels of m · weight · field · function(p).
struct Sum {
  Weight weight = Weight::one;
  Function function = Function::one;
  double parameter = 0;
  int32_t field = -1;  // its index in `Job::fields`, or −1
};

// Named sums, as bits: a fast path lists those that it takes.
enum Named : uint32_t {
  kReference = 1,
  kOverlap = 2,
  kPredicted = 4,
  kPredictedSquared = 8,
  kReferenceSquared = 16,
  kCrossEntropy = 32,
  kCrossEntropyRest = 64,
  kUniform = 128,
  kUniformRest = 256,
  kFocal = 512,
  kTopK = 1024,
  kUnnamed = 2048,
  kFieldPredicted = 4096
};

// The sums beside which the passes of labels write losses of voxels. With any other a job is
// general.
constexpr uint32_t kWithLosses = kReference | kOverlap | kPredicted | kPredictedSquared |
                                 kReferenceSquared | kCrossEntropy | kUniform | kFocal;

// The bit of a sum. Of sums with a field, Σ field · p alone has one.
inline uint32_t name_of(const Sum& sum) {
  const auto is = [&](Weight w, Function f) { return sum.weight == w && sum.function == f; };
  if (sum.field >= 0) return is(Weight::one, Function::p) ? kFieldPredicted : kUnnamed;
  if (is(Weight::target, Function::one)) return kReference;
  if (is(Weight::target, Function::p)) return kOverlap;
  if (is(Weight::one, Function::p)) return kPredicted;
  if (is(Weight::one, Function::p_squared)) return kPredictedSquared;
  if (is(Weight::target_squared, Function::one)) return kReferenceSquared;
  if (is(Weight::target, Function::log)) return kCrossEntropy;
  if (is(Weight::rest, Function::log_rest)) return kCrossEntropyRest;
  if (is(Weight::one, Function::log)) return kUniform;
  if (is(Weight::one, Function::log_rest)) return kUniformRest;
  if (is(Weight::target, Function::focal)) return kFocal;
  return kUnnamed;
}

// Positions of the named sums in the (S, B, C) arrays; −1: not requested.
struct Slots {
  int32_t reference = 0;
  int32_t overlap = -1;
  int32_t predicted = -1;
  int32_t predicted_squared = -1;
  int32_t reference_squared = -1;
  int32_t cross_entropy = -1;
  int32_t cross_entropy_rest = -1;
  int32_t uniform = -1;
  int32_t uniform_rest = -1;
  int32_t field_predicted = -1;
  int32_t top_k = -1;  // Σ field · g (−log p), where the field is `losses`
  int32_t focal[kMaxGammas];
  double gamma[kMaxGammas];
  int32_t gammas = 0;
  int32_t count = 0;   // of all sums
  uint32_t kinds = 0;  // the bits of `Named` that occur
};

enum class FieldKind : int32_t { voxel, of_class, labels };
struct Field {
  Array array;
  FieldKind kind;
};

// The kinds of map: see fastloss/maps.py.
enum class MapKind : int32_t { none, voxel, of_class, error, label, mask };

struct Job {
  Activation activation = Activation::softmax;
  bool dense = false;
  bool has_ignore = false;
  int64_t ignore = 0;
  Slots slots;
  int64_t batch = 0;
  int64_t classes = 0;
  int64_t voxels = 0;  // of one sample
  Array logits, target, weight, out;
  bool weighted = false;                 // `weight` is given
  bool stream = false;                   // write the gradient past the caches
  const double* coefficients = nullptr;  // (S, B, C), apply only
  const Sum* sums = nullptr;             // as many as slots.count
  const Field* fields = nullptr;
  int32_t field_count = 0;
  // The region of every voxel; null: each sample is a row.
  const Array* regions = nullptr;
  bool regions_by_class = false;  // every class has a map of them
  int64_t rows = 1;               // of a sample
  MapKind map = MapKind::none;
  void* map_out = nullptr;
  DType map_dtype = DType::f32;
  const double* map_coefficients = nullptr;  // (S, C)
  // One number per voxel, (B, voxels) of the working type: reduce writes m w_y (−log p_y) there,
  // and apply multiplies the derivative by the slot `top_k` by it.
  void* losses = nullptr;
  const double* loss_weights = nullptr;  // w, (C,), reduce only
  // Histograms of errors, of samples: see errors.h and tallies.h.
  int32_t histograms = 0;
  ErrorKind error_kinds[kMaxHistograms] = {};
  double weight_scale = 1;       // by which voxel weights become integers
  const void* slopes = nullptr;  // apply only

  // Whether only these sums, of `Named`, are requested, and neither regions nor histograms.
  bool asks_only_for(uint32_t named) const {
    return (slots.kinds & ~named) == 0 && !regions && map == MapKind::none && histograms == 0;
  }
  // Where the coefficients of a sum begin, (C,).
  const double* coefficients_of(int64_t sum, int64_t sample, int64_t row) const {
    return coefficients + ((sum * batch + sample) * rows + row) * classes;
  }
};

// Faults in the caller's data; "first" is by voxel order.
struct Faults {
  int64_t labels = 0;  // bad labels or, in a dense target, integers other than 0 and 1
  double first_label = 0;
  int64_t weights = 0;
  double first_weight = 0;

  void add(const Faults& other) {
    if (labels == 0) first_label = other.first_label;
    if (weights == 0) first_weight = other.first_weight;
    labels += other.labels;
    weights += other.weights;
  }
};

// The voxels of a tile: few enough that its rows stay in the caches, and enough to amortise the
// work per tile.
inline int tile_voxels(int64_t classes) {
  int64_t most = 65536 / (classes > 0 ? classes : 1) / 16 * 16, limit = 512;
  return int(most < 16 ? 16 : most > limit ? limit : most);
}

// The voxels of a block, which has its own sums. It does not depend on the number of threads: sums
// added in block order are bit-identical for any number.
inline int64_t block_voxels(int64_t classes, int64_t voxels, int64_t sums = 0) {
  int64_t tile = tile_voxels(classes);
  int64_t wanted = 16384 / (classes > 0 ? classes : 1);
  // Bounds the work on the sums of regions, which are many where regions are.
  int64_t blocks = 512;
  if (sums > 2048) blocks = (int64_t(1) << 20) / sums;
  if (blocks < 64) blocks = (int64_t(1) << 22) / sums < 64 ? (int64_t(1) << 22) / sums : 64;
  if (blocks < 4) blocks = 4;
  if (wanted < voxels / blocks) wanted = voxels / blocks;
  wanted = (wanted + tile - 1) / tile * tile;
  return wanted < tile ? tile : wanted;
}

// The voxels of a sample before the first whose gradient starts a cache line, for non-temporal
// stores: partial lines cost several times as much. Tiles of the apply pass start there.
inline int64_t voxels_to_line(const Job& job, int64_t sample) {
  const int64_t item = item_size(job.out.dtype), size = job.out.stride[0];
  const bool rows = size == item;
  const bool last = size == item * job.classes && job.out.channel_stride == item;
  if (!job.stream || job.out.axes != 1 || !(rows || last)) return 0;
  const int64_t past = int64_t(uintptr_t(job.out.data + sample * job.out.batch_stride) % 64);
  for (int64_t voxels = 0; voxels < 64; ++voxels)
    if ((past + voxels * size) % 64 == 0) return voxels;
  return 0;
}

// Consecutive blocks of a sample, and the results of the reduce pass over them.
struct Blocks {
  int64_t first, last;  // voxels
  int64_t size;         // voxels of every block but the last
  double* sums;         // (blocks, rows, S + 1, C), the last slot unused; initially zeros
  double* weights;      // (blocks, rows), the sums of voxel weights; initially zeros
  Faults* faults;       // (blocks,)
  uint64_t* tallies;    // of errors, or null

  int64_t of(int64_t voxel) const { return (voxel - first) / size; }
  // The voxels of the tile that starts at v.
  int tile(int64_t v, int step) const {
    int64_t end = first + (of(v) + 1) * size;
    end = (end < last ? end : last) - v;
    return int(end < step ? end : step);
  }
};

// Bytes of scratch memory of a thread.
using ScratchSize = size_t (*)(const Job&);
using Reduce = void (*)(const Job&, int64_t sample, const Blocks&, void* scratch);
using Apply = void (*)(const Job&, int64_t sample, int64_t first, int64_t last, void* scratch);
// Writes a map, and records faults in the data.
using WriteMap = void (*)(const Job&, int64_t sample, int64_t first, int64_t last, Faults*,
                          void* scratch);

struct Kernels {
  const char* name;
  ScratchSize scratch_size;
  Reduce reduce;
  Apply apply;
  WriteMap write_map;
  DistanceKernels distance;
};

// Those of the chosen instruction set.
extern const Kernels* kernels;

}  // namespace fastloss
