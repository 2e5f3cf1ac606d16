// The extensions of CUDA C++, so that kernels compile with a C++ compiler and run on the CPU.
//
// It checks the results of kernels and the synchronisation of their threads, not speed. Unsupported
// functions do not compile. runtime.cpp runs the threads.
#pragma once

#define FL_EMULATION 1

// All headers come before the macros below, some of whose names occur in headers.
#include <math.h>    // the functions in all their overloads, in the global namespace
#include <stdlib.h>  // likewise abs
#include <cfloat>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef FL_EMULATION_THREADS
#define FL_EMULATION_LOCAL thread_local
#else
#define FL_EMULATION_LOCAL
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another, and so share this memory. "used": the runtime writes to it between
// blocks, unseen by the compiler.
#define __shared__ static __attribute__((used))
#define FL_DYNAMIC_SHARED(name) unsigned char* name = ::fl_emulation::dynamic_shared

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fl_emulation {

using Bits = unsigned long long;

struct ThreadIndex {
  uint3 index;
};
extern FL_EMULATION_LOCAL ThreadIndex* self;  // the running thread
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char* dynamic_shared;

struct Kernel {
  const char* name;
  void (*call)(const void* argument);
  std::size_t argument_bytes;
};

enum class Operation : unsigned char {
  none,
  syncthreads,
  syncthreads_or,
  syncthreads_and,
  syncthreads_count,
  syncwarp,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  any,
  all,
  match_any,
  activemask,
};

// Waits until all participating threads have arrived. Returns this thread's result of their values.
Bits meet(Operation operation, unsigned mask, Bits brought, int source, const char* file, int line);
// The same with the source lane of a shuffle.
Bits shuffle(Operation operation, unsigned mask, Bits brought, int argument, int width,
             const char* file, int line);
void thread_fence();

[[noreturn]] void fail(const char* what, const char* file, int line);

// The asynchronous copies of the running thread. They arrive as late as allowed: when it waits.
struct Copies {
  struct One {
    char* to;
    const char* from;
    int bytes;
    int group;
  };
  std::vector<One> queued;  // in order
  int groups = 0;           // committed
};
Copies& copies();

// Copies 4, 8 or 16 bytes; both addresses must be multiples of the size.
inline void copy_later(char* to, const char* from, int bytes, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) %
      std::uintptr_t(bytes))
    fail("an asynchronous copy that is not aligned", file, line);
  std::memset(to, 0xff, std::size_t(bytes));  // poisoned, as the copy may also arrive at once
  copies().queued.push_back({to, from, bytes, copies().groups});
}
inline void commit_copies() { ++copies().groups; }
// Waits until all groups but the `latest` most recent ones have arrived.
inline void wait_for_copies(int latest) {
  Copies& own = copies();
  std::size_t done = 0;
  for (; done < own.queued.size(); ++done) {
    const Copies::One& one = own.queued[done];
    if (one.group >= own.groups - latest) break;
    std::memcpy(one.to, one.from, std::size_t(one.bytes));
  }
  own.queued.erase(own.queued.begin(), own.queued.begin() + std::ptrdiff_t(done));
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline Bits to_bits(T value) {
  Bits bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
inline T from_bits(Bits bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fl_emulation

#define threadIdx (static_cast<const uint3&>(::fl_emulation::self->index))
#define blockIdx (static_cast<const uint3&>(::fl_emulation::block_index))
#define blockDim (static_cast<const dim3&>(::fl_emulation::block_size))
#define gridDim (static_cast<const dim3&>(::fl_emulation::grid_size))
constexpr int warpSize = 32;

// Every synchronising function records its call site, for errors.
#define FL_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Barriers of a block, and of the lanes of a warp.

inline void __syncthreads(FL_EMULATION_SITE) {
  ::fl_emulation::meet(::fl_emulation::Operation::syncthreads, ~0u, 0, 0, file, line);
}
inline int __syncthreads_or(int predicate, FL_EMULATION_SITE) {
  return int(::fl_emulation::meet(::fl_emulation::Operation::syncthreads_or, ~0u, predicate != 0, 0,
                                  file, line));
}
inline int __syncthreads_and(int predicate, FL_EMULATION_SITE) {
  return int(::fl_emulation::meet(::fl_emulation::Operation::syncthreads_and, ~0u, predicate != 0,
                                  0, file, line));
}
inline int __syncthreads_count(int predicate, FL_EMULATION_SITE) {
  return int(::fl_emulation::meet(::fl_emulation::Operation::syncthreads_count, ~0u, predicate != 0,
                                  0, file, line));
}
inline void __syncwarp(unsigned mask = ~0u, FL_EMULATION_SITE) {
  ::fl_emulation::meet(::fl_emulation::Operation::syncwarp, mask, 0, 0, file, line);
}

// Shuffles. A lane that reads from a lane that does not participate gets all bits set: NaN, or −1.

#define FL_EMULATION_SHUFFLE(T)                                                                    \
  inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, FL_EMULATION_SITE) {      \
    using namespace ::fl_emulation;                                                                \
    return from_bits<T>(shuffle(Operation::shfl, mask, to_bits(value), lane, width, file, line));  \
  }                                                                                                \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32,                   \
                          FL_EMULATION_SITE) {                                                     \
    using namespace ::fl_emulation;                                                                \
    return from_bits<T>(                                                                           \
        shuffle(Operation::shfl_up, mask, to_bits(value), int(step), width, file, line));          \
  }                                                                                                \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32,                 \
                            FL_EMULATION_SITE) {                                                   \
    using namespace ::fl_emulation;                                                                \
    return from_bits<T>(                                                                           \
        shuffle(Operation::shfl_down, mask, to_bits(value), int(step), width, file, line));        \
  }                                                                                                \
  inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, FL_EMULATION_SITE) { \
    using namespace ::fl_emulation;                                                                \
    return from_bits<T>(                                                                           \
        shuffle(Operation::shfl_xor, mask, to_bits(value), lanes, width, file, line));             \
  }
FL_EMULATION_SHUFFLE(int)
FL_EMULATION_SHUFFLE(unsigned)
FL_EMULATION_SHUFFLE(long)
FL_EMULATION_SHUFFLE(unsigned long)
FL_EMULATION_SHUFFLE(long long)
FL_EMULATION_SHUFFLE(unsigned long long)
FL_EMULATION_SHUFFLE(float)
FL_EMULATION_SHUFFLE(double)
#undef FL_EMULATION_SHUFFLE

// Votes.

inline unsigned __ballot_sync(unsigned mask, int predicate, FL_EMULATION_SITE) {
  return unsigned(
      ::fl_emulation::meet(::fl_emulation::Operation::ballot, mask, predicate != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int predicate, FL_EMULATION_SITE) {
  return int(
      ::fl_emulation::meet(::fl_emulation::Operation::any, mask, predicate != 0, 0, file, line));
}
inline int __all_sync(unsigned mask, int predicate, FL_EMULATION_SITE) {
  return int(
      ::fl_emulation::meet(::fl_emulation::Operation::all, mask, predicate != 0, 0, file, line));
}
#define FL_EMULATION_MATCH(T)                                                         \
  inline unsigned __match_any_sync(unsigned mask, T value, FL_EMULATION_SITE) {       \
    using namespace ::fl_emulation;                                                   \
    return unsigned(meet(Operation::match_any, mask, to_bits(value), 0, file, line)); \
  }
FL_EMULATION_MATCH(int)
FL_EMULATION_MATCH(unsigned)
FL_EMULATION_MATCH(long)
FL_EMULATION_MATCH(unsigned long)
FL_EMULATION_MATCH(long long)
FL_EMULATION_MATCH(unsigned long long)
FL_EMULATION_MATCH(float)
FL_EMULATION_MATCH(double)
#undef FL_EMULATION_MATCH
// A GPU may return any lanes that happen to run together. Here these are all lanes that reach this
// line before they wait for something else.
inline unsigned __activemask(FL_EMULATION_SITE) {
  return unsigned(::fl_emulation::meet(::fl_emulation::Operation::activemask, 0, 0, 0, file, line));
}

// Fences and exits.

inline void __threadfence() { ::fl_emulation::thread_fence(); }
inline void __threadfence_block() { ::fl_emulation::thread_fence(); }
inline void __trap(FL_EMULATION_SITE) { ::fl_emulation::fail("__trap", file, line); }
#undef assert
#define assert(condition) \
  ((condition) ? (void)0  \
               : ::fl_emulation::fail("assertion failed: " #condition, __FILE__, __LINE__))
#undef __builtin_assume
#define __builtin_assume(condition) \
  ((condition)                      \
       ? (void)0                    \
       : ::fl_emulation::fail("assumption does not hold: " #condition, __FILE__, __LINE__))

// Atomics, of integers only: sums of floating-point numbers would depend on the order of threads.

#define FL_EMULATION_ATOMICS(T)                                                                    \
  inline T atomicAdd(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }   \
  inline T atomicOr(T* at, T value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }     \
  inline T atomicAnd(T* at, T value) { return __atomic_fetch_and(at, value, __ATOMIC_RELAXED); }   \
  inline T atomicExch(T* at, T value) { return __atomic_exchange_n(at, value, __ATOMIC_RELAXED); } \
  inline T atomicCAS(T* at, T expected, T value) {                                                 \
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);  \
    return expected;                                                                               \
  }                                                                                                \
  inline T atomicMax(T* at, T value) {                                                             \
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                 \
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED,   \
                                                       __ATOMIC_RELAXED)) {                        \
    }                                                                                              \
    return old;                                                                                    \
  }                                                                                                \
  inline T atomicMin(T* at, T value) {                                                             \
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                 \
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED,   \
                                                       __ATOMIC_RELAXED)) {                        \
    }                                                                                              \
    return old;                                                                                    \
  }
FL_EMULATION_ATOMICS(int)
FL_EMULATION_ATOMICS(unsigned)
FL_EMULATION_ATOMICS(unsigned long long)
#undef FL_EMULATION_ATOMICS

// Loads and stores with a hint.

template <class T>
inline T __ldg(const T* from) {
  return *from;
}
template <class T>
inline T __ldcs(const T* from) {
  return *from;
}
template <class T>
inline T __ldcg(const T* from) {
  return *from;
}
template <class T>
inline void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
inline void __stcg(T* to, T value) {
  *to = value;
}

// Bits.

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __float_as_uint(float x) { return ::fl_emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return ::fl_emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return ::fl_emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return ::fl_emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return ::fl_emulation::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return ::fl_emulation::bit_cast<double>(x); }

// Arithmetic beyond <math.h>.

inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrtf(float x) { return rsqrt(x); }
#define FL_EMULATION_LEAST(T)                      \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
FL_EMULATION_LEAST(int)
FL_EMULATION_LEAST(unsigned)
FL_EMULATION_LEAST(long)
FL_EMULATION_LEAST(unsigned long)
FL_EMULATION_LEAST(long long)
FL_EMULATION_LEAST(unsigned long long)
#undef FL_EMULATION_LEAST
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return ::fmin(a, b); }
inline double max(double a, double b) { return ::fmax(a, b); }
// On a GPU these fast functions are less accurate.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __powf(x, y) powf(x, y)
#define __fdividef(x, y) (float(x) / float(y))
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
