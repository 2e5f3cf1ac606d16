// The passes over one block of voxels, and along lines of them. Compiled once per instruction set.
#include "distance_kernels.h"
#include "general.h"
#include "softmax_class_regions.h"
#include "softmax_dense.h"
#include "softmax_labels.h"
#include "softmax_map.h"
#include "softmax_regions.h"
#include "tile.h"
#include "two_classes.h"

namespace {

enum class Path {
  two_classes,
  softmax_labels,
  softmax_regions,
  class_regions,
  softmax_dense,
  general
};

Path path_of(const Job& job) {
  if (suits_two_classes(job)) return Path::two_classes;
  if (suits_softmax_labels(job)) return Path::softmax_labels;
  if (suits_softmax_regions(job)) return Path::softmax_regions;
  if (suits_class_regions(job)) return Path::class_regions;
  return suits_softmax_dense(job) ? Path::softmax_dense : Path::general;
}

bool in_double(const Job& job) { return job.logits.dtype == DType::f64; }

template <class T>
void reduce_blocks(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  Path path = path_of(job);
  if (path == Path::softmax_labels) return reduce_softmax_labels<T>(job, sample, blocks, scratch);
  if (path == Path::softmax_regions) return reduce_softmax_regions<T>(job, sample, blocks, scratch);
  if (path == Path::class_regions) return reduce_class_regions<T>(job, sample, blocks, scratch);
  Tile<T> tile(job, sample, scratch);
  tile.keeps_bytes = path == Path::two_classes && sizeof(T) == 4;
  for (int64_t v = blocks.first; v < blocks.last; v += tile.n) {
    const int64_t block = blocks.of(v);
    tile.move(v, blocks.tile(v, tile.step), &blocks.faults[block]);
    double* sums = blocks.sums + block * job.rows * (job.slots.count + 1) * job.classes;
    double* weights = blocks.weights + block * job.rows;
    if (path == Path::two_classes) reduce_two_classes(tile, sums, weights);
    else if (path == Path::softmax_dense) reduce_softmax_dense(tile, sums, weights);
    else reduce_general(tile, sums, weights, blocks.tallies);
    if (!tile.binary) tile.find_bad_numbers(&blocks.faults[block]);
  }
}

template <class T>
void map_voxels(const Job& job, int64_t sample, int64_t first, int64_t last, Faults* faults,
                void* scratch) {
  Tile<T> tile(job, sample, scratch);
  const bool few_sums = suits_softmax_map(job);
  for (int64_t v = first; v < last; v += tile.n) {
    tile.move(v, int(last - v < tile.step ? last - v : tile.step), faults);
    if (few_sums) softmax_map(tile);
    else if (job.map == MapKind::label) label_map(tile);
    else if (job.map == MapKind::mask) mask_map(tile);
    else reduce_general<T>(tile, nullptr, nullptr, nullptr);
    if (!tile.binary) tile.find_bad_numbers(faults);
  }
}

template <class T>
void apply_voxels_of(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch) {
  Path path = path_of(job);
  if (path == Path::softmax_labels) {
    apply_softmax_labels<T>(job, sample, first, last, scratch);
  } else if (path == Path::softmax_regions) {
    apply_softmax_regions<T>(job, sample, first, last, scratch);
  } else if (path == Path::class_regions) {
    apply_class_regions<T>(job, sample, first, last, scratch);
  } else {
    Tile<T> tile(job, sample, scratch);
    tile.keeps_bytes = path == Path::two_classes && sizeof(T) == 4;
    const int64_t lead = fastloss::voxels_to_line(job, sample);
    for (int64_t v = first; v < last; v += tile.n) {
      tile.move(v, tile_from(v, last, lead, tile.step), nullptr);
      if (path == Path::two_classes) apply_two_classes(tile);
      else if (path == Path::softmax_dense) apply_softmax_dense(tile);
      else apply_general(tile);
    }
  }
#if defined(__SSE2__)
  if (job.stream) _mm_sfence();
#endif
}

size_t scratch_size(const Job& job) {
  const size_t tile = in_double(job) ? Tile<double>::bytes(job) : Tile<float>::bytes(job);
  const Path path = path_of(job);
  if (path == Path::softmax_labels || path == Path::softmax_regions) return 3 * tile;
  return path == Path::class_regions ? 2 * tile : tile;
}
void reduce(const Job& job, int64_t sample, const Blocks& blocks, void* scratch) {
  (in_double(job) ? reduce_blocks<double> : reduce_blocks<float>)(job, sample, blocks, scratch);
}
void apply(const Job& job, int64_t sample, int64_t first, int64_t last, void* scratch) {
  (in_double(job) ? apply_voxels_of<double> : apply_voxels_of<float>)(job, sample, first, last,
                                                                      scratch);
}
void write_map(const Job& job, int64_t sample, int64_t first, int64_t last, Faults* faults,
               void* scratch) {
  (in_double(job) ? map_voxels<double> : map_voxels<float>)(job, sample, first, last, faults,
                                                            scratch);
}

}  // namespace

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)
#define FASTLOSS_TEXT_(a) #a
#define FASTLOSS_TEXT(a) FASTLOSS_TEXT_(a)

namespace fastloss {
extern const Kernels FASTLOSS_JOIN(kernels_, FASTLOSS_ISA);
const Kernels FASTLOSS_JOIN(kernels_, FASTLOSS_ISA) = {FASTLOSS_TEXT(FASTLOSS_ISA),
                                                       scratch_size,
                                                       reduce,
                                                       apply,
                                                       write_map,
                                                       {plane_of_distances, lines_of_distances}};
}  // namespace fastloss
