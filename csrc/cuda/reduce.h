// The reduce pass: the sums of every block over its voxels.
#pragma once

#include "finish.h"
#include "softmax.h"
#include "two_classes.h"

// The number of tiles between flushes to float64: a float32 sum has at most 64 summands per thread
// (128 for V = 8). Summing n numbers ≥ 0 in float32 adds a relative error of at most about n 2^−24.
template <int V>
__device__ constexpr int flush_every() {
  return V < 4 ? 64 / V : 16;
}

__device__ constexpr int whole_warps(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Sums N numbers, a multiple of 32, over the lanes of a warp. Lane i gets the sums from i · N / 32
// on, at the front of `numbers`. In each step lanes a distance apart exchange one half of their
// numbers and add the other: N / 2 + N / 4 + … shuffles instead of 5 N.
template <int Count, class T, int N>
FL_DEVICE void warp_sums(T (&numbers)[N], int lane) {
  constexpr int kHalf = Count / 2, kStep = kLanes * Count / N / 2;
  if constexpr (kStep >= 1) {
    bool upper = lane & kStep;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      T mine = upper ? numbers[i + kHalf] : numbers[i];
      T other = upper ? numbers[i] : numbers[i + kHalf];
      numbers[i] = mine + __shfl_xor_sync(kAllLanes, other, kStep);
    }
    warp_sums<kHalf>(numbers, lane);
  }
}

// The slots of the sums of weight g or g², which only the label's class adds to; −1: absent.
#define FL_OF_GAMMA(i) (i < CONST(gammas) ? CONST(slot_focal[i]) : -1)
#define FL_OWN_SLOTS              \
  {CONST(slot_reference),         \
   CONST(slot_overlap),           \
   CONST(slot_reference_squared), \
   CONST(slot_cross_entropy),     \
   FL_OF_GAMMA(0),                \
   FL_OF_GAMMA(1),                \
   FL_OF_GAMMA(2),                \
   FL_OF_GAMMA(3),                \
   FL_OF_GAMMA(4),                \
   FL_OF_GAMMA(5),                \
   FL_OF_GAMMA(6),                \
   FL_OF_GAMMA(7)}

// The accumulators of a thread and of its block.
//
// A thread accumulates in registers, or each value is summed over the warp and added to the block's
// sums at once. Every sum of a group belongs to one of its warps, and only one lane adds to it: no
// atomics, and a fixed order.
template <class In, int V, int K>
struct Sums {
  using T = typename ComputedIn<In>::type;
#ifdef FL_SPECIAL
  static constexpr int kKept =
      FL_keep_sums && FL_kept_slots ? whole_warps(FL_kept_slots * FL_per_thread) : kLanes;
#else
  static constexpr int kKept = 4 * kLanes;  // the most that any plan keeps
#endif

  const Block<In, V>& block;
  const Call& call;
  double* to;     // (S · C + 2)
  T kept[kKept];  // (`kept_slots`, classes of a thread), and zeros
  T weight;
  int faults;
  // Two classes: P = Π (1 + e) − 1 over the voxels of each label, as Σ log(1 + e) = log(1 + P). The
  // recurrence P ← P (1 + e) + e is exact where all e are small.
  T product[2];

  FL_DEVICE explicit Sums(const Block<In, V>& block) : block(block), call(block.call) {
    if (CONST(global_sums)) {
      to = static_cast<double*>(call.partial) +
           (size_t(block.sample) * call.blocks + block.number) * size_t(block.sum_count());
      for (int i = block.thread; i < block.sum_count(); i += threads_of(call)) to[i] = 0;
    } else {
      to = block.sums + block.group * block.sum_count();
      for (int i = block.thread; i < CONST(groups) * block.sum_count(); i += threads_of(call))
        block.sums[i] = 0;
    }
    for (int i = 0; i < CONST(tallies) * CONST(classes); ++i)
      block.tally[i * threads_of(call) + block.thread] = T(0);
    __syncthreads();
    weight = T(0);
    faults = 0;
    clear();
  }

  // The register index of a slot's sums, and its inverse. With `by_label` there are at most three.
  FL_DEVICE int place_of(int slot) const {
    if (!CONST(by_label)) return slot;
    if (slot == CONST(slot_predicted)) return 0;
    if (slot == CONST(slot_predicted_squared)) return CONST(slot_predicted) >= 0 ? 1 : 0;
    return CONST(kept_slots) - 1;
  }
  FL_DEVICE int slot_at(int place) const {
    if (!CONST(by_label)) return place;
    if (place == CONST(kept_slots) - 1 && CONST(slot_uniform) >= 0) return CONST(slot_uniform);
    return place == 0 && CONST(slot_predicted) >= 0 ? CONST(slot_predicted)
                                                    : CONST(slot_predicted_squared);
  }

  FL_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = T(0);
    product[0] = product[1] = T(0);
  }

  // Adds log(1 + P) to the cross-entropy.
  FL_DEVICE void take_products() {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      add(CONST(slot_cross_entropy), 0, c, log_one_plus(product[c]));
      product[c] = T(0);
    }
  }

  // The sum of a slot and of this thread's k-th class, to add to and to pass to `take`.
  FL_DEVICE T start(int slot, int k) const {
    if (slot < 0 || !CONST(keep_sums)) return T(0);
    return kept[place_of(slot) * CONST(per_thread) + k];
  }

  // Stores a sum of one round. All lanes must call.
  FL_DEVICE void take(int slot, int round, int k, T value) {
    if (slot < 0) return;
    if (CONST(keep_sums)) {
      kept[place_of(slot) * CONST(per_thread) + k] = value;
    } else {
      value = warp_sum(value);
      int c = block.first_class(round) + k;
      if (block.lane == 0 && block.exists(round, k)) to[slot * CONST(classes) + c] += double(value);
    }
  }

  FL_DEVICE void add(int slot, int round, int k, T value) {
    take(slot, round, k, start(slot, k) + value);
  }

  // Adds values of voxels to the sums of their classes, in a list of slots; −1: no slot. All lanes
  // of the group's warps must call. Which labels a warp handles rotates with the tiles, as a tile
  // may have many labels, or mostly one.
  template <int N>
  FL_DEVICE void add_by_label(const int (&slots)[N], const int (&y)[V], const T (&values)[N][V],
                              int tile) {
    // Usually all voxels of a warp have one class.
    int one = __shfl_sync(kAllLanes, y[0], 0);
    bool alike = one >= 0;
#pragma unroll
    for (int j = 0; j < V; ++j) alike = alike && y[j] == one;
    if (FL_UNLIKELY(!__all_sync(kAllLanes, alike))) return add_one_by_one(slots, y, values, tile);
    if (!is_turn_of(one, tile)) return;
    T sum[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sum[n] = T(0);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[n] += values[n][j];
    }
    add_of_warp(slots, one, sum);
  }

  FL_DEVICE bool is_turn_of(int label, int tile) const {
    return (label + tile) % CONST(warps) == block.warp_in_group;
  }

  // The same, looping over the classes in the warp.
  template <int N>
  FL_DEVICE void add_one_by_one(const int (&slots)[N], const int (&y)[V], const T (&values)[N][V],
                                int tile) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      unsigned left = __ballot_sync(kAllLanes, y[j] >= 0 && is_turn_of(y[j], tile));
      while (left) {
        int label = __shfl_sync(kAllLanes, y[j], __ffs(int(left)) - 1);
        bool same = y[j] == label;
        left &= ~__ballot_sync(kAllLanes, same);
        T sum[N];
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] = same ? values[n][j] : T(0);
        add_of_warp(slots, label, sum);
      }
    }
  }

  // Adds the sums over a warp's lanes to those of a class, four at a time: two steps distribute the
  // four numbers over the lanes, and three more sum each over eight lanes.
  template <int N>
  FL_DEVICE void add_of_warp(const int (&slots)[N], int label, const T (&values)[N]) {
    static_assert(N % 4 == 0, "by fours");
    const bool upper = block.lane & 16, right = block.lane & 8;
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      if (slots[n] < 0 && slots[n + 1] < 0 && slots[n + 2] < 0 && slots[n + 3] < 0) continue;
      T first = upper ? values[n + 2] : values[n], second = upper ? values[n + 3] : values[n + 1];
      first += __shfl_xor_sync(kAllLanes, upper ? values[n] : values[n + 2], 16);
      second += __shfl_xor_sync(kAllLanes, upper ? values[n + 1] : values[n + 3], 16);
      T sum = (right ? second : first) + __shfl_xor_sync(kAllLanes, right ? first : second, 8);
#pragma unroll
      for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      const int slot =
          upper ? (right ? slots[n + 3] : slots[n + 2]) : (right ? slots[n + 1] : slots[n]);
      if (block.lane % 8 == 0 && slot >= 0) to[slot * CONST(classes) + label] += double(sum);
    }
  }

  // The same with accumulators per thread and class, one voxel after the other, which costs less
  // than looping over the classes.
  template <int N>
  FL_DEVICE void tally(const int (&slots)[N], const int (&y)[V], const T (&values)[N][V]) {
    bool alike = true;
#pragma unroll
    for (int j = 1; j < V; ++j) alike = alike && y[j] == y[0];
    if (alike) {
      T sum[N];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sum[n] = T(0);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[n] += values[n][j];
      }
      tally_voxel(slots, y[0], sum);
      return;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T value[N];
#pragma unroll
      for (int n = 0; n < N; ++n) value[n] = values[n][j];
      tally_voxel(slots, y[j], value);
    }
  }

  template <int N>
  FL_DEVICE void tally_voxel(const int (&slots)[N], int y, const T (&values)[N]) {
    if (y < 0) return;
    T* at = block.tally + y * threads_of(call) + block.thread;
    const int step = CONST(classes) * threads_of(call);
    // All loads come before all stores, as the compiler must assume that the addresses alias.
    T sum[N];
    int place = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (slots[n] >= 0) sum[n] = at[place++ * step] + values[n];
    place = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (slots[n] >= 0) at[place++ * step] = sum[n];
  }

  // Adds the tallies of a warp's threads to the sums of each class, and clears them. Lanes start at
  // different threads to avoid bank conflicts.
  template <int N>
  FL_DEVICE void take_tallies(const int (&slots)[N]) {
    __syncwarp();
    int place = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (slots[n] < 0) continue;
      for (int c = block.lane; c < CONST(classes); c += kLanes) {
        T* of_class =
            block.tally + (place * CONST(classes) + c) * threads_of(call) + block.warp * kLanes;
        T sum = T(0);
#pragma unroll 8
        for (int i = 0; i < kLanes; ++i) {
          T* at = of_class + (block.lane + i) % kLanes;
          sum += *at;
          *at = T(0);
        }
        to[slots[n] * CONST(classes) + c] += double(sum);
      }
      ++place;
    }
    __syncwarp();
  }

  FL_DEVICE void flush() {
    if (is_of_two_classes(call)) take_products();
    if (CONST(tallies)) {
      const int slots[4 + kMaxGammas] = FL_OWN_SLOTS;
      take_tallies(slots);
    }
    if (CONST(keep_sums)) {
      warp_sums<kKept>(kept, block.lane);
      constexpr int kEach = kKept / kLanes;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        int sum = block.lane * kEach + i, place = sum / CONST(per_thread);
        int k = sum - place * CONST(per_thread);
        if (place < CONST(kept_slots) && block.exists(0, k))
          to[slot_at(place) * CONST(classes) + block.first_class(0) + k] += double(kept[i]);
      }
      clear();
    }
    if (checks_numbers(call)) {
      // NaN marks a bad number, which only the warp that holds its class has seen.
      int bad_number = weight != weight;
      faults += CONST(warps) > 1 ? __syncthreads_or(bad_number) : bad_number;
    }
    // All warps of a group see the same voxels; only the first counts them.
    double sum = warp_sum(double(weight)), bad = warp_sum(double(faults));
    if (block.lane == 0 && block.warp_in_group == 0) {
      to[CONST(slots) * CONST(classes)] += sum;
      to[CONST(slots) * CONST(classes) + 1] += bad;
    }
    weight = T(0);
    faults = 0;
  }

  // Writes the block's sums, adding the groups in order; NaN after a fault.
  FL_DEVICE void finish() {
    flush();
    __syncthreads();
    const T nan = infinity<T>() - infinity<T>();
    const int of_faults = block.sum_count() - 1;
    if (CONST(global_sums)) {
      if (to[of_faults] > 0)
        for (int i = block.thread; i < of_faults; i += threads_of(call)) to[i] = double(nan);
      return;
    }
    bool bad = false;
    for (int group = 0; group < CONST(groups); ++group)
      bad = bad || block.sums[group * block.sum_count() + of_faults] > 0;
    if (CONST(narrow_sums)) write(static_cast<float*>(call.partial), bad);
    else write(static_cast<double*>(call.partial), bad);
  }

  template <class Number>
  FL_DEVICE void write(Number* partial, bool bad) const {
    partial += (size_t(block.sample) * call.blocks + block.number) * size_t(block.sum_count());
    const int of_faults = block.sum_count() - 1;
    for (int i = block.thread; i < block.sum_count(); i += threads_of(call)) {
      double sum = block.sums[i];
      for (int group = 1; group < CONST(groups); ++group)
        sum += block.sums[group * block.sum_count() + i];
      partial[i] = Number(bad && i < of_faults ? double(infinity<T>() - infinity<T>()) : sum);
    }
  }
};

// A tile of softmax with a label map. The label's part is computed once per voxel.
template <class In, int V, int K>
FL_DEVICE void reduce_labels(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                             Sums<In, V, K>& sums, int tile) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  const bool once = CONST(rounds) == 1;
  const bool logs = CONST(slot_cross_entropy) >= 0 || CONST(gammas) > 0 || CONST(with_losses);
  T x[K][V], factor[V], own_x[V];
  LabelPart<T> part[V];
  label_parts(block, v, x, part, factor, own_x, NoCoefficients<T>());

  T own_p[V], loss[V], q[V], inverse[V], log_sum[V], weight[V];
  int own_class[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    Label<T> own = label_of(call, part[j], own_x[j]);
    T m = v.m[j];
    own_class[j] = forget(call, v.y[j]);
    weight[j] = counts_all(call) ? T(1) : m;
    inverse[j] = v.inside ? own.inverse * factor[j] : T(0);
    own_p[j] = m * (own.own * own.inverse);
    q[j] = part[j].rest * own.inverse;
    loss[j] = logs ? m * label_loss(part[j], own) : T(0);
    log_sum[j] = CONST(slot_uniform) >= 0 ? logarithm(part[j].rest + own.own) : T(0);
    sums.weight += m;
  }
  if (CONST(with_losses) && v.inside && block.warp_in_group == 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T w = v.y[j] >= 0 ? T(call.loss_weights[v.y[j]]) : T(0);
      // Class weight 0 times an infinite loss is 0.
      T value = w == T(0) && loss[j] == infinity<T>() ? T(0) : w * loss[j];
      static_cast<T*>(call.losses)[block.sample * call.voxels + v.first + j] = value;
    }
  }
  if (CONST(by_label)) {
    const int slots[4 + kMaxGammas] = FL_OWN_SLOTS;
    T values[4 + kMaxGammas][V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      values[0][j] = values[2][j] = weight[j];
      values[1][j] = own_p[j];
      values[3][j] = loss[j];
#pragma unroll
      for (int i = 0; i < CONST(gammas); ++i)
        values[4 + i][j] = focal_value<Plain>(q[j], loss[j], T(CONST(gamma[i])));
    }
    if (CONST(tallies)) sums.tally(slots, v.y, values);
    else sums.add_by_label(slots, v.y, values, tile);
  }
  for (int round = 0; round < CONST(rounds); ++round) {
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      int c = block.first_class(round) + k;
      T predicted = sums.start(CONST(slot_predicted), k);
      T squared = sums.start(CONST(slot_predicted_squared), k);
      T uniform = sums.start(CONST(slot_uniform), k);
      T here = T(0), overlap = T(0), own = T(0), focal[kMaxGammas] = {};
      if (!CONST(by_label)) {
        here = sums.start(CONST(slot_reference), k);
        overlap = sums.start(CONST(slot_overlap), k);
        own = sums.start(CONST(slot_cross_entropy), k);
#pragma unroll
        for (int i = 0; i < CONST(gammas); ++i) focal[i] = sums.start(CONST(slot_focal[i]), k);
      }
      bool there = block.exists(round, k);
      T raw[V];
      if (there && (!once || CONST(slot_uniform) >= 0)) block.load_class(v, c, raw);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!there) continue;
        T e = once ? x[k][j] : power_of_two(scaled_below(raw[j], part[j].largest));
        T p = e * inverse[j], m = weight[j];
        predicted += m * p;
        if (CONST(slot_predicted_squared) >= 0) squared += m * (p * p);
        if (CONST(slot_uniform) >= 0) {
          T t = scaled_below(raw[j], part[j].largest);
          uniform += product(v.m[j], log_sum[j] - t * log_of_2<T>());
        }
        if (!CONST(by_label) && own_class[j] == c) {
          here += m;
          overlap += own_p[j];
          own += loss[j];
#pragma unroll
          for (int i = 0; i < CONST(gammas); ++i)
            focal[i] += focal_value<Plain>(q[j], loss[j], T(CONST(gamma[i])));
        }
      }
      sums.take(CONST(slot_predicted), round, k, predicted);
      sums.take(CONST(slot_predicted_squared), round, k, squared);
      sums.take(CONST(slot_uniform), round, k, uniform);
      if (CONST(by_label)) continue;
      sums.take(CONST(slot_reference), round, k, here);
      sums.take(CONST(slot_overlap), round, k, overlap);
      sums.take(CONST(slot_reference_squared), round, k, here);
      sums.take(CONST(slot_cross_entropy), round, k, own);
#pragma unroll
      for (int i = 0; i < CONST(gammas); ++i) sums.take(CONST(slot_focal[i]), round, k, focal[i]);
    }
  }
}

// Adds a thread's voxels to the sums of one class, in the order of Call's slots: those up to
// `uniform_rest`, then those of the focal exponents.
template <class In, int V, class T, int N>
FL_DEVICE void add_voxels(const Block<In, V>& block, const Voxels<T, V>& v, T (&x)[V],
                          const T (&g)[V], const Whole<T> (&whole)[V], bool logs, T (&sum)[N]) {
  const Call& call = block.call;
  const bool sigmoid = CONST(activation) == kSigmoid;
  if (sigmoid && logs) {
    // Infinite losses are added here, so that plain products suffice below.
    bool infinite = false;
#pragma unroll
    for (int j = 0; j < V; ++j) infinite |= size_of(x[j]) == infinity<T>();
    if (FL_UNLIKELY(infinite)) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!is_infinite(x[j])) continue;
        bool up = x[j] > T(0), counts = v.m[j] > T(0);
        T loss = counts && !up && g[j] != T(0) ? infinity<T>() : T(0);
        T loss_rest = counts && up && g[j] != T(1) ? infinity<T>() : T(0);
        sum[5] += loss;
        sum[6] += loss_rest;
        sum[7] += counts && !up ? infinity<T>() : T(0);
        sum[8] += counts && up ? infinity<T>() : T(0);
#pragma unroll
        for (int i = 0; i < CONST(gammas); ++i) {
          sum[kNamedSlots + i] += loss;
          sum[kNamedSlots + kMaxGammas + i] += loss_rest;
        }
        x[j] = up ? T(1e30) : T(-1e30);
      }
    }
  }
  auto times = [&](T a, T loss) { return sigmoid ? a * loss : product(a, loss); };
#pragma unroll
  for (int j = 0; j < V; ++j) {
    T m = counts_all(call) ? T(1) : v.m[j], y = g[j];
    Probability<T> f = activate(call, x[j], whole[j], logs);
    sum[0] += m * y;
    sum[1] += m * f.p * y;
    sum[2] += m * f.p;
    sum[3] += m * (f.p * f.p);
    sum[4] += m * (y * y);
    if (CONST(slot_cross_entropy) >= 0) sum[5] += times(m * y, f.loss);
    if (CONST(slot_cross_entropy_rest) >= 0) sum[6] += times(m * (T(1) - y), f.loss_rest);
    if (CONST(slot_uniform) >= 0) sum[7] += times(m, f.loss);
    if (CONST(slot_uniform_rest) >= 0) sum[8] += times(m, f.loss_rest);
#pragma unroll
    for (int i = 0; i < CONST(gammas); ++i) {
      T gamma = T(CONST(gamma[i]));
      sum[kNamedSlots + i] += times(m * y * power(f.q, gamma), f.loss);
      if (sigmoid)
        sum[kNamedSlots + kMaxGammas + i] += times(m * (T(1) - y) * power(f.p, gamma), f.loss_rest);
    }
  }
}

// A tile of dense targets, sigmoid, or given probabilities.
template <class In, int V, int K>
FL_DEVICE void reduce_dense(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                            Sums<In, V, K>& sums) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  const bool once = CONST(rounds) == 1, softmax = CONST(activation) == kSoftmax;
  const bool sigmoid = CONST(activation) == kSigmoid;
  const bool logs = CONST(slot_cross_entropy) >= 0 || CONST(slot_cross_entropy_rest) >= 0 ||
                    CONST(slot_uniform) >= 0 || CONST(slot_uniform_rest) >= 0 || CONST(gammas) > 0;
  T x[K][V];
  Whole<T> whole[V] = {};
  if (once || softmax) softmax_parts<In, V, K>(block, v, x, whole, logs);
#pragma unroll
  for (int j = 0; j < V; ++j) sums.weight += v.m[j];
  for (int round = 0; round < CONST(rounds); ++round) {
    const char* target = block.at_class(v, kTarget, block.first_class(round));
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k, target += call.channel_stride[kTarget]) {
      int c = block.first_class(round) + k;
      bool there = block.exists(round, k);
      T g[V];
      if (there) {
        if (!once) block.load_class(v, c, x[k]);
        // A fault is recorded as NaN in the weight, as a counter would take a register.
        if (block.load_target(v, c, target, g)) sums.weight = infinity<T>() - infinity<T>();
      }
      T sum[kMaxSlots] = {};
      if (there && v.inside) add_voxels<In, V>(block, v, x[k], g, whole, logs, sum);
      sums.add(CONST(slot_reference), round, k, sum[0]);
      sums.add(CONST(slot_overlap), round, k, sum[1]);
      sums.add(CONST(slot_predicted), round, k, sum[2]);
      sums.add(CONST(slot_predicted_squared), round, k, sum[3]);
      sums.add(CONST(slot_reference_squared), round, k, sum[4]);
      sums.add(CONST(slot_cross_entropy), round, k, sum[5]);
      sums.add(CONST(slot_cross_entropy_rest), round, k, sum[6]);
      sums.add(CONST(slot_uniform), round, k, sum[7]);
      sums.add(CONST(slot_uniform_rest), round, k, sum[8]);
#pragma unroll
      for (int i = 0; i < CONST(gammas); ++i) {
        sums.add(CONST(slot_focal[i]), round, k, sum[kNamedSlots + i]);
        if (sigmoid)
          sums.add(CONST(slot_focal_rest[i]), round, k, sum[kNamedSlots + kMaxGammas + i]);
      }
    }
  }
}

template <class In, int V, int K>
FL_DEVICE void reduce_block(const Call& call) {
  using T = typename ComputedIn<In>::type;
  Block<In, V> block(call, true, false);
  Sums<In, V, K> sums(block);
  int tiles = 0;
  if (CONST(staged)) block.begin_tiles();
  for (Index start = block.first; start < block.last; start += block.tile_voxels()) {
    if (CONST(staged)) block.next_tile(start, tiles);
    Voxels<T, V> voxels;
    move_to(call, block.sample, start + block.place_in_tile(), block.last, voxels);
    sums.faults += voxels.faults;
    if (is_of_two_classes(call)) {
      reduce_two_classes<In, V, K>(block, voxels, sums);
      // P < 2^64 after 64 factors 1 + e ≤ 2, far from overflow.
      if (FL_UNLIKELY(flush_every<V>() * V > 64 && (tiles + 1) % (64 / V) == 0))
        sums.take_products();
    } else if (CONST(path) == kLabels) reduce_labels<In, V, K>(block, voxels, sums, tiles);
    else reduce_dense<In, V, K>(block, voxels, sums);
    ++tiles;
    if (FL_UNLIKELY(tiles % flush_every<V>() == 0)) sums.flush();
    if (CONST(staged)) __syncthreads();
  }
  sums.finish();
}

// Adds the blocks' sums to those of the batch.
FL_DEVICE void finish_sums(const Call& call) {
  const int weight = CONST(slots) * CONST(classes);
  auto store = [&](int sample, int i, double sum) {
    if (i == weight) {
      call.voxel_sums[sample] = sum;
    } else {
      int slot = i / CONST(classes), c = i - slot * CONST(classes);
      call.sums[(size_t(slot) * call.batch + sample) * CONST(classes) + c] =
          slot == CONST(slot_top_k) ? 0.0 : sum;
    }
  };
  if (CONST(narrow_sums)) finish_numbers<float>(call, weight + 1, store);
  else finish_numbers<double>(call, weight + 1, store);
}
