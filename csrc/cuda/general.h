// Any table of sums and any map, with any activation, target, fields, regions and layout.
//
// A thread takes one voxel at a time and loops over its classes: once for the maximum and the sum
// of the softmax, and again for the sums and maps. A warp sums each class over its voxels and adds
// to the warp's own accumulators: no atomics, and a fixed order.
//
// Softmax treats its first largest logit x_t separately. With the others relative to their largest
// x_s, o = Σ_{j≠t} e^{x_j − x_s} and r = o e^{x_s − x_t},
//
//   p_t = 1 / (1 + r),  1 − p_t = r / (1 + r),  −log p_t = log(1 + r),
//   −log(1 − p_t) = log(1 + r) − log o − (x_s − x_t),
//
// exact however much t dominates. With a_c the derivative by log p_c and b_c that
// by log(1 − p_c), as d log(1 − p_c) / d x_j = p_c p_j / (1 − p_c) for j ≠ c, and −p_c at c itself,
//
//   g_t = a_t (1 − p_t) − b_t p_t + p_t (B − A)
//   g_j = a_j + p_j (B − A − a_t − b_j / (1 − p_j)) + b_t p_t e^{x_j − x_s} / o
//
// with A = Σ_{c≠t} a_c and B = Σ_{c≠t} b_c p_c / (1 − p_c): no difference of large numbers.
#pragma once

#include "error_bins.h"
#include "finish.h"
#include "voxel.h"
#include "voxels.h"

constexpr int kMaxFields = 8;
constexpr int kMaxSums = 32;  // in the build that serves any call

enum FieldKind { kOfVoxel, kOfClass, kOfLabels };
enum MapKind { kNoMap, kVoxelMap, kClassMap, kErrorMap, kLabelMap, kMaskMap };
// The order of fastloss.sums.WEIGHTS.
enum class Weight : int { one, target, rest, target_squared };

#ifdef FL_SPECIAL
constexpr int kFields = FL_fields, kSums = FL_slots;
#else
constexpr int kFields = kMaxFields, kSums = kMaxSums;
#endif

// Mirrored field by field in fastloss/backends/cuda/general.py. A map is written to `data` of kOut.
struct GeneralCall : Call {
  // Further arrays: the regions, then the fields.
  char* more[1 + kMaxFields];
  long long more_sample_stride[1 + kMaxFields];
  long long more_channel_stride[1 + kMaxFields];
  long long more_stride[1 + kMaxFields][kMaxAxes];
  const double* map_coefficients;  // (S, C)
  // Histograms of errors: see histograms.cu. The largest voxel weight is the bits of a double.
  unsigned long long* error_tallies;
  unsigned long long* largest_weight;
  double parameter[kMaxSums];
  int rows;       // of a sample
  int part_bits;  // 2^part_bits voxels are a part of a sample in tallies

  // From here on: the fields that CONST reads.
  int map_kind, map_type;
  int regions_type, regions_by_class;
  int fields;
  int histograms;  // the kinds of error that are counted, as bits
  int plain;       // voxel weights count as 1, or 0 where they are 0
  int by_row;      // a map's coefficients are those of the apply pass, of every row
  int field_kind[kMaxFields], field_type[kMaxFields];
  // For every sum; a field of −1: none, −2: absent, and the sum is 0.
  int sum_weight[kMaxSums], sum_function[kMaxSums], sum_field[kMaxSums];
};

FL_DEVICE float exact_exponential(float x) { return expf(x); }
FL_DEVICE double exact_exponential(double x) { return exp(x); }
FL_DEVICE float exact_log_one_plus(float x) { return log1pf(x); }
FL_DEVICE double exact_log_one_plus(double x) { return log1p(x); }

// x − most, but 0 for equal infinities: such classes share the probability.
template <class T>
FL_DEVICE T gap_below(T x, T most) {
  return x == most ? T(0) : x - most;
}

FL_DEVICE bool has_regions(const GeneralCall& call) { return CONST(regions_type) != kNoType; }

// Whether every class has a map of regions.
FL_DEVICE bool has_regions_by_class(const GeneralCall& call) { return CONST(regions_by_class); }

// Whether a sum is computed.
FL_DEVICE bool is_there(const GeneralCall& call, int s) {
  return s < CONST(slots) && CONST(sum_field[s]) != -2;
}

// Whether any sum is differentiated by log(1 − p).
FL_DEVICE bool has_rests(const GeneralCall& call) {
  bool found = false;
#pragma unroll
  for (int s = 0; s < kSums; ++s)
    if (is_there(call, s))
      with_function(Function(CONST(sum_function[s])),
                    [&](auto function) { found = found || function.by == By::log_q; });
  return found;
}

// The voxel of a thread, and its offsets in the arrays.
template <class In>
struct Spot {
  using T = typename ComputedIn<In>::type;
  const GeneralCall& call;
  Voxels<T, 1> voxel;
  long long offset[1 + kFields];  // of the regions and the fields, in bytes, sample included
  int row;                        // of the sample; −1: none; of regions by class see `row_of`
  T number[kFields + 1];          // of the fields with one number per voxel

  FL_DEVICE Spot(const GeneralCall& call, int sample, Index first, Index last) : call(call) {
    move_to(call, sample, first, last, voxel);
    find_others(sample, voxel.inside ? first : 0);
    if (voxel.inside && checks_numbers(call)) {
#pragma unroll 1
      for (int c = 0; c < CONST(classes); ++c) {
        T g[1];
        load_numbers(at_class(kTarget, c), 0, CONST(target_type), false, g);
        voxel.faults += any_bad_number(call, g);
      }
    }
    row = voxel.inside ? 0 : -1;
    if (voxel.inside && has_regions(call) && !has_regions_by_class(call)) {
      row = region(0);
      if (row < 0) voxel.m[0] = T(0);
    }
    if (CONST(plain)) voxel.m[0] = voxel.m[0] > T(0) ? T(1) : T(0);
#pragma unroll
    for (int f = 0; f < kFields; ++f)
      if (f < CONST(fields) && CONST(field_kind[f]) != kOfClass) number[f] = load_field(f, 0);
  }

  FL_DEVICE void find_others(int sample, Index place) {
#pragma unroll
    for (int o = 0; o <= kFields; ++o) {
      offset[o] = sample * call.more_sample_stride[o];
      if (CONST(axes) == 1) offset[o] += static_cast<long long>(place) * call.more_stride[o][0];
    }
    if (CONST(axes) == 1) return;
#pragma unroll
    for (int axis = CONST(axes) - 1; axis >= 0; --axis) {
      Index at = place;
      if (axis > 0) {
        place = at / Index(call.shape[axis]);
        at -= place * Index(call.shape[axis]);
      }
#pragma unroll
      for (int o = 0; o <= kFields; ++o)
        offset[o] += static_cast<long long>(at) * call.more_stride[o][axis];
    }
  }

  // The row of the sums of class c; −1: none.
  FL_DEVICE int row_of(int c) const {
    return has_regions_by_class(call) && voxel.inside ? region(c) : row;
  }

  FL_DEVICE int region(int c) const {
    const char* from = call.more[0] + offset[0] + c * call.more_channel_stride[0];
    long long found;
    switch (CONST(regions_type)) {
      case kU8:
        found = load_one<unsigned char>(from);
        break;
      case kI8:
        found = load_one<signed char>(from);
        break;
      case kU16:
        found = load_one<unsigned short>(from);
        break;
      case kI16:
        found = load_one<short>(from);
        break;
      case kU32:
        found = load_one<unsigned>(from);
        break;
      case kI32:
        found = load_one<int>(from);
        break;
      default:  // uint64 numbers beyond int64 become negative
        found = load_one<long long>(from);
    }
    return found >= 0 && found < call.rows ? int(found) : -1;
  }

  FL_DEVICE bool counts() const { return voxel.m[0] != T(0); }

  // A field's number for class c; 0 for an ignored voxel.
  FL_DEVICE T load_field(int f, int c) const {
    T x[1] = {T(0)};
    if (voxel.inside && counts())
      load_numbers(call.more[1 + f] + offset[1 + f] + c * call.more_channel_stride[1 + f], 0,
                   CONST(field_type[f]), false, x);
    return x[0];
  }
  FL_DEVICE T field(int f, int c) const {
    if (CONST(field_kind[f]) == kOfVoxel) return number[f];
    if (CONST(field_kind[f]) == kOfLabels) return T(counts() && number[f] == T(c) ? 1 : 0);
    return load_field(f, c);
  }

  FL_DEVICE char* at_class(int operand, int c) const {
    return call.data[operand] + voxel.offset[operand] + c * call.channel_stride[operand];
  }
  FL_DEVICE T raw_logit(int c) const { return as_number(load_one<In>(at_class(kLogits, c))); }
  FL_DEVICE T logit(int c) const { return voxel.inside && counts() ? raw_logit(c) : T(0); }
  FL_DEVICE T target(int c) const {
    if (!CONST(dense)) return T(counts() && voxel.y[0] == c ? 1 : 0);
    T g[1] = {T(0)};
    if (voxel.inside && counts())
      load_numbers(at_class(kTarget, c), 0, CONST(target_type), false, g);
    return g[0];
  }

  // m · weight · field of a sum.
  FL_DEVICE T weight(int s, int c, T g) const {
    T w = voxel.m[0];
    switch (Weight(CONST(sum_weight[s]))) {
      case Weight::one:
        break;
      case Weight::target:
        w *= g;
        break;
      case Weight::rest:
        w *= T(1) - g;
        break;
      case Weight::target_squared:
        w *= g * g;
    }
    if (CONST(sum_field[s]) < 0) return w;
    T number = T(0);
#pragma unroll
    for (int f = 0; f < kFields; ++f)
      if (f < CONST(fields) && f == CONST(sum_field[s])) number = field(f, c);
    return Careful::product(w, number);
  }
};

// Softmax of a voxel, as derived at the top of this file.
template <class T>
struct Softmax {
  T largest, second, others;
  int top;
  T rest, inverse, log_sum, log_rest;

  template <class In>
  FL_DEVICE explicit Softmax(const Spot<In>& spot) {
    const GeneralCall& call = spot.call;
    largest = spot.logit(0);
    second = -infinity<T>();
    others = T(0);
    top = 0;
#pragma unroll 1
    for (int c = 1; c < CONST(classes); ++c) {
      T x = spot.logit(c), joins = larger_of(x, c);
      // `joins` enters the others, perhaps as their largest: o is then rescaled.
      bool more = joins > second;
      T e = exact_exponential(more ? gap_below(second, joins) : gap_below(joins, second));
      others = more ? others * e + T(1) : others + e;
      second = more ? joins : second;
    }
    T apart = gap_below(second, largest);
    rest = others * exact_exponential(apart);
    inverse = inverse_of(T(1) + rest);
    log_sum = log_one_plus(rest);
    log_rest = logarithm(others) + apart;
  }

  // Makes x the largest if it is, and returns the smaller of the two.
  FL_DEVICE T larger_of(T x, int c) {
    if (!(x > largest)) return x;
    T before = largest;
    largest = x;
    top = c;
    return before;
  }

  FL_DEVICE Probability<T> of(T x, int c) const {
    Probability<T> v;
    T gap = -gap_below(x, largest), e = exact_exponential(-gap);
    v.p = e * inverse;
    v.q = (c == top ? rest : (rest + T(1)) - e) * inverse;
    v.loss = gap + log_sum;
    v.loss_rest = c == top && v.p >= T(0.5) ? log_sum - log_rest : -exact_log_one_plus(-v.p);
    return v;
  }
};

template <class T>
FL_DEVICE Probability<T> sigmoid_of(T x) {
  T e = exact_exponential(-size_of(x)), big = inverse_of(e + T(1)), little = e * big;
  T l = log_one_plus_small(e);
  Probability<T> v;
  v.p = x > T(0) ? big : little;
  v.q = x > T(0) ? little : big;
  v.loss = larger(-x, T(0)) + l;  // for NaN, l is NaN
  v.loss_rest = larger(x, T(0)) + l;
  return v;
}

template <class T>
FL_DEVICE Probability<T> given(T x) {
  return {x, T(1) - x, -logarithm(x), -exact_log_one_plus(-x), T(0)};
}

// Calls with(c, logit, Probability) for every class of a voxel.
template <class In, class With>
FL_DEVICE void for_classes(const Spot<In>& spot, const With& with) {
  using T = typename ComputedIn<In>::type;
  const GeneralCall& call = spot.call;
  if (CONST(activation) == kSoftmax) {
    const Softmax<T> whole(spot);
#pragma unroll 1
    for (int c = 0; c < CONST(classes); ++c) {
      T x = spot.logit(c);
      with(c, x, whole.of(x, c));
    }
  } else {
#pragma unroll 1
    for (int c = 0; c < CONST(classes); ++c) {
      T x = spot.logit(c);
      with(c, x, CONST(activation) == kSigmoid ? sigmoid_of(x) : given(x));
    }
  }
}

// m · weight · field · function(p) of a sum.
template <class In, class T>
FL_DEVICE T summand(const Spot<In>& spot, int s, int c, T g, Probability<T> v) {
  const GeneralCall& call = spot.call;
  T w = spot.weight(s, c, g), value = T(0);
  v.g = g;
  with_function(Function(CONST(sum_function[s])), [&](auto function) {
    value = function.template value<Careful>(v, T(CONST(parameter[s])));
  });
  return Careful::product(w, value);
}

// The value of a map of kind "voxel" or "class" for one class; by(s): the coefficient of a sum.
template <class In, class T, class By>
FL_DEVICE T mapped_by(const Spot<In>& spot, int c, T g, const Probability<T>& v, const By& by) {
  const GeneralCall& call = spot.call;
  T sum = T(0);
#pragma unroll
  for (int s = 0; s < kSums; ++s)
    if (is_there(call, s)) sum += Careful::product(by(s), summand(spot, s, c, g, v));
  return sum;
}
template <class In, class T>
FL_DEVICE T mapped(const Spot<In>& spot, int c, T g, const Probability<T>& v) {
  const GeneralCall& call = spot.call;
  return mapped_by(spot, c, g, v,
                   [&](int s) { return T(call.map_coefficients[s * CONST(classes) + c]); });
}

template <class In, class T>
FL_DEVICE void store_map(const Spot<In>& spot, int c, T value) {
  // Faults in the data become NaN.
  *reinterpret_cast<T*>(spot.at_class(kOut, c)) =
      spot.voxel.faults ? T(__uint_as_float(0x7fc00000u)) : value;
}

// The voxels of a block.
struct Part {
  int sample, number, thread, lane, warp, threads;
  Index first, last;

  FL_DEVICE Part(const GeneralCall& call, bool backwards) {
    int index = backwards ? int(gridDim.x) - 1 - int(blockIdx.x) : int(blockIdx.x);
    sample = index / call.blocks;
    number = index - sample * call.blocks;
    thread = int(threadIdx.x);
    lane = thread % kLanes;
    warp = thread / kLanes;
    threads = CONST(warps) * kLanes;
    first = Index(number) * Index(call.chunk);
    last = Index(call.voxels) - first > Index(call.chunk) ? first + Index(call.chunk)
                                                          : Index(call.voxels);
  }
};

// --- Reduce
// ---------------------------------------------------------------------------------------

__device__ constexpr int power_of_two_from(int count) {
  int power = 1;
  while (power < count && power < kLanes) power *= 2;
  return power;
}

// Sums N numbers, a power of two, over groups of lanes: after the last step the lanes from i · 32 /
// N on hold partial sums of the i-th number, at the front. In each step lanes exchange half their
// numbers.
template <int Count, class T, int N>
FL_DEVICE void halve(T (&numbers)[N], int lane) {
  if constexpr (Count > 1) {
    constexpr int kHalf = Count / 2, kStep = kLanes * Count / N / 2;
    bool upper = lane & kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      T mine = upper ? numbers[i + kHalf] : numbers[i];
      T other = upper ? numbers[i] : numbers[i + kHalf];
      numbers[i] = mine + __shfl_xor_sync(kAllLanes, other, kStep);
    }
    halve<kHalf>(numbers, lane);
  }
}

// Calls with(row, mine) for the rows of a warp's voxels, of which `mine` are in that row; a row of
// −1: none. All lanes must call.
template <class With>
FL_DEVICE void for_rows(const GeneralCall& call, int row, const With& with) {
  if (!has_regions(call)) return with(0, row >= 0);
  // Voxels of a region are adjacent: usually there is one region per warp.
  unsigned left = __ballot_sync(kAllLanes, row >= 0);
  while (left) {
    int one = __shfl_sync(kAllLanes, row, __ffs(int(left)) - 1);
    bool mine = row == one;
    left &= ~__ballot_sync(kAllLanes, mine);
    with(one, mine);
  }
}

// Adds a voxel to an entry of a tally.
FL_DEVICE void tally_one(unsigned long long* entry, bool weighted, unsigned long long weight,
                         int rest) {
  if (!weighted) {
    atomicAdd(entry, (1ull << fastloss::kCountShift) + static_cast<unsigned long long>(rest));
    return;
  }
  atomicAdd(entry, weight);
  atomicAdd(entry + 1, weight * static_cast<unsigned long long>(rest));
}

// Counts the errors of a warp's voxels of class c. All lanes must call, with voxels of one part.
// Integers add to the same bits in any order.
template <class In, class T>
FL_DEVICE void tally(const Spot<In>& spot, const Part& part, int c, T x, T g,
                     const Probability<T>& v, double scale) {
  const GeneralCall& call = spot.call;
  const bool weighted = CONST(weight_type) != kNoType;
  const bool counts = spot.voxel.inside && spot.voxel.m[0] > T(0);
  const int each = call.batch * CONST(classes);
  size_t first =
      size_t(spot.voxel.first >> call.part_bits) * size_t(tally_places(CONST(histograms)));
  unsigned long long weight = 0;
  if (weighted && counts)
    weight = static_cast<unsigned long long>(double(spot.voxel.m[0]) * scale + 0.5);
#pragma unroll
  for (int number = 0; number < fastloss::kMaxHistograms; ++number) {
    const ErrorKind kind = ErrorKind(number);
    if (!has_kind(CONST(histograms), kind)) continue;
    const int bins = fastloss::bins_of(kind);
    const Binned bin = bin_of(kind, v.p, v.q, x, g);
    const auto entry = [&](int place) {
      const size_t at = (first + size_t(place)) * size_t(each);
      return call.error_tallies +
             (at + size_t(part.sample * CONST(classes) + c)) * (weighted ? 2 : 1);
    };
    // Most voxels have no error at all where a network is nearly right. They are added once per
    // warp, as additions to one address wait for each other. The others are spread over 64 bins of
    // an octave and more: the L2 cache, which takes an addition per voxel and class, is expected to
    // bound the pass on an H100, not the memory.
#pragma unroll
    for (int none = 0; none <= bins; none += bins) {
      const unsigned alike = __ballot_sync(kAllLanes, counts && bin.place == none);
      if (!alike) continue;
      if (weighted) {
        const unsigned long long sum = warp_sum(counts && bin.place == none ? weight : 0ull);
        if (part.lane == 0) atomicAdd(entry(none), sum);
      } else if (part.lane == 0) {
        atomicAdd(entry(none), static_cast<unsigned long long>(__popc(alike))
                                   << fastloss::kCountShift);
      }
    }
    if (counts && bin.place != 0 && bin.place != bins)
      tally_one(entry(bin.place), weighted, weight, bin.rest);
    first += size_t(2 * bins);
  }
}

// A warp's accumulators: (rows, S · C + 1), a row's voxel weights last, then the number of faults.
template <class In>
struct Accumulators {
  using T = typename ComputedIn<In>::type;
  static constexpr int kAtOnce = power_of_two_from(kSums);
  const GeneralCall& call;
  const Part& part;
  double* shared;
  double* to;
  double scale;  // of voxel weights in tallies

  FL_DEVICE int row_size() const { return CONST(slots) * CONST(classes) + 1; }
  FL_DEVICE int width() const { return call.rows * row_size() + 1; }

  FL_DEVICE Accumulators(const GeneralCall& call, const Part& part, void* memory)
      : call(call), part(part), shared(static_cast<double*>(memory)) {
    to = CONST(global_sums) ? partial() : shared + part.warp * width();
    for (int i = part.lane; i < width(); i += kLanes) to[i] = 0;
    scale = CONST(histograms) && CONST(weight_type) != kNoType ? weight_scale(*call.largest_weight)
                                                               : 1.0;
    __syncwarp();
  }

  FL_DEVICE double* partial() const {
    return static_cast<double*>(call.partial) + size_t(blockIdx.x) * size_t(width());
  }

  // Adds the voxels of a warp. All lanes must call.
  FL_DEVICE void add(const Spot<In>& spot, T& map) {
    for_classes(spot, [&](int c, T x, const Probability<T>& v) {
      T g = spot.target(c);
      if (CONST(histograms)) tally(spot, part, c, x, g, v, scale);
      for_rows(call, spot.row_of(c),
               [&](int row, bool mine) { add_class(spot, row, mine, c, g, v); });
      if (CONST(map_kind) == kVoxelMap && spot.row >= 0) map += mapped(spot, c, g, v);
    });
    for_rows(call, spot.row_of(0), [&](int row, bool mine) {
      T m = warp_sum(mine ? spot.voxel.m[0] : T(0));
      if (part.lane == 0) to[size_t(row + 1) * row_size() - 1] += double(m);
    });
  }

  // Adds the voxels of a warp that are `mine`, all in one row, to the sums of class c.
  FL_DEVICE void add_class(const Spot<In>& spot, int row, bool mine, int c, T g,
                           const Probability<T>& v) {
    double* here = to + size_t(row) * row_size();
#pragma unroll
    for (int first = 0; first < kSums; first += kAtOnce) {
      T numbers[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        int s = first + i;
        numbers[i] = mine && s < kSums && is_there(call, s < kSums ? s : 0)
                         ? summand(spot, s < kSums ? s : 0, c, g, v)
                         : T(0);
      }
      halve<kAtOnce>(numbers, part.lane);
#pragma unroll
      for (int step = kLanes / kAtOnce / 2; step; step /= 2)
        numbers[0] += __shfl_xor_sync(kAllLanes, numbers[0], step);
      constexpr int kEach = kLanes / kAtOnce;
      int s = first + part.lane / kEach;
      if (part.lane % kEach == 0 && s < CONST(slots))
        here[s * CONST(classes) + c] += double(numbers[0]);
    }
  }

  FL_DEVICE void add_faults(int faults) {
    int bad = __popc(__ballot_sync(kAllLanes, faults != 0));
    if (part.lane == 0 && bad) to[width() - 1] += double(bad);
  }

  // Writes the sums of the block, adding the warps in order.
  FL_DEVICE void write_partial() const {
    if (CONST(global_sums)) return;
    __syncthreads();
    double* all = partial();
    for (int i = part.thread; i < width(); i += part.threads) {
      double sum = shared[i];
      for (int warp = 1; warp < CONST(warps); ++warp) sum += shared[warp * width() + i];
      all[i] = sum;
    }
  }
};

template <class In>
FL_DEVICE void general_reduce(const GeneralCall& call) {
  using T = typename ComputedIn<In>::type;
  FL_DYNAMIC_SHARED(shared);
  const Part part(call, false);
  Accumulators<In> sums(call, part, shared);
  for (Index start = part.first + Index(part.warp * kLanes); start < part.last;
       start += Index(part.threads)) {
    Spot<In> spot(call, part.sample, start + Index(part.lane), part.last);
    sums.add_faults(spot.voxel.faults);
    T map = T(0);
    sums.add(spot, map);
    if (CONST(map_kind) == kVoxelMap && spot.voxel.inside) store_map(spot, 0, map);
  }
  sums.write_partial();
}

// The largest voxel weight of a call, by which weights become integers.
template <class In>
FL_DEVICE void find_largest_weight(const GeneralCall& call) {
  using T = typename ComputedIn<In>::type;
  const Part part(call, false);
  T largest = T(0);
  for (Index start = part.first; start < part.last; start += Index(part.threads)) {
    Voxels<T, 1> voxel;
    move_to(call, part.sample, start + Index(part.thread), part.last, voxel);
    largest = larger(largest, voxel.m[0]);
  }
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2)
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, step));
  if (part.lane == 0 && largest > T(0))
    atomicMax(call.largest_weight,
              static_cast<unsigned long long>(__double_as_longlong(double(largest))));
}

FL_DEVICE void general_finish(const GeneralCall& call) {
  int weight = CONST(slots) * CONST(classes), size = weight + 1;
  finish_numbers<double>(call, call.rows * size, [&](int sample, int i, double sum) {
    size_t row = size_t(i / size), rows = size_t(call.rows);
    int of_row = i % size;
    if (of_row == weight) {
      call.voxel_sums[sample * rows + row] = sum;
    } else {
      int slot = of_row / CONST(classes), c = of_row - slot * CONST(classes);
      call.sums[((size_t(slot) * call.batch + sample) * rows + row) * CONST(classes) + c] = sum;
    }
  });
}

// --- Apply
// ----------------------------------------------------------------------------------------

// The derivatives by the sums of a sample.
template <class T>
struct Derivatives {
  const GeneralCall& call;
  T* table;  // (S, C), or in global memory:
  const double* global;
  double scale;

  FL_DEVICE Derivatives(const GeneralCall& call, const Part& part, void* memory)
      : call(call), table(static_cast<T*>(memory)) {
    scale = call.scale;
    if (CONST(upstream_type) == kF32) scale *= double(*static_cast<const float*>(call.upstream));
    if (CONST(upstream_type) == kF64) scale *= *static_cast<const double*>(call.upstream);
    global = call.coefficients + static_cast<long long>(part.sample) * call.rows * call.row_stride;
    if (CONST(global_table)) return;
    for (int i = part.thread; i < CONST(slots) * CONST(classes); i += part.threads) {
      int slot = i / CONST(classes);
      table[i] = T(global[slot * call.slot_stride + (i - slot * CONST(classes))] * scale);
    }
    __syncthreads();
  }

  FL_DEVICE T operator()(int slot, int row, int c) const {
    if (!CONST(global_table)) return table[slot * CONST(classes) + c];
    return T(global[slot * call.slot_stride + row * call.row_stride + c] * scale);
  }

  // By a sum of a bin: voxels of adjacent threads read far apart, from the L2 cache mostly.
  FL_DEVICE T of_bin(int slot, int c) const {
    return T(global[slot * call.slot_stride + c] * scale);
  }
};

// The derivatives by p, by log p and by log(1 − p) of a class.
template <class T>
struct Slopes {
  T p, log_p, log_q;
};

// Adds the derivatives of errors, given those by Σ v of the bins that they are in.
template <class In, class T>
FL_DEVICE void add_errors(const Spot<In>& spot, const Derivatives<T>& by, int c, T x,
                          const Probability<T>& v, Slopes<T>& sum) {
  const GeneralCall& call = spot.call;
  int slot = CONST(slots);
#pragma unroll
  for (int number = 0; number < fastloss::kMaxHistograms; ++number) {
    const ErrorKind kind = ErrorKind(number);
    if (!has_kind(CONST(histograms), kind)) continue;
    const int bins = fastloss::bins_of(kind);
    const Binned bin = bin_of(kind, v.p, v.q, x, v.g);
    const T change = spot.voxel.m[0] * T(bin.slope) * by.of_bin(slot + 2 * bins + bin.place, c);
    if (kind == ErrorKind::error) {
      sum.p += change;
    } else {  // x = log p − log q
      sum.log_p += change;
      sum.log_q -= change;
    }
    slot += 4 * bins;
  }
}

template <class In, class T>
FL_DEVICE Slopes<T> slopes_of(const Spot<In>& spot, const Derivatives<T>& by, int c, T x,
                              Probability<T> v) {
  const GeneralCall& call = spot.call;
  Slopes<T> sum = {T(0), T(0), T(0)};
  T g = v.g = spot.target(c);
  const int row = spot.row_of(c), there = row < 0 ? 0 : row;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    if (!is_there(call, s)) continue;
    T w = by(s, there, c) * spot.weight(s, c, g);
    if (has_regions_by_class(call) && row < 0) w = T(0);
    with_function(Function(CONST(sum_function[s])), [&](auto function) {
      T slope = Careful::product(w, function.template slope<Careful>(v, T(CONST(parameter[s]))));
      if (function.by == By::p) sum.p += slope;
      if (function.by == By::log_p) sum.log_p += slope;
      if (function.by == By::log_q) sum.log_q += slope;
    });
  }
  if (CONST(histograms) && spot.counts()) add_errors(spot, by, c, x, v, sum);
  return sum;
}

template <class In, class T>
FL_DEVICE void store_gradient(const Spot<In>& spot, int c, T gradient) {
  *reinterpret_cast<In*>(spot.at_class(kOut, c)) = from_number<In>(gradient);
}

template <class In, class T>
FL_DEVICE void apply_softmax(const Spot<In>& spot, const Derivatives<T>& by) {
  const GeneralCall& call = spot.call;
  const Softmax<T> whole(spot);
  const bool rests = has_rests(call);
  // For the top class, and the sums A and B over the others.
  T p_top = T(0), q_top = T(0), a_top = T(0), b_top = T(0), a_others = T(0), b_others = T(0);
#pragma unroll 1
  for (int c = 0; c < CONST(classes); ++c) {
    T x = spot.logit(c);
    Probability<T> v = whole.of(x, c);
    Slopes<T> slope = slopes_of(spot, by, c, x, v);
    T a = slope.p * v.p + slope.log_p;
    if (c == whole.top) {
      p_top = v.p;
      q_top = v.q;
      a_top = a;
      b_top = slope.log_q;
    } else {
      a_others += a;
      if (rests) b_others += slope.log_q * (v.p / v.q);
    }
  }
  T shared = b_others - a_others, of_top = b_top * p_top;
#pragma unroll 1
  for (int c = 0; c < CONST(classes); ++c) {
    T gradient;
    if (c == whole.top) {
      gradient = a_top * q_top + p_top * shared;
      if (rests) gradient -= of_top;
    } else {
      T x = spot.logit(c);
      Probability<T> v = whole.of(x, c);
      Slopes<T> slope = slopes_of(spot, by, c, x, v);
      T factor = shared - a_top;
      if (rests) factor -= slope.log_q / v.q;
      gradient = slope.p * v.p + slope.log_p + v.p * factor;
      if (rests)
        gradient += of_top * (exact_exponential(gap_below(x, whole.second)) / whole.others);
    }
    store_gradient(spot, c, gradient);
  }
}

template <class In>
FL_DEVICE void general_apply(const GeneralCall& call) {
  using T = typename ComputedIn<In>::type;
  FL_DYNAMIC_SHARED(shared);
  // In reverse order: the data that the reduce pass read last is still in the cache.
  const Part part(call, true);
  const Derivatives<T> by(call, part, shared);
  for (Index start = part.first; start < part.last; start += Index(part.threads)) {
    Spot<In> spot(call, part.sample, start + Index(part.thread), part.last);
    if (!spot.voxel.inside) continue;
    if (CONST(activation) == kSoftmax) {
      apply_softmax(spot, by);
      continue;
    }
    for_classes(spot, [&](int c, T x, const Probability<T>& v) {
      Slopes<T> slope = slopes_of(spot, by, c, x, v);
      T gradient;
      if (CONST(activation) == kSigmoid) {
        gradient = slope.p * v.p * v.q + slope.log_p * v.q - slope.log_q * v.p;
      } else {
        gradient = slope.p + Careful::unless(slope.log_p, slope.log_p / v.p) -
                   Careful::unless(slope.log_q, slope.log_q / v.q);
      }
      store_gradient(spot, c, gradient);
    });
  }
}

// --- Maps
// -----------------------------------------------------------------------------------------

// The class of the largest logit, the first of equal ones or the first NaN; for one class, whether
// p > ½.
template <class In>
FL_DEVICE int likeliest(const Spot<In>& spot) {
  using T = typename ComputedIn<In>::type;
  const GeneralCall& call = spot.call;
  T most = spot.raw_logit(0);
  if (CONST(classes) == 1)
    return CONST(activation) == kSigmoid ? most > T(0)
           : CONST(activation) == kNone  ? most > T(0.5)
                                         : most == most;
  int found = 0;
#pragma unroll 1
  for (int c = 1; c < CONST(classes); ++c) {
    T x = spot.raw_logit(c);
    if (x > most || (x != x && most == most)) {
      most = x;
      found = c;
    }
  }
  return found;
}

// A map of kind "class" of coefficients of every row.
template <class In>
FL_DEVICE void map_by_row(const GeneralCall& call) {
  using T = typename ComputedIn<In>::type;
  const Part part(call, false);
  const Derivatives<T> by(call, part, nullptr);
  for (Index start = part.first; start < part.last; start += Index(part.threads)) {
    Spot<In> spot(call, part.sample, start + Index(part.thread), part.last);
    if (!spot.voxel.inside) continue;
    for_classes(spot, [&](int c, T, const Probability<T>& v) {
      const int row = spot.row_of(c);
      const T found =
          mapped_by(spot, c, spot.target(c), v, [&](int s) { return by(s, row < 0 ? 0 : row, c); });
      store_map(spot, c, row < 0 ? T(0) : found);
    });
  }
}

template <class In>
FL_DEVICE void general_map(const GeneralCall& call) {
  using T = typename ComputedIn<In>::type;
  if (CONST(by_row)) return map_by_row<In>(call);
  const Part part(call, false);
  for (Index start = part.first; start < part.last; start += Index(part.threads)) {
    Spot<In> spot(call, part.sample, start + Index(part.thread), part.last);
    if (!spot.voxel.inside) continue;
    if (CONST(map_kind) == kLabelMap) {
      int found = likeliest(spot);
      char* to = spot.at_class(kOut, 0);
      if (CONST(map_type) == kU8)
        *reinterpret_cast<unsigned char*>(to) = static_cast<unsigned char>(found);
      else if (CONST(map_type) == kI32) *reinterpret_cast<int*>(to) = found;
      else *reinterpret_cast<long long*>(to) = found;
      continue;
    }
    T sum = T(0);
    for_classes(spot, [&](int c, T, const Probability<T>& v) {
      if (CONST(map_kind) == kMaskMap) {
        *reinterpret_cast<unsigned char*>(spot.at_class(kOut, c)) =
            v.p > T(0.5) && spot.voxel.m[0] > T(0);
        return;
      }
      T g = spot.target(c);
      if (CONST(map_kind) == kVoxelMap) sum += mapped(spot, c, g, v);
      if (CONST(map_kind) == kClassMap) store_map(spot, c, mapped(spot, c, g, v));
      if (CONST(map_kind) == kErrorMap) store_map(spot, c, spot.voxel.m[0] * size_of(g - v.p));
    });
    if (CONST(map_kind) == kVoxelMap) store_map(spot, 0, sum);
  }
}
