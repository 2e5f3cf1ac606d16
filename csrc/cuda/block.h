// The threads of a block and their shared memory.
//
// A block processes tiles of consecutive voxels. Each group of `warps` warps takes 32 V voxels of a
// tile, V per lane, and splits the classes: a thread holds `per_thread` classes of its voxels in
// registers. With few classes a group is one warp.
#pragma once

#include "voxels.h"

FL_DEVICE int threads_of(const Call& call) { return CONST(groups) * CONST(warps) * kLanes; }

template <class In, int V>
struct Block {
  using T = typename ComputedIn<In>::type;
  static constexpr int kPiece = 16 / int(sizeof(In));  // numbers of the widest access

  const Call& call;
  int sample, number;  // of the block in its sample
  int thread, lane, warp, group, warp_in_group;
  Index first, last;  // voxels
  // In shared memory, in this order; parts that a call does not use take no space.
  double* sums;           // (groups, S · C + 2), reduce only
  T* table;               // (S, C), apply only
  Pack<T, V>* exchanged;  // (groups, 2, warps, `exchanged`, lanes), if a group is several warps
  char* tiles;            // (stages, voxels of a tile), each `row_bytes` of In, if staged
  T* tally;               // (tallies, C, threads), reduce only
  char* tile;             // the current one of `tiles`
  int turn;               // the half of `exchanged` that is used next

  FL_DEVICE Block(const Call& call, bool reduce, bool backwards) : call(call), turn(0) {
    FL_DYNAMIC_SHARED(shared);
    int index = backwards ? int(gridDim.x) - 1 - int(blockIdx.x) : int(blockIdx.x);
    sample = index / call.blocks;
    number = index - sample * call.blocks;
    thread = int(threadIdx.x);
    lane = thread % kLanes;
    warp = thread / kLanes;
    group = warp / CONST(warps);
    warp_in_group = warp - group * CONST(warps);
    first = Index(number) * Index(call.chunk);
    last = Index(call.voxels) - first > Index(call.chunk) ? first + Index(call.chunk)
                                                          : Index(call.voxels);
    unsigned char* at = shared;
    sums = reinterpret_cast<double*>(at);
    if (reduce && !CONST(global_sums)) at += sizeof(double) * size_t(CONST(groups) * sum_count());
    table = reinterpret_cast<T*>(at);
    if (!reduce && !CONST(global_table)) at += sizeof(T) * size_t(CONST(slots) * CONST(classes));
    at = shared + (size_t(at - shared) + 15) / 16 * 16;
    exchanged = reinterpret_cast<Pack<T, V>*>(at);
    if (CONST(warps) > 1)
      at += sizeof(T) * size_t(CONST(groups) * 2 * CONST(warps) * CONST(exchanged) * V * kLanes);
    tile = tiles = reinterpret_cast<char*>(at);
    if (CONST(staged)) at += CONST(stages) * stage_bytes();
    tally = reinterpret_cast<T*>(at);
  }

  // The length of a block's row of `partial`.
  FL_DEVICE int sum_count() const { return CONST(slots) * CONST(classes) + 2; }
  FL_DEVICE int tile_voxels() const { return CONST(groups) * kLanes * V; }
  // The first voxel of this thread in the tile that starts at `tile_start`.
  FL_DEVICE int place_in_tile() const { return (group * kLanes + lane) * V; }
  // Bytes from one voxel to the next in a staged tile: an odd multiple of the access width, to
  // avoid bank conflicts.
  FL_DEVICE int row_bytes() const {
    int bytes = CONST(classes) * int(sizeof(In));
    return bytes % 32 ? bytes : bytes + 16;
  }
  // The address of the i-th logit of a staged tile.
  FL_DEVICE char* of_tile(int i) const {
    int padding = row_bytes() - CONST(classes) * int(sizeof(In));
    return tile + i * int(sizeof(In)) + (padding ? i / CONST(classes) * padding : 0);
  }
  // The address of class c of this thread's j-th voxel.
  FL_DEVICE char* in_tile(int j, int c) const {
    return tile + (place_in_tile() + j) * row_bytes() + c * int(sizeof(In));
  }
  // The first class of this thread in a round.
  FL_DEVICE int first_class(int round) const {
    return (round * CONST(warps) + warp_in_group) * CONST(per_thread);
  }
  // Whether the thread's k-th class in a round exists: the last warp may have fewer classes.
  FL_DEVICE bool exists(int round, int k) const {
    int before_last = (CONST(rounds) * CONST(warps) - 1) * CONST(per_thread);
    return k < CONST(classes) - before_last || first_class(round) + k < CONST(classes);
  }

  // All-to-all exchange in a group: each warp publishes `exchanged` numbers per voxel; `hear` runs
  // once per warp, in order.
  template <int N, class Hear>
  FL_DEVICE void exchange(const T (&said)[N][V], const Hear& hear) {
    Pack<T, V>* half = exchanged + (group * 2 + turn) * (CONST(warps) * CONST(exchanged) * kLanes);
    turn = 1 - turn;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n < CONST(exchanged)) {
        Pack<T, V> pack;
#pragma unroll
        for (int j = 0; j < V; ++j) pack.item[j] = said[n][j];
        half[(warp_in_group * CONST(exchanged) + n) * kLanes + lane] = pack;
      }
    // One barrier is enough, as the next exchange writes the other half.
    __syncthreads();
    hear_again(said, hear);
  }

  // Reads the numbers of the last exchange again.
  template <int N, class Hear>
  FL_DEVICE void hear_again(const T (&)[N][V], const Hear& hear) const {
    const Pack<T, V>* half =
        exchanged + (group * 2 + (1 - turn)) * (CONST(warps) * CONST(exchanged) * kLanes);
#pragma unroll
    for (int w = 0; w < CONST(warps); ++w) {
      T heard[N][V];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        Pack<T, V> pack = {};
        if (n < CONST(exchanged)) pack = half[(w * CONST(exchanged) + n) * kLanes + lane];
#pragma unroll
        for (int j = 0; j < V; ++j) heard[n][j] = pack.item[j];
      }
      hear(heard);
    }
  }

  // Staged: the bytes of a tile buffer.
  FL_DEVICE int stage_bytes() const { return tile_voxels() * row_bytes(); }

  // Staged: prefetches the first tiles.
  FL_DEVICE void begin_tiles() {
    for (int stage = 0; stage + 1 < CONST(stages); ++stage) {
      tile = tiles + stage * stage_bytes();
      fetch_tile(first + Index(stage) * Index(tile_voxels()));
    }
  }

  // Staged: waits until the n-th tile, which starts at voxel `start`, is in `tile` for all threads,
  // and prefetches a later one. All threads must have finished with the previous tile.
  FL_DEVICE void next_tile(Index start, int n) {
    const int ahead = CONST(stages) - 1;
    tile = tiles + (n + ahead) % CONST(stages) * stage_bytes();
    fetch_tile(start + Index(ahead) * Index(tile_voxels()));
    wait_for_copies(ahead);
    tile = tiles + n % CONST(stages) * stage_bytes();
    __syncthreads();
  }

  FL_DEVICE void fetch_tile(Index start) {
    if (start < last)
      move_tile<true>(start, call.data[kLogits] + sample * call.sample_stride[kLogits] +
                                 static_cast<long long>(start) * call.stride[kLogits][0]);
    commit_copies();
  }

  // Staged: stores the gradient in the tile.
  FL_DEVICE void store_tile(Index start) {
    __syncthreads();
    move_tile<false>(start, call.data[kOut] + sample * call.sample_stride[kOut] +
                                static_cast<long long>(start) * call.stride[kOut][0]);
    __syncthreads();
  }

  // Copies between memory and the tile: one logit, or the whole tile that starts at a voxel.
  template <bool kInto>
  FL_DEVICE void move_one(int i, char* memory) {
    In *here = reinterpret_cast<In*>(of_tile(i)), *there = reinterpret_cast<In*>(memory) + i;
    if (kInto) *here = *there;
    else *there = *here;
  }

  template <bool kInto>
  FL_DEVICE void move_tile(Index start, char* memory) {
    const int count = tile_count(start), full = tile_voxels() * CONST(classes);
    const int threads = threads_of(call);
    if (CONST(staged_bytes) != 16) {
#pragma unroll 4
      for (int i = thread; i < count; i += threads) move_one<kInto>(i, memory);
    } else if (FL_UNLIKELY(count != full)) {
#pragma unroll 1
      for (int i = thread; i < count; i += threads) move_one<kInto>(i, memory);
    } else if (kInto && CONST(stages) > 1) {
#pragma unroll
      for (int i = thread * kPiece; i < full; i += threads * kPiece)
        copy_later(of_tile(i), memory + i * sizeof(In));
    } else {
      // Several loads of a thread are in flight at a time.
      constexpr int kSeveral = 4;
      using Piece = Pack<unsigned, 4>;  // of any type
#pragma unroll
      for (int done = 0; done < full; done += kSeveral * threads * kPiece) {
        Piece pieces[kSeveral];
#pragma unroll
        for (int n = 0; n < kSeveral; ++n) {
          int i = done + (n * threads + thread) * kPiece;
          if (i < full)
            pieces[n] = load_pack<unsigned, 4>(kInto ? memory + i * sizeof(In) : of_tile(i));
        }
#pragma unroll
        for (int n = 0; n < kSeveral; ++n) {
          int i = done + (n * threads + thread) * kPiece;
          if (i < full)
            *reinterpret_cast<Piece*>(kInto ? of_tile(i) : memory + i * sizeof(In)) = pieces[n];
        }
      }
    }
  }

  // The number of logits in the tile.
  FL_DEVICE int tile_count(Index start) const {
    Index voxels = last - start < Index(tile_voxels()) ? last - start : Index(tile_voxels());
    return int(voxels) * CONST(classes);
  }

  // Loads the logits of class c of this thread's voxels; 0 for ignored voxels.
  FL_DEVICE void load_class(const Voxels<T, V>& voxels, int c, T (&x)[V]) const {
    if (!voxels.inside) {
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = T(0);
      return;
    }
    if (CONST(staged)) {
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = as_number(load_one<In>(in_tile(j, c)));
    } else if (CONST(interleaved)) {
      const char* from = call.data[kLogits] + voxels.offset[kLogits];
#pragma unroll
      for (int j = 0; j < V; ++j)
        x[j] = as_number(load_one<In>(from + (j * CONST(classes) + c) * int(sizeof(In))));
    } else {
      return load_voxels(voxels, at_class(voxels, kLogits, c), x);
    }
    if (!counts_all(call))
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (voxels.m[j] == T(0)) x[j] = T(0);
  }

  // The address of class c of this thread's voxels. Classes are `channel_stride` apart.
  FL_DEVICE char* at_class(const Voxels<T, V>& voxels, int operand, int c) const {
    return call.data[operand] + voxels.offset[operand] + c * call.channel_stride[operand];
  }

  FL_DEVICE void load_voxels(const Voxels<T, V>& voxels, const char* from, T (&x)[V]) const {
    if (!voxels.inside) {
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = T(0);
      return;
    }
    Pack<In, V> pack = load_pack<In, V>(from);
#pragma unroll
    for (int j = 0; j < V; ++j)
      x[j] = counts_all(call) || voxels.m[j] != T(0) ? as_number(pack.item[j]) : T(0);
  }

  // Loads the logits of this thread's classes in a round.
  template <int K>
  FL_DEVICE void load_round(const Voxels<T, V>& voxels, int round, T (&x)[K][V]) const {
    if (CONST(interleaved)) return load_interleaved(voxels, x);
    if (CONST(staged)) return load_staged(voxels, x);
    const char* from = at_class(voxels, kLogits, first_class(round));
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k) {
      if (exists(round, k)) load_voxels(voxels, from, x[k]);
      from += call.channel_stride[kLogits];
    }
  }

  template <int K>
  FL_DEVICE void set_zero(T (&x)[K][V]) const {
#pragma unroll
    for (int k = 0; k < CONST(per_thread); ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) x[k][j] = T(0);
  }

  // Whether a thread's classes are adjacent in memory and stored together at the end.
  FL_DEVICE bool stores_rows() const { return CONST(interleaved) || CONST(staged); }

  template <int K>
  FL_DEVICE void store_rows(const Voxels<T, V>& voxels, const T (&gradient)[K][V]) const {
    if (CONST(interleaved)) store_interleaved(voxels, gradient);
    else store_staged(voxels, gradient);
  }

  // Staged: calls with(pack) for the widest access that divides a thread's classes.
  template <class With>
  FL_DEVICE void in_packs(const With& with) const {
    int bytes = (CONST(classes) | CONST(per_thread)) * int(sizeof(In)) | 16;
    bytes &= -bytes;
    if (bytes == 16) with(Pack<In, kPiece>());
    else if (bytes == 8) with(Pack<In, (kPiece + 1) / 2>());
    else if (bytes == 4) with(Pack<In, (kPiece + 3) / 4>());
    else with(Pack<In, 1>());
  }

  template <int K>
  FL_DEVICE void load_staged(const Voxels<T, V>& voxels, T (&x)[K][V]) const {
    if (!voxels.inside) return set_zero(x);
    in_packs([&](auto kind) {
      constexpr int kNumbers = sizeof kind / sizeof(In);
#pragma unroll
      for (int k = 0; k < CONST(per_thread); k += kNumbers)
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (!exists(0, k)) continue;
          auto pack = load_pack<In, kNumbers>(in_tile(j, first_class(0) + k));
          bool counts = counts_all(call) || voxels.m[j] != T(0);
#pragma unroll
          for (int n = 0; n < kNumbers; ++n)
            if (k + n < K) x[k + n][j] = counts ? as_number(pack.item[n]) : T(0);
        }
    });
  }

  template <int K>
  FL_DEVICE void store_staged(const Voxels<T, V>& voxels, const T (&gradient)[K][V]) const {
    if (!voxels.inside) return;
    in_packs([&](auto pack) {
      constexpr int kNumbers = sizeof pack / sizeof(In);
#pragma unroll
      for (int k = 0; k < CONST(per_thread); k += kNumbers)
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (!exists(0, k)) continue;
#pragma unroll
          for (int n = 0; n < kNumbers; ++n)
            if (k + n < K) pack.item[n] = from_number<In>(gradient[k + n][j]);
          *reinterpret_cast<Pack<In, kNumbers>*>(in_tile(j, first_class(0) + k)) = pack;
        }
    });
  }

  // Interleaved: the number of accesses for this thread's voxels.
  FL_DEVICE int pieces() const { return V * CONST(classes) / kPiece; }

  template <int K>
  FL_DEVICE void load_interleaved(const Voxels<T, V>& voxels, T (&x)[K][V]) const {
    if (!voxels.inside) return set_zero(x);
#pragma unroll
    for (int i = 0; i < pieces(); ++i) {
      auto pack = load_pack<In, kPiece>(call.data[kLogits] + voxels.offset[kLogits] + i * 16);
#pragma unroll
      for (int p = 0; p < kPiece; ++p) {
        int number = i * kPiece + p, j = number / CONST(classes);
        bool counts = counts_all(call) || voxels.m[j] != T(0);
        x[number - j * CONST(classes)][j] = counts ? as_number(pack.item[p]) : T(0);
      }
    }
  }

  template <int K>
  FL_DEVICE void store_interleaved(const Voxels<T, V>& voxels, const T (&gradient)[K][V]) const {
    if (!voxels.inside) return;
#pragma unroll
    for (int i = 0; i < pieces(); ++i) {
      Pack<In, kPiece> pack;
#pragma unroll
      for (int p = 0; p < kPiece; ++p) {
        int number = i * kPiece + p, j = number / CONST(classes);
        pack.item[p] = from_number<In>(gradient[number - j * CONST(classes)][j]);
      }
      *reinterpret_cast<Pack<In, kPiece>*>(call.data[kOut] + voxels.offset[kOut] + i * 16) = pack;
    }
  }

  // Loads the logit of each voxel's label.
  FL_DEVICE void load_own(const Voxels<T, V>& voxels, T (&x)[V]) const {
    const char* from = call.data[kLogits] + voxels.offset[kLogits];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      int y = voxels.y[j] < 0 ? 0 : voxels.y[j];
      if (!voxels.inside) {
        x[j] = T(0);
      } else if (CONST(staged)) {
        x[j] = as_number(load_one<In>(in_tile(j, y)));
      } else {
        x[j] = as_number(load_one<In>(from + y * call.channel_stride[kLogits] + j * sizeof(In)));
      }
      if (!counts_all(call) && voxels.m[j] == T(0)) x[j] = T(0);
    }
  }

  // The target of class c, from a dense target at `from` or from the labels; 0 for ignored voxels.
  // Returns whether a dense target has a fault there.
  FL_DEVICE bool load_target(const Voxels<T, V>& voxels, int c, const char* from, T (&g)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] = T(voxels.y[j] == c ? 1 : 0);
    if (!CONST(dense) || !voxels.inside) return false;
    target_row(call, from, g);
    const bool bad = any_bad_number(call, g);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (voxels.m[j] == T(0)) g[j] = T(0);
    return bad;
  }

  // Stores the gradient of the class at `to`.
  FL_DEVICE void store_voxels(const Voxels<T, V>& voxels, char* to, const T (&gradient)[V]) const {
    if (!voxels.inside) return;
    Pack<In, V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) pack.item[j] = from_number<In>(gradient[j]);
    *reinterpret_cast<Pack<In, V>*>(to) = pack;
  }
};
