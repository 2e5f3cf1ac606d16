// The reduce pass: the sums of every block over its voxels.
#pragma once

#include "softmax.h"
#include "voxel.h"

constexpr int kFlushEvery = 16;  // tiles: float32 sums stay short

// The sums that a thread forms, and where a block keeps them.
//
// Kept in registers, or summed over the warp and added to the block's at once. Every sum of a
// group belongs to one of its warps, and lane 0 alone adds to it: nothing is atomic, and the order
// never changes.
template <class In, int V, int K>
struct Sums {
  using T = typename ComputedIn<In>::type;
#ifdef FL_SPECIAL
  static constexpr int kKept = FL_keep_sums ? FL_slots : 1;
#else
  static constexpr int kKept = kMaxSlots;
#endif

  const Block<In, V>& block;
  const Call& call;
  double* to;  // (S · C + 2)
  T kept[kKept][K];
  T weight;
  int faults;

  FL_DEVICE explicit Sums(const Block<In, V>& block) : block(block), call(block.call) {
    if (CONST(global_sums)) {
      to = call.partial +
           (size_t(block.sample) * call.blocks + block.number) * size_t(block.sum_count());
      for (int i = block.thread; i < block.sum_count(); i += threads_of(call)) to[i] = 0;
    } else {
      to = block.sums + block.group * block.sum_count();
      for (int i = block.thread; i < CONST(groups) * block.sum_count(); i += threads_of(call))
        block.sums[i] = 0;
    }
    __syncthreads();
    weight = T(0);
    faults = 0;
    clear();
  }

  FL_DEVICE void clear() {
    if (!CONST(keep_sums)) return;
#pragma unroll
    for (int s = 0; s < (CONST(keep_sums) ? CONST(slots) : 1); ++s)
#pragma unroll
      for (int k = 0; k < CONST(per_thread); ++k) kept[s][k] = T(0);
  }

  // Adds to the sum of a slot and of the k-th class of this thread in a round. All lanes call.
  FL_DEVICE void add(int slot, int round, int k, T value) {
    if (slot < 0) return;
    if (CONST(keep_sums)) {
      kept[slot][k] += value;
    } else {
      value = warp_sum(value);
      int c = block.first_class(round) + k;
      if (block.lane == 0 && block.exists(c)) to[slot * CONST(classes) + c] += double(value);
    }
  }

  FL_DEVICE void flush() {
    if (CONST(keep_sums)) {
#pragma unroll
      for (int s = 0; s < (CONST(keep_sums) ? CONST(slots) : 1); ++s)
#pragma unroll
        for (int k = 0; k < CONST(per_thread); ++k) {
          double sum = warp_sum(double(kept[s][k]));
          int c = block.first_class(0) + k;
          if (block.lane == 0 && block.exists(c)) to[s * CONST(classes) + c] += sum;
        }
      clear();
    }
    // All warps of a group see the same voxels; the first one counts them.
    double sum = warp_sum(double(weight)), bad = warp_sum(double(faults));
    if (block.lane == 0 && block.warp_in_group == 0) {
      to[CONST(slots) * CONST(classes)] += sum;
      to[CONST(slots) * CONST(classes) + 1] += bad;
    }
    weight = T(0);
    faults = 0;
  }

  // Writes the block's sums, those of the groups in order.
  FL_DEVICE void finish() {
    flush();
    if (CONST(global_sums)) return;
    __syncthreads();
    double* partial = call.partial + (size_t(block.sample) * call.blocks + block.number) *
                                         size_t(block.sum_count());
    for (int i = block.thread; i < block.sum_count(); i += threads_of(call)) {
      double sum = block.sums[i];
      for (int group = 1; group < CONST(groups); ++group)
        sum += block.sums[group * block.sum_count() + i];
      partial[i] = sum;
    }
  }
};

// A tile, softmax of a label map: what the label decides is computed once per voxel.
template <class In, int V, int K>
FL_DEVICE void reduce_labels(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                             Sums<In, V, K>& sums) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  const bool once = CONST(rounds) == 1;
  const bool logs = CONST(slot_cross_entropy) >= 0 || CONST(gammas) > 0 || CONST(with_losses);
  T x[K][V], e[K][V];
  LabelPart<T> part[V];
#pragma unroll
  for (int j = 0; j < V; ++j) part[j] = no_label_part<T>();
  for (int round = 0; round < CONST(rounds); ++round) {
    LabelPart<T> here[V];
#pragma unroll
    for (int j = 0; j < V; ++j) here[j] = no_label_part<T>();
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      int c = block.first_class(round) + k;
      if (!block.exists(c)) continue;
      block.load_class(v, c, x[k]);
    }
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      if (!block.exists(block.first_class(round) + k)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (x[k][j] > here[j].largest) here[j].largest = x[k][j];
    }
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      int c = block.first_class(round) + k;
      if (!block.exists(c)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T exp_x = exponential(below(x[k][j], here[j].largest));
        if (v.y[j] == c) {
          here[j].own = exp_x;
          here[j].own_x = x[k][j];
        } else {
          here[j].rest += exp_x;
        }
        e[k][j] = exp_x;
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (once) part[j] = here[j];
      else merge(part[j], here[j]);
  }
  T factor[V];  // from e, relative to the largest seen here, to p m
  T own_largest[V];
#pragma unroll
  for (int j = 0; j < V; ++j) own_largest[j] = part[j].largest;
  if (CONST(warps) > 1) exchange_labels(block, part);

  T own_p[V], loss[V], q[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    T inverse = T(1) / (part[j].rest + part[j].own), m = v.m[j];
    factor[j] = inverse * (once ? rescale(own_largest[j], part[j].largest) : T(1));
    own_p[j] = m * (part[j].own * inverse);
    q[j] = part[j].rest * inverse;
    loss[j] = logs ? m * label_loss(part[j]) : T(0);
    sums.weight += m;
  }
  if (CONST(with_losses) && v.inside && block.warp_in_group == 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T w = v.y[j] >= 0 ? T(call.loss_weights[v.y[j]]) : T(0);
      // A class of weight 0 costs nothing, even where its loss is infinite.
      T value = w == T(0) && loss[j] == infinity<T>() ? T(0) : w * loss[j];
      static_cast<T*>(call.losses)[block.sample * call.voxels + v.first + j] = value;
    }
  }
  for (int round = 0; round < CONST(rounds); ++round) {
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      int c = block.first_class(round) + k;
      T predicted = T(0), squared = T(0), uniform = T(0), here = T(0), overlap = T(0), own = T(0);
      bool there = block.exists(c);
      if (there && !once) block.load_class(v, c, x[k]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!there) continue;
        if (!once) e[k][j] = exponential(below(x[k][j], part[j].largest));
        T p = e[k][j] * factor[j], pm = v.m[j] * p;
        bool is_label = v.y[j] == c;
        predicted += pm;
        squared += pm * p;
        if (CONST(slot_uniform) >= 0) {
          T gap = -below(x[k][j], part[j].largest);
          uniform += product(v.m[j], gap + logarithm(part[j].rest + part[j].own));
        }
        here += is_label ? v.m[j] : T(0);
        overlap += is_label ? own_p[j] : T(0);
        own += is_label ? loss[j] : T(0);
      }
      sums.add(CONST(slot_reference), round, k, here);
      sums.add(CONST(slot_overlap), round, k, overlap);
      sums.add(CONST(slot_predicted), round, k, predicted);
      sums.add(CONST(slot_predicted_squared), round, k, squared);
      sums.add(CONST(slot_reference_squared), round, k, here);
      sums.add(CONST(slot_cross_entropy), round, k, own);
      sums.add(CONST(slot_uniform), round, k, uniform);
      if (CONST(slot_top_k) >= 0 && CONST(keep_sums) == 0)
        sums.add(CONST(slot_top_k), round, k, T(0));
#pragma unroll
      for (int i = 0; i < CONST(gammas); ++i) {
        T focal = T(0);
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (there && v.y[j] == c) focal += focal_value(power(q[j], T(CONST(gamma[i]))), loss[j]);
        sums.add(CONST(slot_focal[i]), round, k, focal);
      }
    }
  }
}

// A tile of any other kind: dense targets, sigmoid, or given probabilities.
template <class In, int V, int K>
FL_DEVICE void reduce_general(Block<In, V>& block,
                              const Voxels<typename ComputedIn<In>::type, V>& v,
                              Sums<In, V, K>& sums) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  const bool once = CONST(rounds) == 1, softmax = CONST(activation) == kSoftmax;
  const bool sigmoid = CONST(activation) == kSigmoid;
  const bool logs = CONST(slot_cross_entropy) >= 0 || CONST(slot_uniform) >= 0 || CONST(gammas) > 0;
  T x[K][V];
  Whole<T> whole[V] = {};
  if (once || softmax) softmax_parts<In, V, K>(block, v, x, whole, logs);
#pragma unroll
  for (int j = 0; j < V; ++j) sums.weight += v.m[j];
  for (int round = 0; round < CONST(rounds); ++round) {
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      int c = block.first_class(round) + k;
      bool there = block.exists(c);
      T g[V];
      if (there) {
        if (!once) block.load_class(v, c, x[k]);
        block.load_target(v, c, g);
      }
      T sum[8 + 2 * kMaxGammas] = {};
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!there) continue;
        T m = v.m[j], y = g[j];
        Fields<T> f = activate(call, x[k][j], whole[j], logs);
        sum[0] += m * y;
        sum[1] += m * f.p * y;
        sum[2] += m * f.p;
        sum[3] += m * (f.p * f.p);
        sum[4] += m * (y * y);
        if (CONST(slot_cross_entropy) >= 0) sum[5] += product(m * y, f.loss);
        if (CONST(slot_cross_entropy_rest) >= 0) sum[6] += product(m * (T(1) - y), f.loss_rest);
        if (CONST(slot_uniform) >= 0) sum[7] += product(m, sigmoid ? f.loss + f.loss_rest : f.loss);
#pragma unroll
        for (int i = 0; i < CONST(gammas); ++i) {
          T gamma = T(CONST(gamma[i]));
          sum[8 + i] += product(m * y * power(f.q, gamma), f.loss);
          if (sigmoid)
            sum[8 + kMaxGammas + i] += product(m * (T(1) - y) * power(f.p, gamma), f.loss_rest);
        }
      }
      sums.add(CONST(slot_reference), round, k, sum[0]);
      sums.add(CONST(slot_overlap), round, k, sum[1]);
      sums.add(CONST(slot_predicted), round, k, sum[2]);
      sums.add(CONST(slot_predicted_squared), round, k, sum[3]);
      sums.add(CONST(slot_reference_squared), round, k, sum[4]);
      sums.add(CONST(slot_cross_entropy), round, k, sum[5]);
      sums.add(CONST(slot_cross_entropy_rest), round, k, sum[6]);
      sums.add(CONST(slot_uniform), round, k, sum[7]);
#pragma unroll
      for (int i = 0; i < CONST(gammas); ++i) {
        sums.add(CONST(slot_focal[i]), round, k, sum[8 + i]);
        if (sigmoid) sums.add(CONST(slot_focal_rest[i]), round, k, sum[8 + kMaxGammas + i]);
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
  for (long long start = block.first; start < block.last; start += block.tile_voxels()) {
    if (CONST(staged)) block.load_tile(start);
    Voxels<T, V> voxels;
    move_to(call, block.sample, start + block.place_in_tile(), block.last, voxels);
    sums.faults += voxels.faults;
    if (CONST(activation) == kSoftmax && !CONST(dense))
      reduce_labels<In, V, K>(block, voxels, sums);
    else reduce_general<In, V, K>(block, voxels, sums);
    if (++tiles % kFlushEvery == 0) sums.flush();
    if (CONST(staged)) __syncthreads();
  }
  sums.finish();
}
