// The arguments of one launch of a pass, and how a kernel reads them.
//
// A kernel is compiled for one kind of call: FL_SPECIAL is defined, and FL_name for every field
// that CONST(name) reads, so that branches, loop counts and array sizes are compile-time constants.
// Without FL_SPECIAL the same source reads all of them at run time: one build that serves any call,
// for tests.
#pragma once

#ifndef FL_EMULATION
#define FL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FL_DEVICE __device__ __forceinline__
#else
#define FL_DEVICE __device__ inline
#endif
#define FL_ANYWHERE __device__  // functions and tables of headers that CPUs share

#ifdef FL_SPECIAL
#define CONST(name) (FL_##name)
#else
#define CONST(name) (call.name)
#endif

// Marks a cold branch; -DFL_USUAL compiles it out, so that instruction counts cover the hot path.
#ifdef FL_USUAL
#define FL_UNLIKELY(condition) (false)
#else
#define FL_UNLIKELY(condition) (condition)
#endif

constexpr int kMaxAxes = 16;
constexpr int kMaxGammas = 8;
constexpr int kNamedSlots = 9;
constexpr int kMaxSlots = kNamedSlots + 2 * kMaxGammas;
constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

enum Operand { kLogits, kTarget, kWeight, kOut, kOperands };
enum Type { kF32, kF16, kBF16, kF64, kU8, kI8, kU16, kI16, kU32, kI32, kU64, kI64, kNoType };
enum Activation { kSoftmax, kSigmoid, kNone };
enum Ignore { kNothing, kValue, kClass };
// The paths that compute a tile; fastloss/backends/cuda/call.py says which sums each of them takes.
enum Path { kGeneral, kTwoClasses, kLabels, kDense };

// The index of a voxel in its sample.
#if defined(FL_SPECIAL) && !FL_large
using Index = unsigned;
#else
using Index = long long;
#endif

// Mirrored field by field in fastloss/backends/cuda/call.py.
struct Call {
  // The arrays: (B, C, *spatial) or (B, *spatial), strides in bytes. Spatial axes are merged where
  // the strides of all arrays allow it.
  char* data[kOperands];
  long long sample_stride[kOperands];
  long long channel_stride[kOperands];
  long long stride[kOperands][kMaxAxes];
  long long shape[kMaxAxes];
  long long voxels;  // of a sample
  long long chunk;   // voxels of a block; a multiple of the voxels of a tile
  // Reduce: the sums of every block, (B, blocks, S · C + 2); the last two are the sum of the voxel
  // weights and the number of faults. Then their totals: (S, B, C) and (B,).
  void* partial;
  double* sums;
  double* voxel_sums;
  // Apply: the derivative by every sum, to be multiplied by `scale` and by *upstream.
  const double* coefficients;
  long long slot_stride;
  long long row_stride;
  const void* upstream;
  double scale;
  // One number per voxel, (B, voxels): reduce writes m w_y (−log p_y) there; apply reads the field
  // of the slot `top_k` from it.
  void* losses;
  const double* loss_weights;  // w, (C,)
  double gamma[kMaxGammas];
  long long ignore;
  int batch;
  int blocks;  // of a sample

  // From here on: the fields that CONST reads.
  int upstream_type;  // kNoType, kF32 or kF64
  int logits_type, target_type, weight_type;
  int path;
  int activation, dense, ignore_kind;
  int classes;
  int axes;
  int large;         // voxel numbers need 64 bits
  int vector;        // consecutive voxels of a thread, loaded at once
  int per_thread;    // classes of a thread at a time
  int warps;         // that share the classes of a voxel
  int groups;        // of such warps in a block
  int rounds;        // passes over memory until all classes are seen
  int exchanged;     // numbers per voxel that warps exchange at a time
  int staged;        // channels last: tiles are staged in shared memory
  int stages;        // tile buffers there; all but one are being prefetched
  int staged_bytes;  // the width of a staged access: 16, or the size of one logit
  int interleaved;   // channels last of few classes: whole voxels are loaded at once
  int packed_target, packed_weight;  // `vector` numbers are loaded at once
  int keep_sums;                     // in registers; else summed over the warp at once
  int by_label;                      // sums of weight g or g² are added per voxel, not per class
  int tallies;       // how many of these have accumulators per thread in shared memory; 0: per warp
  int kept_slots;    // sums per class in a thread's registers
  int global_sums;   // too many classes for sums in shared memory
  int narrow_sums;   // `partial` is float32: each block's float64 sum is rounded once
  int global_table;  // too many classes for coefficients in shared memory
  int with_losses;
  int least_blocks;  // resident per multiprocessor
  int slots, gammas;
  int slot_reference, slot_overlap, slot_predicted, slot_predicted_squared, slot_reference_squared;
  int slot_cross_entropy, slot_cross_entropy_rest, slot_uniform, slot_uniform_rest;
  int slot_top_k;
  int slot_focal[kMaxGammas], slot_focal_rest[kMaxGammas];
};
