// Softmax with a label map: a map of one number per voxel from the sums of Dice and cross-entropy.
//
// For a voxel of label y, with p_c = e_c / Σe,
//   Σ_c k_c p_c + k'_y p_y = (Σ_c e_c (k_c + [c = y] k'_c)) / Σe,
// so that one look at every e is enough; there is one logarithm for each voxel.
#pragma once

#include "general.h"

namespace {

// The sums that this path knows.
constexpr uint32_t kMapSums =
    fastloss::kReference | fastloss::kOverlap | fastloss::kPredicted | fastloss::kCrossEntropy;

inline bool suits_softmax_map(const Job& job) {
  return job.map == fastloss::MapKind::voxel && job.activation == Activation::softmax &&
         !job.dense && (job.slots.kinds & ~kMapSums) == 0;
}

// U vectors of voxels from v on.
template <bool kLogs, int U, class T>
FL_INLINE void map_columns(Tile<T>& t, int v, T* out) {
  constexpr int L = lanes<T>;
  const Job& job = t.job;
  const int64_t classes = job.classes;
  const auto* label = t.labels() + v;
  const T *x = t.x + v, *gap = t.second + v;
  auto row = [&](int slot) { return slot < 0 ? nullptr : job.map_coefficients + slot * classes; };
  const double *reference = row(job.slots.reference), *overlap = row(job.slots.overlap);
  const double *predicted = row(job.slots.predicted), *loss = row(job.slots.cross_entropy);
  auto of_class = [](const double* k, int64_t c) { return splat<T>(k ? T(k[c]) : T(0)); };
  Vec<T> weighed[U] = {}, added[U] = {}, log_sum[U];
  if (kLogs) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) log_sum[u] = log_one_plus<T>(load<T>(t.row(kRest) + v + u * L));
  }
  for (int64_t c = 0; c < classes; ++c, x += t.stride, gap += t.stride) {
    const IVec<T> number = class_number<T>(c);
    const Vec<T> of_any = of_class(predicted, c), of_own = of_class(overlap, c);
    const Vec<T> there = of_class(reference, c), of_loss = of_class(loss, c);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const IVec<T> own = label_lanes<T>(label + u * L) == number;
      weighed[u] += load<T>(x + u * L) * (of_any + keep<T>(own, of_own));
      Vec<T> more = there;
      if (kLogs) more += product<T>(of_loss, load<T>(gap + u * L) + log_sum[u]);
      added[u] += keep<T>(own, more);
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) {
    const int at = v + u * L;
    const Vec<T> each = weighed[u] * load<T>(t.row(kInverse) + at) + added[u];
    store<T>(out + at, product<T>(load<T>(t.row(kWeight) + at), each));
  }
}

// Writes a tile of the map.
template <class T>
void softmax_map(Tile<T>& t) {
  constexpr int L = lanes<T>, U = kVectorBytes < 32 ? 2 : 4;
  T* out = t.row(kA);  // whole vectors, of which the last may reach beyond the map
  auto all = [&](auto logs) {
    constexpr bool kLogs = decltype(logs)::value;
    load_and_maximum(t);
    exponentials<kLogs>(t, [](int64_t, int64_t, auto) {});
    int v = 0;
    for (; v + U * L <= t.padded; v += U * L) map_columns<kLogs, U>(t, v, out);
    for (; v < t.padded; v += L) map_columns<kLogs, 1>(t, v, out);
  };
  if (t.job.slots.cross_entropy >= 0) all(std::true_type{});
  else all(std::false_type{});
  std::memcpy(map_row<T>(t), out, sizeof(T) * size_t(t.n));
}

}  // namespace
