// Moves rows of a tile between arrays and working buffers: the only place that knows dtypes and
// strides.
#pragma once

#include <type_traits>

#include "job.h"
#include "vec.h"

namespace {

using fastloss::Array;
using fastloss::DType;

constexpr int kMaxTile = 512;

// A tile's voxels in memory: runs of even stride.
struct Runs {
  struct Run {
    int64_t offset;  // bytes
    int32_t first, count;
  };
  Run run[kMaxTile];
  int count = 0;
  int64_t stride = 0;  // bytes from voxel to voxel

  void find(const Array& a, int64_t voxel, int voxels) {
    int last = a.axes - 1;
    count = 0;
    if (last < 0) {  // no spatial axis: one voxel
      stride = 0;
      run[count++] = {0, 0, voxels};
      return;
    }
    stride = a.stride[last];
    if (last == 0) {
      run[count++] = {voxel * stride, 0, voxels};
      return;
    }
    for (int done = 0; done < voxels;) {
      int64_t rest = voxel + done, inner = rest % a.shape[last], offset = inner * stride;
      rest /= a.shape[last];
      for (int axis = last - 1; axis >= 0; --axis) {
        offset += rest % a.shape[axis] * a.stride[axis];
        rest /= a.shape[axis];
      }
      int64_t length = a.shape[last] - inner;
      if (length > voxels - done) length = voxels - done;
      run[count++] = {offset, done, int32_t(length)};
      done += int(length);
    }
  }
};

template <class S>
FL_INLINE S read(const char* p) {
  S value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

FL_INLINE float widen(Brain value) {
  uint32_t wide = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}
FL_INLINE float widen(Half value) {
  // Shifted into place, the exponent is 112 too small (biases 127 and 15): multiplying by 2^112
  // corrects it, for subnormal numbers as well. Infinities and NaN get the full exponent.
  uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  float scaled;
  std::memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 5.192296858534828e33f;
  uint32_t result;
  std::memcpy(&result, &scaled, sizeof result);
  uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  result |= special | sign;
  std::memcpy(&scaled, &result, sizeof scaled);
  return scaled;
}
template <class S>
FL_INLINE S widen(S value) {
  return value;
}

FL_INLINE Brain narrow_brain(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest even
  uint32_t result = (wide & 0x7fffffff) > 0x7f800000u ? 0x7fc0u : rounded;
  return {uint16_t(result)};
}
FL_INLINE Half narrow_half(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  uint32_t sign = (wide >> 16) & 0x8000, magnitude = wide & 0x7fffffff;
  // Normal results: subtract 112 from the exponent (adding 0xc8000000) and round to nearest even.
  uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: the ulp of ½ is 2^−24, float16's least number, so that adding ½ leaves the
  // rounded mantissa in the low bits.
  float small, half = 0.5f;
  std::memcpy(&small, &magnitude, sizeof small);
  small += half;
  uint32_t subnormal, half_bits = 0x3f000000u;
  std::memcpy(&subnormal, &small, sizeof subnormal);
  subnormal -= half_bits;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {uint16_t(result | sign)};
}

// Calls f(S{}) with the storage type S of a dtype that is computed in T.
template <class T, class F>
void with_storage(DType dtype, const F& f) {
  if constexpr (sizeof(T) == 8) f(double{});
  else if (dtype == DType::f16) f(Half{});
  else if (dtype == DType::bf16) f(Brain{});
  else f(float{});
}

// A vector of numbers from memory.
template <class S, class T>
FL_INLINE Vec<T> load_as(const S* p) {
  if constexpr (std::is_same<S, T>::value) {
    return load<T>(p);
  } else {
#if defined(__AVX512F__)
    __m256i narrow = _mm256_loadu_si256((const __m256i*)p);
    if constexpr (std::is_same<S, Half>::value) return (Vec<T>)_mm512_cvtph_ps(narrow);
    else return (Vec<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i narrow = _mm_loadu_si128((const __m128i*)p);
    if constexpr (std::is_same<S, Half>::value) return (Vec<T>)_mm256_cvtph_ps(narrow);
    // One shuffle of the broadcast load puts each number above two bytes of zeros.
    const __m256i places =
        _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (Vec<T>)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(narrow), places);
#else
    T wide[lanes<T>];
    for (int i = 0; i < lanes<T>; ++i) wide[i] = widen(p[i]);
    return load<T>(wide);
#endif
  }
}

template <class S, class T>
void load_run(const char* p, int64_t stride, int count, T* row) {
  if (stride == int64_t(sizeof(S))) {
    int i = 0;
#if defined(__F16C__)
    if constexpr (sizeof(T) == 4 && std::is_same<S, Half>::value)
      for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps((float*)row + i,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 2 * i))));
#endif
    for (; i < count; ++i) row[i] = T(widen(read<S>(p + i * int64_t(sizeof(S)))));
  } else {
    for (int i = 0; i < count; ++i) row[i] = T(widen(read<S>(p + i * stride)));
  }
}

template <class S, class T>
void load_runs(const char* base, const Runs& runs, T* row) {
  for (int r = 0; r < runs.count; ++r) {
    const auto& run = runs.run[r];
    load_run<S, T>(base + run.offset, runs.stride, run.count, row + run.first);
  }
}

// Reads one row of a tile as T; `base` is the row's sample and channel.
template <class T>
void load_row(const char* base, DType dtype, const Runs& runs, T* row) {
  switch (dtype) {
    case DType::f32:
      return load_runs<float, T>(base, runs, row);
    case DType::f16:
      return load_runs<Half, T>(base, runs, row);
    case DType::bf16:
      return load_runs<Brain, T>(base, runs, row);
    case DType::f64:
      return load_runs<double, T>(base, runs, row);
    case DType::u8:
      return load_runs<uint8_t, T>(base, runs, row);
    case DType::i8:
      return load_runs<int8_t, T>(base, runs, row);
    case DType::u16:
      return load_runs<uint16_t, T>(base, runs, row);
    case DType::i16:
      return load_runs<int16_t, T>(base, runs, row);
    case DType::u32:
      return load_runs<uint32_t, T>(base, runs, row);
    case DType::i32:
      return load_runs<int32_t, T>(base, runs, row);
    case DType::u64:
      return load_runs<uint64_t, T>(base, runs, row);
    case DType::i64:
      return load_runs<int64_t, T>(base, runs, row);
  }
}

// As load_row, for integers. Returns whether all are 0, 1 or, if `skips`, `skip`.
template <class S, class T>
bool load_binary_runs(const char* base, const Runs& runs, bool skips, int64_t skip, T* row) {
  using U = typename std::make_unsigned<S>::type;
  // If S cannot hold `skip`, it does not occur: 0 then stands for it, as 0 passes anyway.
  const bool holds = int64_t(S(skip)) == skip && (std::is_signed<S>::value || skip >= 0);
  const S passed = skips && holds ? S(skip) : S(0);
  U all = 0;  // the bits of all numbers: 0 and 1 set only the lowest
  for (int r = 0; r < runs.count; ++r) {
    const char* p = base + runs.run[r].offset;
    T* to = row + runs.run[r].first;
    const int count = runs.run[r].count;
    auto load = [&](int64_t stride) __attribute__((always_inline)) {
      for (int i = 0; i < count; ++i) {
        const S value = read<S>(p + i * stride);
        all = U(all | (value == passed ? U(0) : U(value)));
        to[i] = T(value);
      }
    };
    if (runs.stride == int64_t(sizeof(S))) load(int64_t(sizeof(S)));
    else load(runs.stride);
  }
  return all <= 1;
}

// As load_row, for a row of a dense target. Returns false if its integers are not as above.
template <class T>
bool load_dense_row(const char* base, DType dtype, const Runs& runs, bool skips, int64_t skip,
                    T* row) {
  switch (dtype) {
    case DType::u8:
      return load_binary_runs<uint8_t, T>(base, runs, skips, skip, row);
    case DType::i8:
      return load_binary_runs<int8_t, T>(base, runs, skips, skip, row);
    case DType::u16:
      return load_binary_runs<uint16_t, T>(base, runs, skips, skip, row);
    case DType::i16:
      return load_binary_runs<int16_t, T>(base, runs, skips, skip, row);
    case DType::u32:
      return load_binary_runs<uint32_t, T>(base, runs, skips, skip, row);
    case DType::i32:
      return load_binary_runs<int32_t, T>(base, runs, skips, skip, row);
    case DType::u64:
      return load_binary_runs<uint64_t, T>(base, runs, skips, skip, row);
    case DType::i64:
      return load_binary_runs<int64_t, T>(base, runs, skips, skip, row);
    default:
      load_row<T>(base, dtype, runs, row);
      return true;
  }
}

FL_INLINE void narrow(float v, float* p) { std::memcpy(p, &v, sizeof v); }
FL_INLINE void narrow(float v, Half* p) { *p = narrow_half(v); }
FL_INLINE void narrow(float v, Brain* p) { *p = narrow_brain(v); }
FL_INLINE void narrow(double v, double* p) { std::memcpy(p, &v, sizeof v); }

// The bits of bfloat16 numbers in 32-bit words, rounded to nearest even; NaN stays NaN.
FL_INLINE IVec<float> brain_words(Vec<float> v) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  IVec<float> w = bits<float>(v), rounded = w + 0x7fff + ((w >> 16) & 1);
  rounded = v == v ? rounded : IVec<float>{} + 0x7fc00000;
  return (IVec<float>)((Words)rounded >> 16);
}

// Vectors of half-precision numbers, rounded likewise. Without `kAnyNan` the lower 16 bits of any
// NaN must be 0, as in the NaN that the processor generates and those converted from half types.
#if defined(__AVX512F__)
#define FL_HALVES
template <class S>
FL_INLINE __m256i narrow_vector(Vec<float> v) {
  if constexpr (std::is_same<S, Half>::value)
    return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  else return _mm512_cvtepi32_epi16((__m512i)brain_words(v));
}
template <class S, bool kAnyNan = true>
FL_INLINE __m512i narrow_vectors(Vec<float> a, Vec<float> b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_vector<S>(a)), narrow_vector<S>(b), 1);
}
template <bool kStream>
FL_INLINE void store_halves(void* p, __m256i v) {
  if (kStream) _mm256_stream_si256((__m256i*)p, v);
  else _mm256_storeu_si256((__m256i*)p, v);
}
#elif defined(__AVX2__) && defined(__F16C__)
#define FL_HALVES
template <class S>
FL_INLINE __m128i narrow_vector(Vec<float> v) {
  if constexpr (std::is_same<S, Half>::value) {
    return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    __m256i words = (__m256i)brain_words(v);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
}
template <class S, bool kAnyNan = true>
FL_INLINE __m256i narrow_vectors(Vec<float> a, Vec<float> b) {
  if constexpr (std::is_same<S, Half>::value)
    return _mm256_set_m128i(narrow_vector<S>(b), narrow_vector<S>(a));
  // Splits all numbers into upper and lower 16 bits and adds 1 to the upper where the lower is
  // above one half, or equal to it and the upper is odd. NaN stays NaN, as its upper mantissa bits
  // are set.
  const __m256i apart = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  __m256i u = _mm256_shuffle_epi8((__m256i)a, apart), v = _mm256_shuffle_epi8((__m256i)b, apart);
  __m256i low = _mm256_unpacklo_epi64(u, v), high = _mm256_unpackhi_epi64(u, v);
  const __m256i one = _mm256_set1_epi16(1);
  // (low + 0x7fff + odd) >> 1 has bit 15 set where that sum exceeds 16 bits.
  __m256i addend = _mm256_add_epi16(_mm256_and_si256(high, one), _mm256_set1_epi16(0x7ffe));
  __m256i up = _mm256_srai_epi16(_mm256_avg_epu16(low, addend), 15);
  if (kAnyNan) {
    __m256i magnitude = _mm256_and_si256(high, _mm256_set1_epi16(0x7fff));
    __m256i nan = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x7f80));
    up = _mm256_andnot_si256(nan, up);
  }
  return _mm256_permute4x64_epi64(_mm256_sub_epi16(high, up), 0xd8);
}
template <bool kStream>
FL_INLINE void store_halves(void* p, __m128i v) {
  if (kStream) _mm_stream_si128((__m128i*)p, v);
  else _mm_storeu_si128((__m128i*)p, v);
}
#endif

// Whether numbers of type S are in [−most, most]; NaN may count either way. Each number is passed
// both as loaded and by its address.
template <class S, class T>
struct Extent {
  Vec<T> low{}, high{};

  FL_INLINE void loaded(Vec<T> v) {
    low = smaller(v, low);
    high = larger(v, high);
  }
  template <int N>  // vectors
  FL_INLINE void stored(const S*) {}
  FL_INLINE bool within(int most) const { return !any<T>((low < -T(most)) | (high > T(most))); }
};
#if defined(FL_HALVES)
// The bits of half-precision numbers without the sign are ordered, and a vector holds twice as
// many.
template <class S>
struct ExtentOfHalves {
  __m256i largest = _mm256_setzero_si256();

  FL_INLINE void loaded(Vec<float>) {}
  template <int N>
  FL_INLINE void stored(const S* p) {
    constexpr int kHalves = N * lanes<float>;
    if constexpr (kHalves < 16)
      add(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128((const __m128i*)p), 0));
    else
#pragma GCC unroll 4
      for (int i = 0; i < kHalves; i += 16) add(_mm256_loadu_si256((const __m256i*)(p + i)));
  }
  FL_INLINE bool within(int most) const {
    S limit;
    narrow(float(most), &limit);
    const __m256i above = _mm256_subs_epu16(largest, _mm256_set1_epi16(int16_t(limit.bits)));
    return _mm256_testz_si256(above, above);
  }

 private:
  FL_INLINE void add(__m256i halves) {
    largest = _mm256_max_epu16(largest, _mm256_and_si256(halves, _mm256_set1_epi16(0x7fff)));
  }
};
template <>
struct Extent<Half, float> : ExtentOfHalves<Half> {};
template <>
struct Extent<Brain, float> : ExtentOfHalves<Brain> {};
#endif

// Stores a vector, rounded to nearest even. `kStream`: a non-temporal store, for which p must be
// aligned to the bytes written.
template <class S, bool kStream, class T>
FL_INLINE void store_as(S* p, Vec<T> v) {
  if constexpr (std::is_same<S, T>::value) {
    if (kStream) stream<T>(p, v);
    else store<T>(p, v);
  } else {
#if defined(FL_HALVES)
    store_halves<kStream>(p, narrow_vector<S>(v));
#else
    T wide[lanes<T>];
    store<T>(wide, v);
    for (int i = 0; i < lanes<T>; ++i) narrow(wide[i], p + i);
#endif
  }
}

// Stores two vectors; half types in one store.
template <class S, bool kStream, bool kAnyNan, class T>
FL_INLINE void store_two_as(S* p, Vec<T> a, Vec<T> b) {
#if defined(FL_HALVES)
  if constexpr (!std::is_same<S, T>::value) {
    auto halves = (Vec<T>)narrow_vectors<S, kAnyNan>(a, b);
    if (kStream) stream<T>((T*)p, halves);
    else store<T>((T*)p, halves);
    return;
  }
#endif
  store_as<S, kStream, T>(p, a);
  store_as<S, kStream, T>(p + lanes<T>, b);
}

// Stores `count` numbers, whole vectors, to p and their negatives to q. Half types are rounded once
// for both and stored in whole vectors.
template <class S, bool kStream, class T>
FL_INLINE void store_opposites(const T* from, int64_t count, S* p, S* q) {
  constexpr int L = lanes<T>;
  int64_t i = 0;
#if defined(FL_HALVES)
  if constexpr (!std::is_same<S, T>::value)
    for (; i + 2 * L <= count; i += 2 * L) {
      auto halves = (Vec<T>)narrow_vectors<S>(load<T>(from + i), load<T>(from + i + L));
      auto opposites = from_bits<T>(bits<T>(halves) ^ int32_t(0x80008000));
      if (kStream) {
        stream<T>((T*)(p + i), halves);
        stream<T>((T*)(q + i), opposites);
      } else {
        store<T>((T*)(p + i), halves);
        store<T>((T*)(q + i), opposites);
      }
    }
#endif
  for (; i < count; i += L) {
    store_as<S, kStream, T>(p + i, load<T>(from + i));
    store_as<S, kStream, T>(q + i, -load<T>(from + i));
  }
}

// Stores `count` numbers, whole vectors, each after its negative.
template <class S, bool kStream>
FL_INLINE void store_pairs(const float* from, int64_t count, S* p) {
  constexpr int L = lanes<float>;
  for (int64_t i = 0; i < count; i += L, p += 2 * L) {
    const Vec<float> v = load<float>(from + i);
    auto [low, high] = zip(-v, v);
    store_as<S, kStream, float>(p, low);
    store_as<S, kStream, float>(p + L, high);
  }
}

template <class S, class T>
void store_runs(char* base, const Runs& runs, const T* row, bool past_caches) {
  for (int r = 0; r < runs.count; ++r) {
    const auto& run = runs.run[r];
    char* p = base + run.offset;
    const T* from = row + run.first;
    if (runs.stride == int64_t(sizeof(S))) {
      alignas(64) S converted[kMaxTile];
      const char* source = (const char*)converted;
      if constexpr (std::is_same<S, T>::value) {
        source = (const char*)from;
      } else {
        int i = 0;
#if defined(__F16C__)
        if constexpr (std::is_same<S, Half>::value)
          for (; i + 8 <= run.count; i += 8)
            _mm_store_si128((__m128i*)(converted + i),
                            _mm256_cvtps_ph(_mm256_loadu_ps((const float*)from + i), 0));
#endif
        for (; i < run.count; ++i) narrow(from[i], converted + i);
      }
      int64_t bytes = int64_t(run.count) * int64_t(sizeof(S)), b = 0;
      if (past_caches && uintptr_t(p) % kVectorBytes == 0)
        for (; b + kVectorBytes <= bytes; b += kVectorBytes)
          stream<float>((float*)(p + b), load<float>((const float*)(source + b)));
      std::memcpy(p + b, source + b, size_t(bytes - b));
    } else {
      for (int i = 0; i < run.count; ++i) {
        S value;
        narrow(from[i], &value);
        std::memcpy(p + i * runs.stride, &value, sizeof value);
      }
    }
  }
}

template <class T>
void store_row(char* base, DType dtype, const Runs& runs, const T* row, bool past_caches) {
  if constexpr (sizeof(T) == 8) {
    store_runs<double, T>(base, runs, row, past_caches);
  } else {
    if (dtype == DType::f32) return store_runs<float, T>(base, runs, row, past_caches);
    if (dtype == DType::f16) return store_runs<Half, T>(base, runs, row, past_caches);
    store_runs<Brain, T>(base, runs, row, past_caches);
  }
}

// Reads labels: y in [0, classes), −2 where ignored, −1 where the label is no class.
template <class S, class I, bool kContiguous, bool kIgnore>
FL_INLINE void load_label_run(const char* p, int64_t stride, int count, I classes, I ignore,
                              int32_t* y) {
  for (int i = 0; i < count; ++i) {
    I value = I(read<S>(p + i * (kContiguous ? int64_t(sizeof(S)) : stride)));
    bool good = (value >= I(0)) & (value < classes);
    int32_t whole = int32_t(good ? value : I(0));
    if constexpr (std::is_floating_point<I>::value) good = good & (value == I(whole));
    int32_t label = good ? whole : -1;
    if constexpr (kIgnore) label = value == ignore ? -2 : label;
    y[i] = label;
  }
}

#if defined(__AVX2__)
// As load_plain_labels for bytes, 32 at a time.
FL_INLINE bool load_byte_labels(const char* p, int count, int64_t classes, int32_t* y) {
  __m256i high = _mm256_setzero_si256();
  int i = 0;
  for (; i + 32 <= count; i += 32) {
    high = _mm256_max_epu8(high, _mm256_loadu_si256((const __m256i*)(p + i)));
#if defined(__AVX512F__)
#pragma GCC unroll 2
    for (int j = 0; j < 32; j += 16)
      _mm512_storeu_si512(y + i + j,
                          _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + i + j))));
#else
#pragma GCC unroll 4
    for (int j = 0; j < 32; j += 8)
      _mm256_storeu_si256((__m256i*)(y + i + j),
                          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + i + j))));
#endif
  }
  // The largest byte: the complement of the smallest word of complements.
  __m128i top = _mm_max_epu8(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  top = _mm_max_epu8(top, _mm_srli_epi16(top, 8));
  top = _mm_minpos_epu16(_mm_andnot_si128(top, _mm_set1_epi16(0xff)));
  uint8_t most = uint8_t(~_mm_cvtsi128_si32(top));
  for (; i < count; ++i) {
    uint8_t label = uint8_t(p[i]);
    most = label > most ? label : most;
    y[i] = label;
  }
  return most < classes;
}
#endif

// The number of 1s among `count` bytes, at most kMaxTile; −1 if any is neither 0 nor 1.
inline int count_ones(const uint8_t* p, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
  Bytes v, any{}, sums{};
  int i = 0;
  for (; i + kVectorBytes <= count; i += kVectorBytes) {
    std::memcpy(&v, p + i, sizeof v);
    any |= v;
    sums += v;
  }
  uint64_t words[kVectorBytes / 8], all = 0, sum = 0;
  std::memcpy(words, &any, sizeof any);
  for (uint64_t word : words) all |= word;
  std::memcpy(words, &sums, sizeof sums);
  for (uint64_t word : words) sum += word;  // at most 64 in each byte
  const uint64_t even = 0x00ff00ff00ff00ff;
  int ones = int((((sum & even) + (sum >> 8 & even)) * 0x0001000100010001) >> 48);
  for (; i < count; ++i) {
    all |= p[i];
    ones += p[i];
  }
  return all & 0xfefefefefefefefe ? -1 : ones;
}

// Whether `count` bytes are all equal.
inline bool all_same(const uint8_t* p, int count) {
  constexpr int L = lanes<float> * 4;
  IVec<float> others{}, v;
  const IVec<float> first = IVec<float>{} + int32_t(0x01010101u * p[0]);
  int i = 0;
  for (; i + L <= count; i += L) {
    std::memcpy(&v, p + i, sizeof v);
    others |= v ^ first;
  }
  bool any_other = any<float>(others != IVec<float>{});
  for (; i < count; ++i) any_other |= p[i] != p[0];
  return !any_other;
}

// Widens labels; returns false if some are outside [0, classes), which is quick to check.
template <class S, class I>
FL_INLINE bool load_plain_labels(const char* p, int count, I classes, int32_t* y) {
#if defined(__AVX2__)
  if constexpr (std::is_same<S, uint8_t>::value) return load_byte_labels(p, count, classes, y);
#endif
  if constexpr (std::is_integral<S>::value) {
    if constexpr (sizeof(S) <= 4) {
      uint32_t high = 0;
      for (int i = 0; i < count; ++i) {
        int32_t label = int32_t(read<S>(p + i * int64_t(sizeof(S))));
        high = uint32_t(label) > high ? uint32_t(label) : high;
        y[i] = label;
      }
      return int64_t(high) < int64_t(classes);
    }
    S low = 0, high = 0;
    for (int i = 0; i < count; ++i) {
      S value = read<S>(p + i * int64_t(sizeof(S)));
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
    if (low < 0 || I(high) >= classes) return false;
    for (int i = 0; i < count; ++i) y[i] = int32_t(read<S>(p + i * int64_t(sizeof(S))));
    return true;
  }
  return false;
}

// Returns whether all labels are known to be classes.
template <class S, class I>
bool load_labels_as(const char* base, const Runs& runs, I classes, bool has_ignore, I ignore,
                    int32_t* y) {
  bool all = true, may_be_plain = !has_ignore || ignore < I(0) || ignore >= classes;
  for (int r = 0; r < runs.count; ++r) {
    const auto& run = runs.run[r];
    const char* p = base + run.offset;
    int32_t* to = y + run.first;
    int64_t stride = runs.stride;
    bool contiguous = stride == int64_t(sizeof(S));
    if (contiguous && may_be_plain && load_plain_labels<S, I>(p, run.count, classes, to)) continue;
    all = false;
    if (contiguous && has_ignore)
      load_label_run<S, I, true, true>(p, stride, run.count, classes, ignore, to);
    else if (contiguous)
      load_label_run<S, I, true, false>(p, stride, run.count, classes, ignore, to);
    else if (has_ignore)
      load_label_run<S, I, false, true>(p, stride, run.count, classes, ignore, to);
    else load_label_run<S, I, false, false>(p, stride, run.count, classes, ignore, to);
  }
  return all;
}

template <class S>
bool load_labels_int32(const char* base, const Runs& runs, int64_t classes, bool has_ignore,
                       int64_t ignore, int32_t* y) {
  bool fits = ignore >= INT32_MIN && ignore <= INT32_MAX;
  return load_labels_as<S, int32_t>(base, runs, int32_t(classes), has_ignore && fits,
                                    int32_t(ignore), y);
}

inline bool load_labels(const char* base, DType dtype, const Runs& runs, int64_t classes,
                        bool has_ignore, int64_t ignore, int32_t* y) {
  switch (dtype) {
    case DType::u8:
      return load_labels_int32<uint8_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::i8:
      return load_labels_int32<int8_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::u16:
      return load_labels_int32<uint16_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::i16:
      return load_labels_int32<int16_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::i32:
      return load_labels_int32<int32_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::u32:
      return load_labels_as<uint32_t, int64_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::i64:
      return load_labels_as<int64_t, int64_t>(base, runs, classes, has_ignore, ignore, y);
    case DType::u64:  // beyond int64 a label becomes negative, which is no class either
      return load_labels_as<int64_t, int64_t>(base, runs, classes, has_ignore && ignore >= 0,
                                              ignore, y);
    default: {
      double row[kMaxTile];
      load_row<double>(base, dtype, runs, row);
      Runs packed;
      packed.count = 1;
      packed.stride = sizeof(double);
      int last = runs.count - 1;
      packed.run[0] = {0, 0, runs.run[last].first + runs.run[last].count};
      return load_labels_as<double, double>((const char*)row, packed, double(classes), has_ignore,
                                            double(ignore), y);
    }
  }
}

// Transposes a 4×4 block.
FL_INLINE void transpose4(const float* from, int64_t from_step, float* to, int64_t to_step) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_step);
  __m128 c = _mm_loadu_ps(from + 2 * from_step), d = _mm_loadu_ps(from + 3 * from_step);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_step, b);
  _mm_storeu_ps(to + 2 * to_step, c);
  _mm_storeu_ps(to + 3 * to_step, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_step + i] = from[i * from_step + j];
#endif
}

#if defined(__AVX2__)
// Transposes a block of 8 rows and 4 columns. Half rows are combined as they are loaded, which
// needs no shuffle port.
FL_INLINE void transpose8x4(const float* from, int64_t from_step, float* to, int64_t to_step) {
  __m256 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* p = from + i * from_step;
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                _mm_loadu_ps(p + 4 * from_step), 1);
  }
  const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
  _mm256_storeu_ps(to, _mm256_shuffle_ps(a, c, 0x44));
  _mm256_storeu_ps(to + to_step, _mm256_shuffle_ps(a, c, 0xee));
  _mm256_storeu_ps(to + 2 * to_step, _mm256_shuffle_ps(b, d, 0x44));
  _mm256_storeu_ps(to + 3 * to_step, _mm256_shuffle_ps(b, d, 0xee));
}
#endif

#if defined(__AVX512F__)
// Transposes four 4×4 blocks, one in each quarter of the vectors.
FL_INLINE void transpose_quarters(__m512 (&r)[4]) {
  __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
  __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
  r[0] = _mm512_shuffle_ps(a, c, 0x44), r[1] = _mm512_shuffle_ps(a, c, 0xee);
  r[2] = _mm512_shuffle_ps(b, d, 0x44), r[3] = _mm512_shuffle_ps(b, d, 0xee);
}
// Transposes a block of 16 rows and 4 columns.
FL_INLINE void transpose16x4(const float* from, int64_t from_step, float* to, int64_t to_step) {
  __m512 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* p = from + i * from_step;
    r[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(p + 4 * from_step), 1);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(p + 8 * from_step), 2);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(p + 12 * from_step), 3);
  }
  transpose_quarters(r);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) _mm512_storeu_ps(to + j * to_step, r[j]);
}
// Transposes a block of 4 rows and 16 columns.
FL_INLINE void transpose4x16(const float* from, int64_t from_step, float* to, int64_t to_step) {
  __m512 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = _mm512_loadu_ps(from + i * from_step);
  transpose_quarters(r);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    float* p = to + j * to_step;
    _mm_storeu_ps(p, _mm512_castps512_ps128(r[j]));
    _mm_storeu_ps(p + 4 * to_step, _mm512_extractf32x4_ps(r[j], 1));
    _mm_storeu_ps(p + 8 * to_step, _mm512_extractf32x4_ps(r[j], 2));
    _mm_storeu_ps(p + 12 * to_step, _mm512_extractf32x4_ps(r[j], 3));
  }
}
// to[4 j + i] = from[i][j]: joins 4 rows, 16 columns of them.
FL_INLINE void join4(const float* from, int64_t from_step, float* to) {
  __m512 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = _mm512_loadu_ps(from + i * from_step);
  transpose_quarters(r);  // quarter q of r[i] is column 4 q + i
  const __m512 a = _mm512_shuffle_f32x4(r[0], r[1], 0x44),
               b = _mm512_shuffle_f32x4(r[2], r[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(r[0], r[1], 0xee),
               d = _mm512_shuffle_f32x4(r[2], r[3], 0xee);
  _mm512_storeu_ps(to, _mm512_shuffle_f32x4(a, b, 0x88));
  _mm512_storeu_ps(to + 16, _mm512_shuffle_f32x4(a, b, 0xdd));
  _mm512_storeu_ps(to + 32, _mm512_shuffle_f32x4(c, d, 0x88));
  _mm512_storeu_ps(to + 48, _mm512_shuffle_f32x4(c, d, 0xdd));
}

#endif

// Calls block(i, j) for blocks of kRows × kColumns that cover the matrix; the last ones overlap
// those before them where the sizes do not divide.
template <int kRows, int kColumns, class F>
FL_INLINE void cover(int64_t rows, int64_t columns, const F& block) {
  for (int64_t i = 0; i < rows; i += kRows) {
    int64_t a = i + kRows <= rows ? i : rows - kRows;
    for (int64_t j = 0; j < columns; j += kColumns)
      block(a, j + kColumns <= columns ? j : columns - kColumns);
  }
}

// As transpose, for a compile-time number of columns, which the compiler vectorises.
template <int kColumns>
void split_columns(const float* __restrict from, float* __restrict to, int64_t to_step,
                   int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < kColumns; ++j) to[j * to_step + i] = from[i * kColumns + j];
}
template <int kRows>
void join_rows(const float* __restrict from, int64_t from_step, float* __restrict to,
               int64_t columns) {
  for (int64_t j = 0; j < columns; ++j)
    for (int i = 0; i < kRows; ++i) to[j * kRows + i] = from[i * from_step + j];
}

// to[j][i] = from[i][j] for `rows` i and `columns` j. `from` and `to` do not overlap.
inline void transpose(const float* from, int64_t from_step, float* to, int64_t to_step,
                      int64_t rows, int64_t columns) {
  if (columns == 2 && from_step == 2) return split_columns<2>(from, to, to_step, rows);
  if (columns == 3 && from_step == 3) return split_columns<3>(from, to, to_step, rows);
  if (rows == 2 && to_step == 2) return join_rows<2>(from, from_step, to, columns);
  if (rows == 3 && to_step == 3) return join_rows<3>(from, from_step, to, columns);
  if (rows < 4 || columns < 4) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[j * to_step + i] = from[i * from_step + j];
    return;
  }
#if defined(__AVX512F__)
  if (rows >= 16)
    return cover<16, 4>(rows, columns, [&](int64_t i, int64_t j) {
      transpose16x4(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
    });
  if (columns >= 16)
    return cover<4, 16>(rows, columns, [&](int64_t i, int64_t j) {
      transpose4x16(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
    });
#elif defined(__AVX2__)
  if (rows >= 8 && columns >= 8)
    return cover<8, 8>(rows, columns, [&](int64_t i, int64_t j) {
      const float* p = from + i * from_step + j;
      float* q = to + j * to_step + i;
      transpose8x4(p, from_step, q, to_step);
      transpose8x4(p + 4, from_step, q + 4 * to_step, to_step);
    });
#endif
  cover<4, 4>(rows, columns, [&](int64_t i, int64_t j) {
    transpose4(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
  });
}

// to[j rows + i] = from[i][j] for `rows` i and `columns` j. Both buffers reach further: blocks of 8
// or 16 rows read numbers behind the last row of `from`, and write those over the next column of
// `to`, which is written after.
inline void join(const float* from, int64_t from_step, float* to, int64_t rows, int64_t columns) {
#if defined(__AVX2__)
  auto blocks = [&](int64_t width, const auto& block) __attribute__((always_inline)) {
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t at = j + width <= columns ? j : columns - width;
      block(from + at, to + at * rows);
    }
  };
#if defined(__AVX512F__)
  if (rows == 4 && columns >= 16)
    return blocks(16, [&](const float* p, float* q) { join4(p, from_step, q); });
  if (rows > 8 && rows < 16 && columns >= 4)
    return blocks(4, [&](const float* p, float* q) { transpose16x4(p, from_step, q, rows); });
#endif
  if (rows > 4 && rows <= 8 && columns >= 4)
    return blocks(4, [&](const float* p, float* q) { transpose8x4(p, from_step, q, rows); });
#endif
  transpose(from, from_step, to, rows, rows, columns);
}

}  // namespace
