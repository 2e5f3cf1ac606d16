// The arguments of one launch of a pass, and how a kernel reads them.
//
// A kernel is compiled for one kind of call: FL_SPECIAL is then defined, and FL_name for every
// field that CONST(name) asks for, so that branches, loops and array sizes are decided by the
// compiler. Without FL_SPECIAL the same source reads all of them at run time: one build that
// computes every kind of call, which tests use.
#pragma once

#ifndef FL_EMULATION
#define FL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FL_DEVICE __device__ __forceinline__
#else
#define FL_DEVICE __device__ inline
#endif

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

// The number of a voxel, of a sample or of a block's end.
#if defined(FL_SPECIAL) && !FL_large
using Index = unsigned;
#else
using Index = long long;
#endif

// Mirrored field by field in fastloss/backends/cuda/call.py.
struct Call {
  // The arrays: (B, C, *spatial) or (B, *spatial), strides in bytes. The spatial axes are merged
  // where all arrays step evenly.
  char* data[kOperands];
  long long sample_stride[kOperands];
  long long channel_stride[kOperands];
  long long stride[kOperands][kMaxAxes];
  long long shape[kMaxAxes];
  long long voxels;  // of a sample
  long long chunk;   // voxels of a block; a multiple of the voxels of a tile
  // Reduce: the sums of every block, (B, blocks, S · C + 2); the last two are the sum of the voxel
  // weights and the number of faults. Then what they add up to: (S, B, C) and (B,).
  void* partial;
  double* sums;
  double* voxel_sums;
  // Apply: the derivative by every sum, times `scale` times what `upstream` points at.
  const double* coefficients;
  long long slot_stride;
  long long row_stride;
  const void* upstream;
  double scale;
  // One number per voxel, (B, voxels): reduce writes m w_y (−log p_y) there; of apply it is the
  // field of the slot `top_k`.
  void* losses;
  const double* loss_weights;  // w, (C,)
  double gamma[kMaxGammas];
  long long ignore;
  int batch;
  int blocks;  // of a sample

  // From here on: what CONST asks for.
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
  int rounds;        // how often they go through memory to see all classes
  int exchanged;     // numbers per voxel that warps tell each other at a time
  int staged;        // channels last: tiles go through shared memory
  int stages;        // tiles that have room there, all but one of them on their way
  int staged_bytes;  // 16, or the size of one logit: of each access when staged
  int interleaved;   // channels last of few classes: whole voxels are loaded at once
  int packed_target, packed_weight;  // `vector` numbers are loaded at once
  int keep_sums;                     // in registers; else summed over the warp at once
  int by_label;      // sums that labels alone decide are added voxel by voxel, not class by class
  int tallies;       // so many of them in shared memory, every thread its own; 0: by the warp
  int kept_slots;    // sums of a class that a thread forms
  int global_sums;   // too many classes for sums in shared memory
  int narrow_sums;   // `partial` is float32: each number is rounded once, when a block has it
  int global_table;  // too many classes for coefficients in shared memory
  int with_losses;
  int least_blocks;  // of a multiprocessor at a time
  int slots, gammas;
  int slot_reference, slot_overlap, slot_predicted, slot_predicted_squared, slot_reference_squared;
  int slot_cross_entropy, slot_cross_entropy_rest, slot_uniform, slot_uniform_rest;
  int slot_top_k;
  int slot_focal[kMaxGammas], slot_focal_rest[kMaxGammas];
};
