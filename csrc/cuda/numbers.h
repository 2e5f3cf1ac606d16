// Storage types, their conversions, and mathematical functions.
#pragma once

#include "call.h"

// float16 and bfloat16 in memory.
struct Half {
  unsigned short bits;
};
struct BFloat {
  unsigned short bits;
};

// The type in which a storage type is computed.
template <class In>
struct ComputedIn {
  using type = float;
};
template <>
struct ComputedIn<double> {
  using type = double;
};

FL_DEVICE float as_number(float x) { return x; }
FL_DEVICE double as_number(double x) { return x; }
FL_DEVICE float as_number(BFloat x) { return __uint_as_float(unsigned(x.bits) << 16); }

FL_DEVICE float as_number(Half x) {
#ifdef FL_EMULATION
  _Float16 h;
  __builtin_memcpy(&h, &x, sizeof h);
  return float(h);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#endif
}

template <class In>
FL_DEVICE In from_number(typename ComputedIn<In>::type x) {
  return x;
}
template <>
FL_DEVICE Half from_number<Half>(float x) {
  Half h;
#ifdef FL_EMULATION
  _Float16 f = static_cast<_Float16>(x);
  __builtin_memcpy(&h, &f, sizeof h);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
#endif
  return h;
}
template <>
FL_DEVICE BFloat from_number<BFloat>(float x) {
  BFloat b;
#if defined(FL_EMULATION) || __CUDA_ARCH__ < 800
  unsigned bits = __float_as_uint(x);
  // Rounds to nearest even; NaN stays NaN.
  bits = x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u;
  b.bits = static_cast<unsigned short>(bits);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(x));
#endif
  return b;
}

// The storage type of a Type.
template <int type>
struct InMemory;
template <>
struct InMemory<kF32> {
  using type = float;
};
template <>
struct InMemory<kF16> {
  using type = Half;
};
template <>
struct InMemory<kBF16> {
  using type = BFloat;
};
template <>
struct InMemory<kF64> {
  using type = double;
};

// V numbers that are loaded or stored in one access.
template <class In, int V>
struct __align__(sizeof(In) * V > 16 ? 16 : sizeof(In) * V) Pack {
  In item[V];
};

template <class In, int V>
FL_DEVICE Pack<In, V> load_pack(const char* from) {
  return *reinterpret_cast<const Pack<In, V>*>(from);
}
template <class In>
FL_DEVICE In load_one(const char* from) {
  return *reinterpret_cast<const In*>(from);
}

// Asynchronous copies of 16 bytes into shared memory, in groups: cp.async of the PTX manual. GPUs
// before sm_80 copy synchronously.
#ifdef FL_EMULATION
FL_DEVICE void copy_later(char* to, const char* from) { fl_emulation::copy_later(to, from, 16); }
FL_DEVICE void commit_copies() { fl_emulation::commit_copies(); }
// Waits until all groups but the `latest` most recent ones have arrived.
FL_DEVICE void wait_for_copies(int latest) { fl_emulation::wait_for_copies(latest); }
#elif __CUDA_ARCH__ >= 800
FL_DEVICE void copy_later(char* to, const char* from) {
  unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
FL_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
FL_DEVICE void wait_for_copies(int latest) {
  if (latest == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  else if (latest == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  else asm volatile("cp.async.wait_all;" ::: "memory");
}
#else
FL_DEVICE void copy_later(char* to, const char* from) {
  *reinterpret_cast<Pack<unsigned, 4>*>(to) = load_pack<unsigned, 4>(from);
}
FL_DEVICE void commit_copies() {}
FL_DEVICE void wait_for_copies(int) {}
#endif

// Functions that are single instructions of a GPU.
#ifdef FL_EMULATION
#define FL_INSTRUCTION(name, instruction, value) \
  FL_DEVICE float name(float x) { return value; }
#else
#define FL_INSTRUCTION(name, instruction, value)    \
  FL_DEVICE float name(float x) {                   \
    float y;                                        \
    asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                       \
  }
#endif
// 2^x and 1 / x, to two units in the last place.
FL_INSTRUCTION(power_of_two, "ex2.approx.ftz.f32", exp2f(x))
FL_INSTRUCTION(inverse_of, "rcp.approx.ftz.f32", 1.0f / x)
// log2 x, to 2^-22 absolutely where x is about 1, else relatively.
FL_INSTRUCTION(log2_of, "lg2.approx.ftz.f32", log2f(x))
FL_DEVICE double power_of_two(double x) { return exp2(x); }
FL_DEVICE double inverse_of(double x) { return 1.0 / x; }
FL_DEVICE double log2_of(double x) { return log2(x); }

template <class T>
FL_DEVICE T log2_of_e() {
  return T(1.4426950408889634);
}
template <class T>
FL_DEVICE T log_of_2() {
  return T(0.6931471805599453);
}

// e^x = 2^(x log2 e). Rounding the product adds a relative error of about |x| 2^−24, which grows as
// the result for x < 0 shrinks.
template <class T>
FL_DEVICE T exponential(T x) {
  return power_of_two(x * log2_of_e<T>());
}
FL_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FL_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// a − b, never contracted with a product into an FMA: for equal numbers it is 0.
#ifdef FL_EMULATION
FL_DEVICE float difference(float a, float b) { return a - b; }
FL_DEVICE double difference(double a, double b) { return a - b; }
#else
FL_DEVICE float difference(float a, float b) { return __fsub_rn(a, b); }
FL_DEVICE double difference(double a, double b) { return __dsub_rn(a, b); }
#endif
// The larger, the smaller of two; of a number and NaN, the number.
FL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FL_DEVICE double larger(double a, double b) { return fmax(a, b); }
FL_DEVICE float smaller(float a, float b) { return fminf(a, b); }
FL_DEVICE double smaller(double a, double b) { return fmin(a, b); }
FL_DEVICE float size_of(float x) { return fabsf(x); }
FL_DEVICE double size_of(double x) { return fabs(x); }
FL_DEVICE float logarithm(float x) { return logf(x); }
FL_DEVICE double logarithm(double x) { return log(x); }
// log(1 + x) for x in [0, 1], cheaper than log1p: x + x² · (minimax polynomial), relative error
// 3e-8.
FL_DEVICE float log_one_plus_small(float x) {
  float sum = 0.0053648208267986774f;
  sum = fmaf(sum, x, -0.030065778642892838f);
  sum = fmaf(sum, x, 0.0792045146226883f);
  sum = fmaf(sum, x, -0.13753800094127655f);
  sum = fmaf(sum, x, 0.191536545753479f);
  sum = fmaf(sum, x, -0.24857163429260254f);
  sum = fmaf(sum, x, 0.3332132399082184f);
  sum = fmaf(sum, x, -0.49999648332595825f);
  return fmaf(x * x, sum, x);
}
FL_DEVICE double log_one_plus_small(double x) { return log1p(x); }
// log(1 + x) for x ≥ 0. Above 1, 1 + x loses at most an ulp and log2(1 + x) ln 2 is exact enough.
FL_DEVICE float log_one_plus(float x) {
  return x <= 1.0f ? log_one_plus_small(x) : log2_of(1.0f + x) * log_of_2<float>();
}
FL_DEVICE double log_one_plus(double x) { return log1p(x); }
FL_DEVICE float general_power(float x, float y) { return powf(x, y); }
FL_DEVICE double general_power(double x, double y) { return pow(x, y); }

// x^y; focal exponents are mostly small integers.
template <class T>
FL_DEVICE T power(T x, T y) {
  if (y == T(0)) return T(1);
  if (y == T(1)) return x;
  if (y == T(2)) return x * x;
  if (y == T(3)) return x * x * x;
  return general_power(x, y);
}

// The same number, opaque to the compiler. Otherwise it would keep the results of comparisons with
// the original in registers, which costs more than comparing again.
FL_DEVICE int forget(const Call& call, int x) { return x + (call.batch >> 31); }

template <class T>
FL_DEVICE T infinity() {
  return T(__uint_as_float(0x7f800000u));
}

template <class T>
FL_DEVICE bool is_infinite(T x) {
  return x == infinity<T>() || x == -infinity<T>();
}

// a b, but 0 for a = 0 and infinite b: the limit of x log x.
template <class T>
FL_DEVICE T product(T a, T b) {
  return a == T(0) && b == b ? T(0) : a * b;
}

// The M of voxel.h, with plain products.
struct Plain {
  template <class T>
  static FL_DEVICE T splat(T x) {
    return x;
  }
  template <class T>
  static FL_DEVICE T power(T x, T y) {
    return ::power(x, y);
  }
  template <class T>
  static FL_DEVICE T product(T a, T b) {
    return a * b;
  }
  template <class T>
  static FL_DEVICE T unless(T zero, T x) {
    return zero == T(0) ? T(0) : x;
  }
  template <class T>
  static FL_DEVICE T one_less_exponential(T x) {
    return sizeof(T) == 4 ? T(-expm1f(float(-x))) : T(-expm1(double(-x)));
  }
  template <class T>
  static FL_DEVICE T power_of_any(T x, T y) {
    if (is_infinite(x)) return y > T(0) ? x : T(y == T(0));
    return ::power(x, y);
  }
  template <class T>
  static FL_DEVICE T logarithm(T x) {
    return ::logarithm(x);
  }
  template <class T>
  static FL_DEVICE T above_half(T p, T a, T b) {
    return p > T(0.5) ? a : b;
  }
  template <class T>
  static FL_DEVICE T absolute(T x) {
    return x < T(0) ? -x : x;
  }
  template <class T>
  static FL_DEVICE T sign(T x) {
    return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;
  }
};
// The same, but 0 · ∞ = 0.
struct Careful : Plain {
  template <class T>
  static FL_DEVICE T product(T a, T b) {
    return (a == T(0) && b == b) || (b == T(0) && a == a) ? T(0) : a * b;
  }
};

// The sum over the lanes of a warp, returned to every lane.
template <class T>
FL_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// A label of a floating-point label map.
FL_DEVICE double floating_at(const char* from, int type) {
  switch (type) {
    case kF32:
      return load_one<float>(from);
    case kF16:
      return as_number(load_one<Half>(from));
    case kBF16:
      return as_number(load_one<BFloat>(from));
    default:
      return load_one<double>(from);
  }
}
