// Loops over the voxels of a tile that take several rows at once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace {

// Calls f(c, count) for all classes, two at a time and then one, as constants.
template <class F>
FL_INLINE void in_pairs(int64_t classes, const F& f) {
  int64_t c = 0;
  for (; c + 2 <= classes; c += 2) f(c, std::integral_constant<int, 2>{});
  if (c < classes) f(c, std::integral_constant<int, 1>{});
}

// Loops over the `voxels` of a tile, whole vectors, from `first` on: rows.step<N>(v) takes N
// vectors of each row.
template <class Rows>
FL_INLINE void run(Rows& rows, int64_t first, int64_t voxels) {
  constexpr int L = Rows::L;
  for (; first + 2 * L <= voxels; first += 2 * L) rows.template step<2>(first);
  for (; first < voxels; first += L) rows.template step<1>(first);
  rows.finish();
}

// Runs two such loops as one, and calls beside() in between.
template <class In, class Out, class Beside>
FL_INLINE void run_both(In& in, int64_t in_voxels, Out& out, int64_t out_voxels,
                        const Beside& beside) {
  constexpr int L = In::L;
  int64_t v = 0;
  for (; v + 2 * L <= in_voxels && v + 2 * L <= out_voxels; v += 2 * L) {
    in.template step<2>(v);
    out.template step<2>(v);
    beside();
  }
  run(in, v, in_voxels);
  run(out, v, out_voxels);
}

}  // namespace
