// Vectors of float or double, as wide as the instruction set allows, with exp and log.
//
// Everything here is in an unnamed namespace: the file is compiled once per instruction set into
// one library, and the linker could keep a copy of a shared function that the processor cannot run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Types;
template <>
struct Types<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IVec __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UVec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Types<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IVec __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t UVec __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Types<T>::Vec;
template <class T>
using IVec = typename Types<T>::IVec;
template <class T>
constexpr int lanes = kVectorBytes / sizeof(T);

#define FL_INLINE inline __attribute__((always_inline))
#define FL_DEVICE FL_INLINE  // in voxel.h

template <class T>
FL_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}
template <class T>
FL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FL_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
FL_INLINE IVec<T> bits(Vec<T> v) {
  return (IVec<T>)v;
}
template <class T>
FL_INLINE Vec<T> from_bits(IVec<T> v) {
  return (Vec<T>)v;
}
// a + b, which may overflow: e^x of any x is computed, whether it is used or not.
template <class T>
FL_INLINE IVec<T> wrapping_sum(IVec<T> a, IVec<T> b) {
  using U = typename Types<T>::UVec;
  return (IVec<T>)((U)a + (U)b);
}
// Keeps a loaded value in a register. Otherwise GCC repeats the load as a memory operand wherever
// it can, and the loop is bound by loads. Also blocks FMA contraction across it.
template <class V>
FL_INLINE V once(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}
// v where the mask is set, else 0.
template <class T>
FL_INLINE Vec<T> keep(IVec<T> mask, Vec<T> v) {
  return from_bits<T>(mask & bits<T>(v));
}
template <class T>
FL_INLINE Vec<T> drop(IVec<T> mask, Vec<T> v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC would turn the plain form into a blend, which fewer ports execute.
  return (Vec<T>)_mm256_andnot_si256((__m256i)mask, (__m256i)v);
#else
  return from_bits<T>(~mask & bits<T>(v));
#endif
}
// The nonzero one of a and b, of which one is 0.
template <class T>
FL_INLINE Vec<T> either(Vec<T> a, Vec<T> b) {
  return from_bits<T>(bits<T>(a) | bits<T>(b));
}
template <class T>
FL_INLINE Vec<T> select(IVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}
// The larger; `b` where either is NaN.
FL_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
FL_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

// The smaller; `b` where either is NaN.
FL_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
FL_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) { return a < b ? a : b; }

// Whether tables of up to two vectors are looked up in registers.
template <class T>
constexpr bool kPicks = false;
#if defined(__AVX2__)
template <>
constexpr bool kPicks<float> = true;
// from[index], for a table of one vector.
FL_INLINE Vec<float> pick(Vec<float> from, IVec<float> index) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)from);
#else
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)from, (__m256i)index);
#endif
}
FL_INLINE Vec<float> pick(Vec<float> low, Vec<float> high, IVec<float> index) {
  return select<float>(index < lanes<float>, pick(low, index), pick(high, index));
}
#endif

template <class T>
FL_INLINE Vec<T> absolute(Vec<T> v) {
  return drop<T>(bits<T>(splat<T>(T(-0.0))), v);
}
template <class T>
FL_INLINE bool any(IVec<T> mask) {
#if defined(__AVX512F__)
  return _mm512_movepi8_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  int64_t words[kVectorBytes / 8];
  std::memcpy(words, &mask, sizeof words);
  int64_t all = 0;
  for (int64_t word : words) all |= word;
  return all != 0;
#endif
}
// a b, but 0 for a = 0 and infinite b: the limit of x log x.
template <class T>
FL_INLINE Vec<T> product(Vec<T> a, Vec<T> b) {
  IVec<T> zero = (a == T(0)) & (b == b);
  return drop<T>(zero, a * b);
}

// The same, also for b = 0 and infinite a.
template <class T>
FL_INLINE Vec<T> product_of_both(Vec<T> a, Vec<T> b) {
  return drop<T>(((a == T(0)) & (b == b)) | ((b == T(0)) & (a == a)), a * b);
}

// Two vectors.
template <class T>
struct Pair {
  Vec<T> first, second;
};
// Deinterleaves two vectors of pairs: the first number of every pair, and the second.
FL_INLINE Pair<float> unzip(Vec<float> u, Vec<float> v) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {(Vec<float>)_mm512_permutex2var_ps((__m512)u, even, (__m512)v),
          (Vec<float>)_mm512_permutex2var_ps((__m512)u, odd, (__m512)v)};
#elif defined(__AVX2__)
  __m256 even = _mm256_shuffle_ps((__m256)u, (__m256)v, 0x88);
  __m256 odd = _mm256_shuffle_ps((__m256)u, (__m256)v, 0xdd);
  return {(Vec<float>)_mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xd8),
          (Vec<float>)_mm256_permute4x64_epi64(_mm256_castps_si256(odd), 0xd8)};
#else
  constexpr int L = lanes<float>;
  Pair<float> result;
  for (int i = 0; i < L; ++i) {
    result.first[i] = 2 * i < L ? u[2 * i] : v[2 * i - L];
    result.second[i] = 2 * i < L ? u[2 * i + 1] : v[2 * i + 1 - L];
  }
  return result;
#endif
}
// Interleaves two vectors, the inverse of `unzip`.
FL_INLINE Pair<float> zip(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {(Vec<float>)_mm512_permutex2var_ps((__m512)a, low, (__m512)b),
          (Vec<float>)_mm512_permutex2var_ps((__m512)a, high, (__m512)b)};
#elif defined(__AVX2__)
  __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  __m256 high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return {(Vec<float>)_mm256_permute2f128_ps(low, high, 0x20),
          (Vec<float>)_mm256_permute2f128_ps(low, high, 0x31)};
#else
  constexpr int L = lanes<float>;
  Pair<float> result;
  for (int i = 0; i < L; ++i) {
    result.first[i] = i % 2 ? b[i / 2] : a[i / 2];
    result.second[i] = i % 2 ? b[(i + L) / 2] : a[(i + L) / 2];
  }
  return result;
#endif
}
// Σ of the lanes, added pairwise.
template <class T>
FL_INLINE double total(Vec<T> v) {
  T parts[lanes<T>];
  store<T>(parts, v);
#pragma GCC unroll 4
  for (int width = lanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return double(parts[0]);
}
#if defined(__AVX2__)
template <>
FL_INLINE double total<float>(Vec<float> v) {
#if defined(__AVX512F__)
  __m256 high = _mm512_extractf32x8_ps((__m512)v, 1);
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), high);
#else
  __m256 eight = (__m256)v;
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return double(_mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two))));
}
#endif
// Prefetches the cache line at p, at any address: with AVX2 into L2, as L1 accepts so few misses at
// once that prefetching into it halves the bandwidth (measured on Zen 4); with AVX-512 into L1, as
// L2 is too late (Zen 5).
FL_INLINE void prefetch(const void* p) {
#if defined(__AVX512F__)
  __builtin_prefetch(p, 0, 3);
#else
  __builtin_prefetch(p, 0, 2);
#endif
}
// Prefetches into L2, for data that is needed later.
FL_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
// Prefetches the lines of kBytes from p on; `kFar`: they are needed later.
template <int kBytes, bool kFar = false>
FL_INLINE void prefetch_lines(const void* p) {
#pragma GCC unroll 4
  for (int i = 0; i < kBytes; i += 64) {
    if (kFar) prefetch_far((const char*)p + i);
    else prefetch((const char*)p + i);
  }
}
// Stores past the caches; `p` must be aligned to the vector.
template <class T>
FL_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store<T>(p, v);
#endif
}

// The constants of exp and log for a type.
template <class T>
struct Numbers;
template <>
struct Numbers<float> {
  static constexpr float round = 12582912.f;  // 1.5 · 2^23: adding it leaves the rounded integer
  static constexpr int32_t round_bits = 0x4B400000;
  static constexpr int mantissa = 23;
  static constexpr int32_t mantissa_mask = 0x007fffff;
  static constexpr int32_t sqrt_half_bits = 0x3f3504f3;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float smallest_exponent = -87.33f;  // below, exp is subnormal
  static constexpr float smallest = 1.17549435e-38f, rescale = 33554432.f, rescale_log = 25;
};
template <>
struct Numbers<double> {
  static constexpr double round = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr int64_t round_bits = 0x4338000000000000;
  static constexpr int mantissa = 52;
  static constexpr int64_t mantissa_mask = 0x000fffffffffffff;
  static constexpr int64_t sqrt_half_bits = 0x3fe6a09e667f3bcd;
  static constexpr double ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double smallest_exponent = -708.3;
  static constexpr double smallest = 2.2250738585072014e-308, rescale = 18014398509481984.0,
                          rescale_log = 54;
};

// e^r for |r| ≤ ln2 / 2; 1 for r = 0.
// Polynomials in float are evaluated in pairs, as in Estrin's scheme: the latency of the dependency
// chain bounds the speed, not the number of operations.
FL_INLINE Vec<float> exp_core(Vec<float> r) {  // minimax, relative error 9e-8
  Vec<float> r2 = r * r;
  Vec<float> high = r * 0.008290229365229607f + 0.041898392140865326f;
  Vec<float> middle = r * 0.16667640209197998f + 0.49999144673347473f;
  Vec<float> low = r * 0.9999997019767761f + 1.f;
  return (high * r2 + middle) * r2 + low;
}
FL_INLINE Vec<double> exp_core(Vec<double> r) {  // Taylor
  double factorial = 6227020800.0;               // 13!
  Vec<double> q = splat<double>(1 / factorial);
#pragma GCC unroll 16
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    q = q * r + 1 / factorial;
  }
  return q;
}

#if defined(__AVX2__) && defined(__FMA__)
// e^x and log(1+x) with tables in one or two registers: shorter polynomials then suffice, which
// relieves the two multiply ports.
#define FL_BY_TABLE

// e^x = 2^q 2^(j/n) e^r with j < n, |r| ≤ ln2 / 2n, where n is 8, or 32 in two registers:
//   x n / ln 2 rounds to n q + j, which adding 1.5 · 2^23 leaves in the low bits of `parts`;
//   parts << (23 − log2 n) puts q into the exponent field and j right below it;
//   adding powers[j], the bits of 2^(j/n) less those of j there, gives 2^q 2^(j/n).
// The constants stay in registers: GCC would reload them for every use, and loads bound the loops.
struct ExponentialByTable {
#if defined(__AVX512F__)
  static constexpr int kBits = 5;
  // The bits of 2^(j/32) less j << 18, which the shift below adds.
  IVec<float> powers = {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a,
                        0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043,
                        0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6};
  IVec<float> more = {0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be,
                      0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
                      0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  Vec<float> second = once(splat<float>(0.4999999701976776f));  // error 5e-8
  Vec<float> first = once(splat<float>(1.0000146627426147f));
#else
  static constexpr int kBits = 3;
  IVec<float> powers = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                        0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  Vec<float> third = once(splat<float>(0.16664297878742218f));  // error 3e-8
  Vec<float> second = once(splat<float>(0.5000647902488708f));
  Vec<float> first = once(splat<float>(1.f));
#endif
  Vec<float> scale = once(splat<float>((1 << kBits) * 1.4426950408889634f));
  Vec<float> round = once(splat<float>(Numbers<float>::round));
  Vec<float> unit = once(splat<float>(0.6931471805599453f / (1 << kBits)));

  FL_INLINE Vec<float> operator()(Vec<float> x) const {
    Vec<float> shifted = x * scale + round;
    Vec<float> r = x - (shifted - round) * unit;
    IVec<float> parts = bits<float>(shifted);  // n q + j
#if defined(__AVX512F__)
    Vec<float> found =
        (Vec<float>)_mm512_permutex2var_ps((__m512)powers, (__m512i)parts, (__m512)more);
    Vec<float> polynomial = r * second + first;
#else
    Vec<float> found = pick(from_bits<float>(powers), parts);
    Vec<float> polynomial = (r * third + second) * r + first;
#endif
    Vec<float> power =
        from_bits<float>(wrapping_sum<float>(bits<float>(found), parts << (23 - kBits)));
    return (power * r) * polynomial + power;
  }
};
#endif

// e^x = 2^n e^r with n = x / ln 2, rounded, and r = x − n ln 2, |r| ≤ ln2 / 2. Adding N::round
// leaves n in the low bits of `shifted`, and shifting it into the exponent field gives 2^n. In
// double, and in float without FMA, ln 2 is split into two parts so that n ln2_high is exact. About
// 1 ulp, if x, the result and 2^n are in the range of normal numbers.
template <class T>
struct NearExponential {
  FL_INLINE Vec<T> operator()(Vec<T> x) const {
    using N = Numbers<T>;
    Vec<T> shifted = x * T(1.4426950408889634) + N::round;
    Vec<T> n = shifted - N::round;
#if defined(__FMA__)
    Vec<T> r;
    if constexpr (sizeof(T) == 4)
      r = x - n * T(0.6931471805599453);  // rounded once; the float nearest ln 2 is 2e-9 from it
    else r = (x - n * N::ln2_high) - n * N::ln2_low;
#else
    Vec<T> r = (x - n * N::ln2_high) - n * N::ln2_low;
#endif
    // 2^n is a factor: adding n to the exponent would turn some NaN into numbers.
    const IVec<T> one = bits<T>(splat<T>(1));
    return exp_core(r) * from_bits<T>(wrapping_sum<T>(bits<T>(shifted) << N::mantissa, one));
  }
};
#if defined(FL_BY_TABLE)
template <>
struct NearExponential<float> : ExponentialByTable {};
#endif

// e^x for x below the overflow; 0 where the result would be subnormal.
template <class T>
FL_INLINE Vec<T> exponential(Vec<T> x) {
  return drop<T>(x < Numbers<T>::smallest_exponent, NearExponential<T>()(x));
}

// log(1+f) for 1+f in [√½, √2].
FL_INLINE Vec<float> log1p_core(Vec<float> f) {  // minimax, relative error 3e-8
  Vec<float> f2 = f * f, f4 = f2 * f2;
  Vec<float> a = f * 0.33333951234817505f - 0.49999991059303284f;
  Vec<float> b = f * 0.19962072372436523f - 0.25001755356788635f;
  Vec<float> c = f * 0.14917974174022675f - 0.16570508480072021f;
  Vec<float> d = f * 0.08734844624996185f - 0.14307525753974915f;
  return ((d * f2 + c) * f4 + (b * f2 + a)) * f2 + f;
}
FL_INLINE Vec<double> log1p_core(Vec<double> f) {
  Vec<double> z = f / (f + 2.0), w = z * z;  // 2 artanh z = 2z (1 + z²/3 + z⁴/5 + …)
  Vec<double> q = splat<double>(1.0 / 23);
#pragma GCC unroll 16
  for (int k = 10; k >= 0; --k) q = q * w + 1.0 / (2 * k + 1);
  return 2.0 * z * q;
}

// log s for a normal s > 0: s = 2^k m with m in [√½, √2), so log s = k ln 2 + log(1 + (m − 1)).
// Subtracting the bits of √½ first makes the exponent field that k. `above_one` is s − 1, perhaps
// more exact than s holds it, and replaces m − 1 where k = 0.
template <class T>
FL_INLINE Vec<T> log_normal(Vec<T> s, Vec<T> above_one) {
  using N = Numbers<T>;
  IVec<T> shifted = bits<T>(s) - N::sqrt_half_bits;
  IVec<T> k = shifted >> N::mantissa;
  Vec<T> m = from_bits<T>((shifted & N::mantissa_mask) + N::sqrt_half_bits);
  Vec<T> exponent = from_bits<T>(k + N::round_bits) - N::round;
  Vec<T> r = log1p_core(select<T>(k == 0, above_one, m - T(1)));
  return exponent * N::ln2_high + (exponent * N::ln2_low + r);
}

// log(1+x) for x from 0 to 1e37, or NaN, to a small relative error even for small x.
template <class T>
FL_INLINE Vec<T> log_one_plus(Vec<T> x) {
#if defined(FL_BY_TABLE)
  if constexpr (sizeof(T) == 4) {
    // 1+x = 2^k (1 + j/n) (1+f) with |f| ≤ 1/2n, where n is the number of lanes: `parts` has k from
    // bit 23 on and j in the bits below. With scale = 2^−k / (1 + j/n),
    //   f = (1+x) scale − 1 = x scale + (scale − 1), which is x itself where k = j = 0, and
    //   log(1+x) = k ln 2 + log(1 + j/n) + log(1+f).
#if defined(__AVX512F__)
    constexpr int kBits = 4;
    const IVec<T> scales = {0x3f800000, 0x3f70f0f1, 0x3f638e39, 0x3f579436, 0x3f4ccccd, 0x3f430c31,
                            0x3f3a2e8c, 0x3f321643, 0x3f2aaaab, 0x3f23d70a, 0x3f1d89d9, 0x3f17b426,
                            0x3f124925, 0x3f0d3dcb, 0x3f088889, 0x3f042108};
    const Vec<T> logs = {0.f,
                         0.0606246180832386f,
                         0.11778302490711212f,
                         0.17185024917125702f,
                         0.2231435328722f,
                         0.2719337046146393f,
                         0.31845369935035706f,
                         0.36290547251701355f,
                         0.4054650664329529f,
                         0.4462871253490448f,
                         0.4855077862739563f,
                         0.5232481360435486f,
                         0.5596157312393188f,
                         0.5947071313858032f,
                         0.6286085844039917f,
                         0.6613985300064087f};
#else
    constexpr int kBits = 3;
    const IVec<T> scales = {0x3f800000, 0x3f638e39, 0x3f4ccccd, 0x3f3a2e8c,
                            0x3f2aaaab, 0x3f1d89d9, 0x3f124925, 0x3f088889};
    const Vec<T> logs = {0.f,
                         0.11778302490711212f,
                         0.2231435328722f,
                         0.31845369935035706f,
                         0.4054650664329529f,
                         0.4855077862739563f,
                         0.5596157312393188f,
                         0.6286085844039917f};
#endif
    const IVec<T> parts = bits<T>(x + 1.f) + ((1 << (22 - kBits)) - 0x3f800000);
    const IVec<T> j = parts >> (23 - kBits), k = parts & ~0x7fffff;  // k times 2^23
    Vec<T> scale = from_bits<T>(bits<T>(pick(from_bits<T>(scales), j)) - k);
    Vec<T> f = x * scale + (scale - 1.f), f2 = f * f;
#if defined(__AVX512F__)
    Vec<T> high = f * -0.2502308487892151f + 0.333495557308197f;  // relative error 3e-8
    Vec<T> r = (high * f - 0.4999999403953552f) * f2 + f;
#else
    Vec<T> low = f * 0.3333319127559662f - 0.4999992251396179f;
    Vec<T> high = f * 0.20092542469501495f - 0.2508120536804199f;  // relative error 1e-8
    Vec<T> r = (high * f2 + low) * f2 + f;
#endif
    return __builtin_convertvector(k, Vec<T>) * 8.262958405176314e-08f + (pick(logs, j) + r);
  }
#endif
  return select<T>(x == x, log_normal<T>(x + T(1), x), x);
}

// log(1+x) for x in [0, 1] or NaN.
FL_INLINE Vec<double> log_one_plus_small(Vec<double> x) { return log_one_plus<double>(x); }
FL_INLINE Vec<float> log_one_plus_small(Vec<float> x) {  // minimax, relative error 3e-8
  Vec<float> x2 = x * x, x4 = x2 * x2;
  Vec<float> a = x * 0.3332132399082184f - 0.49999648332595825f;
  Vec<float> b = x * 0.191536545753479f - 0.24857163429260254f;
  Vec<float> c = x * 0.0792045146226883f - 0.13753800094127655f;
  Vec<float> d = x * 0.0053648208267986774f - 0.030065778642892838f;
  return ((d * x2 + c) * x4 + (b * x2 + a)) * x2 + x;
}

// log x for any x.
template <class T>
FL_INLINE Vec<T> logarithm(Vec<T> x) {
  using N = Numbers<T>;
  IVec<T> tiny = x < N::smallest;
  Vec<T> s = select<T>(tiny, x * N::rescale, x);
  Vec<T> r = log_normal<T>(s, s - T(1)) - keep<T>(tiny, splat<T>(N::rescale_log * T(M_LN2)));
  r = select<T>(x > T(0), r, splat<T>(T(NAN)));
  r = select<T>(x == T(0), splat<T>(T(-INFINITY)), r);
  return select<T>(x == T(INFINITY), x, r);
}

template <class T>
FL_INLINE Vec<T> square_root(Vec<T> v) {
  for (int i = 0; i < lanes<T>; ++i) v[i] = std::sqrt(v[i]);  // one instruction
  return v;
}

// 1/√v for v ≥ 0.
template <class T>
FL_INLINE Vec<T> inverse_square_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // 14 bits, and a step of Newton's method: several times as fast as a root and a quotient.
    const Vec<T> y = (Vec<T>)_mm512_rsqrt14_ps((__m512)v);
    const Vec<T> better = y + (T(0.5) * y) * (T(1) - (v * y) * y);
    return select<T>(better == better, better, y);  // of 0 and ∞
  }
#endif
  return T(1) / square_root<T>(v);
}

// q^γ for q ≥ 0; 0^0 = 1.
template <class T>
FL_INLINE Vec<T> power(Vec<T> q, T gamma) {
  if (gamma == 0) return splat<T>(1);
  if (gamma == 1) return q;
  if (gamma == 2) return q * q;
  if (gamma == 3) return q * q * q;
  if (gamma == T(0.5)) return square_root<T>(q);
  if (gamma == T(-0.5)) return inverse_square_root<T>(q);
  Vec<T> r = exponential<T>(gamma * logarithm<T>(q));
  return select<T>(q == T(0), splat<T>(gamma > 0 ? T(0) : T(INFINITY)), r);
}

// The M of voxel.h.
template <class T>
struct Mathematics {
  static FL_INLINE Vec<T> splat(T n) { return ::splat<T>(n); }
  static FL_INLINE Vec<T> power(Vec<T> v, T n) { return ::power<T>(v, n); }
  static FL_INLINE Vec<T> unless(Vec<T> zero, Vec<T> v) { return drop<T>(zero == T(0), v); }
  // 1 − e^−v cancels for small v, where v (1 − v/2 (1 − v/3 (…))), its Taylor series, does not.
  static FL_INLINE Vec<T> one_less_exponential(Vec<T> v) {
    constexpr int kTerms = sizeof(T) == 4 ? 8 : 15;  // of the series, to 1 ulp
    Vec<T> series = ::splat<T>(1);
#pragma GCC unroll 16
    for (int k = kTerms; k >= 2; --k) series = T(1) - v * series * T(1.0 / k);
    return select<T>(v < T(0.35), v * series, T(1) - exponential<T>(-v));
  }
  static FL_INLINE Vec<T> power_of_any(Vec<T> v, T n) {
    const T limit = n > 0 ? T(INFINITY) : T(n == 0);
    return select<T>(v == T(INFINITY), ::splat<T>(limit), ::power<T>(v, n));
  }
  static FL_INLINE Vec<T> logarithm(Vec<T> v) { return ::logarithm<T>(v); }
  static FL_INLINE Vec<T> above_half(Vec<T> p, Vec<T> a, Vec<T> b) {
    return select<T>(p > T(0.5), a, b);
  }
  static FL_INLINE Vec<T> absolute(Vec<T> v) { return ::absolute<T>(v); }
  static FL_INLINE Vec<T> sign(Vec<T> v) {
    const Vec<T> one = ::splat<T>(1);
    return select<T>(v > T(0), one, select<T>(v < T(0), -one, v));  // of NaN itself
  }
};

}  // namespace
