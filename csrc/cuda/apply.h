// The apply pass: the gradient by the logits, from the derivative by every sum. Through softmax it
// is t_c − p_c Σ_j t_j, where t_c is the derivative by log p_c.
#pragma once

#include "softmax.h"
#include "two_classes.h"

// The derivative by the sums of one sample.
template <class In, int V, int K>
struct Coefficients {
  using T = typename ComputedIn<In>::type;
  static constexpr bool kWanted = true;
  const Call& call;
  const T* table;        // (S, C), or in global memory:
  const double* global;  // (S, C) at `slot_stride`
  double scale;
  T held[K];  // the derivatives by Σ p_c, for this thread's classes

  FL_DEVICE explicit Coefficients(const Block<In, V>& block)
      : call(block.call), table(block.table) {
    scale = call.scale;
    if (CONST(upstream_type) == kF32) scale *= double(*static_cast<const float*>(call.upstream));
    if (CONST(upstream_type) == kF64) scale *= *static_cast<const double*>(call.upstream);
    global = call.coefficients + block.sample * call.row_stride;
    if (CONST(global_table)) return;
    for (int i = block.thread; i < CONST(slots) * CONST(classes); i += threads_of(call)) {
      int slot = i / CONST(classes);
      block.table[i] = T(global[slot * call.slot_stride + (i - slot * CONST(classes))] * scale);
    }
    __syncthreads();
    if (!holds()) return;
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k)
      held[k] =
          block.exists(0, k) ? (*this)(CONST(slot_predicted), block.first_class(0) + k) : T(0);
  }

  // Whether `held` fits the registers: where several warps share a voxel, each has few voxels.
  FL_DEVICE bool holds() const {
    return CONST(warps) > 1 && CONST(rounds) == 1 && !CONST(global_table) && sizeof(T) == 4;
  }
  // For the k-th class of this thread in a round, which is class c.
  FL_DEVICE T predicted(int c, int k) const {
    return holds() ? held[k] : (*this)(CONST(slot_predicted), c);
  }

  FL_DEVICE T of_label(int slot, int y) const { return y < 0 ? T(0) : (*this)(slot, y); }

  FL_DEVICE T operator()(int slot, int c) const {
    if (slot < 0) return T(0);
    if (CONST(global_table)) return T(global[slot * call.slot_stride + c] * scale);
    return table[slot * CONST(classes) + c];
  }
};

// A tile of softmax with a label map. k, s and u: the derivatives by Σ p_c, Σ p_c², Σ (−log p_c); o
// and l: those by overlap and cross-entropy (with focal slopes) at the label y. Omitting m,
//   t_c = p_c (k_c + 2 s_c p_c) − u_c, and at y additionally p_y o − l.
// With q = 1 − p_y, r = k_y + 2 s_y p_y and rests = Σ_{c≠y} p_c (k_c + 2 s_c p_c) − Σ_c u_c,
//   turn = Σ_j t_j = rests + p_y r + (p_y o − l),
//   ∂L/∂x_c = p_c (k_c + 2 s_c p_c − turn) − u_c for c ≠ y,
//   ∂L/∂x_y = p_y (r q − rests) + (p_y o − l) q − u_y, without cancellation where p_y is near 1.
template <class In, int V, int K>
FL_DEVICE void apply_labels(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                            const Coefficients<In, V, K>& by,
                            typename ComputedIn<In>::type uniform_total) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  const bool once = CONST(rounds) == 1;
  if (CONST(warps) == 1 && !v.inside) return;
  T x[K][V], factor[V], own_x[V];
  LabelPart<T> part[V];
  label_parts(block, v, x, part, factor, own_x, by);

  // The label's part: the gradient at its class, and for the other classes Σ_j t_j.
  T at_label[V], turn[V], slope[V], inverse[V];
  int own_class[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    int y = v.y[j];
    Label<T> label = label_of(call, part[j], own_x[j]);
    T m = v.m[j], i = label.inverse;
    T q = part[j].rest * i, p = label.own * i;
    T own_region = by.of_label(CONST(slot_predicted), y) +
                   T(2) * by.of_label(CONST(slot_predicted_squared), y) * p;
    T own_loss = by.of_label(CONST(slot_cross_entropy), y);
    // An ignored voxel contributes nothing, whatever the field holds there.
    if (CONST(slot_top_k) >= 0 && v.inside && (counts_all(call) || m != T(0)))
      own_loss += by.of_label(CONST(slot_top_k), y) *
                  static_cast<const T*>(call.losses)[block.sample * call.voxels + v.first + j];
    if (CONST(gammas) > 0) {
      T loss = label_loss(part[j], label);
#pragma unroll
      for (int f = 0; f < CONST(gammas); ++f)
        own_loss += by.of_label(CONST(slot_focal[f]), y) *
                    focal_slope<Plain>(p, q, loss, T(CONST(gamma[f])));
    }
    T rests = part[j].dot * i + part[j].square * i * i - uniform_total;
    T own_slope = p * by.of_label(CONST(slot_overlap), y) - own_loss;
    at_label[j] = m * (p * (own_region * q - rests) + own_slope * q);
    if (CONST(slot_uniform) >= 0) at_label[j] -= m * by.of_label(CONST(slot_uniform), y);
    own_class[j] = forget(call, y);
    // Relative to this thread's e.
    inverse[j] = i * factor[j];
    slope[j] = m * inverse[j];
    turn[j] = slope[j] * (rests + p * own_region + own_slope);
  }
  if (!v.inside) return;
  for (int round = 0; round < CONST(rounds); ++round) {
    int own_k[V];
#pragma unroll
    for (int j = 0; j < V; ++j) own_k[j] = own_class[j] - block.first_class(round);
    char* to = block.at_class(v, kOut, block.first_class(round));
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k, to += call.channel_stride[kOut]) {
      int c = block.first_class(round) + k;
      if (!block.exists(round, k)) continue;
      T by_predicted = by.predicted(c, k);
      T by_squared = T(2) * by(CONST(slot_predicted_squared), c);
      T by_uniform = by(CONST(slot_uniform), c);
      T gradient[V];
      if (!once) block.load_class(v, c, x[k]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T e = once ? x[k][j] : power_of_two(scaled_below(x[k][j], part[j].largest));
        T t = by_predicted;
        if (CONST(slot_predicted_squared) >= 0) t += by_squared * (e * inverse[j]);
        T g = e * (slope[j] * t - turn[j]);
        if (CONST(slot_uniform) >= 0) g -= v.m[j] * by_uniform;
        gradient[j] = own_k[j] == k ? at_label[j] : g;
        if (block.stores_rows()) x[k][j] = gradient[j];
      }
      if (!block.stores_rows()) block.store_voxels(v, to, gradient);
    }
  }
  if (block.stores_rows()) block.store_rows(v, x);
}

// For one class of a voxel: the derivative by log p for softmax, else by the logit. Through sigmoid
// that is by_p p q + by_log q − by_rest p, as dp/dx = p q, d log p/dx = q and d log q/dx = −p.
template <class T, class By>
FL_DEVICE T turn_of(const Call& call, const By& by, int c, const Probability<T>& f, T m, T g) {
  const bool sigmoid = CONST(activation) == kSigmoid;
  T by_p = m * (by(CONST(slot_overlap), c) * g + by(CONST(slot_predicted), c) +
                T(2) * by(CONST(slot_predicted_squared), c) * f.p);
  T by_log = -(m * (by(CONST(slot_cross_entropy), c) * g + by(CONST(slot_uniform), c)));
  T by_rest =
      -(m * (by(CONST(slot_cross_entropy_rest), c) * (T(1) - g) + by(CONST(slot_uniform_rest), c)));
#pragma unroll
  for (int i = 0; i < CONST(gammas); ++i) {
    T gamma = T(CONST(gamma[i]));
    by_log -= m * by(CONST(slot_focal[i]), c) * g * focal_slope<Plain>(f.p, f.q, f.loss, gamma);
    if (sigmoid)
      by_rest -= m * by(CONST(slot_focal_rest[i]), c) * (T(1) - g) *
                 focal_slope<Plain>(f.q, f.p, f.loss_rest, gamma);
  }
  if (CONST(activation) == kSoftmax) return by_p * f.p + by_log;
  if (sigmoid) return by_p * f.p * f.q + by_log * f.q - by_rest * f.p;
  return by_p + (by_log == T(0) ? T(0) : by_log / f.p);
}

// A tile of dense targets, sigmoid, or given probabilities.
template <class In, int V, int K>
FL_DEVICE void apply_dense(Block<In, V>& block, const Voxels<typename ComputedIn<In>::type, V>& v,
                           const Coefficients<In, V, K>& by) {
  using T = typename ComputedIn<In>::type;
  const Call& call = block.call;
  const bool once = CONST(rounds) == 1, softmax = CONST(activation) == kSoftmax;
  const bool logs = CONST(gammas) > 0;
  if (CONST(warps) == 1 && !v.inside) return;
  T x[K][V], turn[K][V], total[V];
  Whole<T> whole[V] = {};
  if (once || softmax) softmax_parts<In, V, K>(block, v, x, whole, logs);
#pragma unroll
  for (int j = 0; j < V; ++j) total[j] = T(0);
  // Without softmax the classes are independent, and turn is the gradient.
  for (int round = 0; round < (once || softmax ? CONST(rounds) : 0); ++round) {
    T here[V];
#pragma unroll
    for (int j = 0; j < V; ++j) here[j] = T(0);
    const char* target = block.at_class(v, kTarget, block.first_class(round));
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k, target += call.channel_stride[kTarget]) {
      int c = block.first_class(round) + k;
      if (!block.exists(round, k)) continue;
      T g[V];
      if (!once) block.load_class(v, c, x[k]);
      block.load_target(v, c, target, g);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        Probability<T> f = activate(call, x[k][j], whole[j], logs);
        turn[k][j] = turn_of(call, by, c, f, v.m[j], g[j]);
        here[j] += turn[k][j];
        x[k][j] = f.p;
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] += here[j];
  }
  if (softmax && CONST(warps) > 1) {
    T said[1][V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      said[0][j] = total[j];
      total[j] = T(0);
    }
    block.exchange(said, [&](const T(&heard)[1][V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) total[j] += heard[0][j];
    });
  }
  if (!v.inside) return;
  for (int round = 0; round < CONST(rounds); ++round) {
    const char* target = block.at_class(v, kTarget, block.first_class(round));
    char* to = block.at_class(v, kOut, block.first_class(round));
#pragma unroll
    for (int k = 0; k < CONST(per_thread);
         ++k, target += call.channel_stride[kTarget], to += call.channel_stride[kOut]) {
      int c = block.first_class(round) + k;
      if (!block.exists(round, k)) continue;
      T g[V], gradient[V];
      if (!once) {
        block.load_class(v, c, x[k]);
        block.load_target(v, c, target, g);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T p = x[k][j], t = turn[k][j];
        if (!once) {
          Probability<T> f = activate(call, p, whole[j], logs);
          t = turn_of(call, by, c, f, v.m[j], g[j]);
          p = f.p;
        }
        gradient[j] = softmax ? t - p * total[j] : t;
        if (block.stores_rows()) x[k][j] = gradient[j];
      }
      if (!block.stores_rows()) block.store_voxels(v, to, gradient);
    }
  }
  if (block.stores_rows()) block.store_rows(v, x);
}

template <class In, int V, int K>
FL_DEVICE void apply_block(const Call& call) {
  using T = typename ComputedIn<In>::type;
  // In reverse order: the data that the reduce pass read last is still in the cache.
  Block<In, V> block(call, false, true);
  Coefficients<In, V, K> by(block);
  const bool labels = CONST(path) == kLabels;
  double uniform_total = 0;
  if (labels && CONST(slot_uniform) >= 0)
    for (int c = 0; c < CONST(classes); ++c) uniform_total += double(by(CONST(slot_uniform), c));
  const TwoClassSlopes<T> slopes(call, by);
  if (CONST(staged)) block.begin_tiles();
  int tiles = 0;
  for (Index start = block.first; start < block.last; start += block.tile_voxels(), ++tiles) {
    if (CONST(staged)) block.next_tile(start, tiles);
    Voxels<T, V> voxels;
    move_to(call, block.sample, start + block.place_in_tile(), block.last, voxels);
    if (is_of_two_classes(call)) apply_two_classes<In, V, K>(block, voxels, slopes);
    else if (labels) apply_labels<In, V, K>(block, voxels, by, T(uniform_total));
    else apply_dense<In, V, K>(block, voxels, by);
    if (CONST(staged)) block.store_tile(start);
  }
}
