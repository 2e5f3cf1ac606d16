// The two passes over one block of voxels. Compiled once per instruction set.
#include "general.h"
#include "softmax_labels.h"
#include "tile.h"
#include "two_classes.h"

namespace {

enum class Path { two_classes, softmax_labels, general };

Path path_of(const Job& job) {
  if (suits_two_classes(job)) return Path::two_classes;
  if (job.activation == Activation::softmax && !job.dense) return Path::softmax_labels;
  return Path::general;
}

bool in_double(const Job& job) { return job.logits.dtype == DType::f64; }

template <class T>
void reduce_block(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch,
                  double* sums, double* weight, Faults* faults) {
  Tile<T> tile(job, sample, scratch);
  int64_t count = int64_t(job.slots.count + 1) * job.classes;
  for (int64_t i = 0; i < count; ++i) sums[i] = 0;
  *weight = 0;
  Path path = path_of(job);
  for (int64_t v = first; v < last; v += tile.step) {
    tile.move(v, int(last - v < tile.step ? last - v : tile.step), faults);
    if (path == Path::two_classes) reduce_two_classes(tile, sums, weight);
    else if (path == Path::softmax_labels) reduce_softmax_labels(tile, sums, weight);
    else reduce_general(tile, sums, weight);
  }
}

template <class T>
void apply_block(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch) {
  Tile<T> tile(job, sample, scratch);
  Path path = path_of(job);
  int64_t lead = fastloss::voxels_to_line(job, sample);
  for (int64_t v = first; v < last;) {
    int64_t next = v + tile.step;
    if (v < lead && next > lead) next = lead;
    if (next > last) next = last;
    tile.move(v, int(next - v), nullptr);
    v = next;
    if (path == Path::two_classes) apply_two_classes(tile);
    else if (path == Path::softmax_labels) apply_softmax_labels(tile);
    else apply_general(tile);
  }
#if defined(__SSE2__)
  if (job.stream) _mm_sfence();
#endif
}

size_t scratch_size(const Job& job) {
  return in_double(job) ? Tile<double>::bytes(job) : Tile<float>::bytes(job);
}
void reduce(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch,
            double* sums, double* weight, Faults* faults) {
  (in_double(job) ? reduce_block<double> : reduce_block<float>)(job, sample, first, last, scratch,
                                                                sums, weight, faults);
}
void apply(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch) {
  (in_double(job) ? apply_block<double> : apply_block<float>)(job, sample, first, last, scratch);
}

}  // namespace

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)
#define FASTLOSS_TEXT_(a) #a
#define FASTLOSS_TEXT(a) FASTLOSS_TEXT_(a)

namespace fastloss {
extern const Kernels FASTLOSS_JOIN(kernels_, FASTLOSS_ISA);
const Kernels FASTLOSS_JOIN(kernels_, FASTLOSS_ISA) = {FASTLOSS_TEXT(FASTLOSS_ISA), scratch_size,
                                                       reduce, apply};
}  // namespace fastloss
