// A tile: some hundred voxels with all their classes, loaded and converted to the working type.
#pragma once

#include "job.h"
#include "rows.h"
#include "vec.h"

namespace {

// The prefetch distance in rows.
constexpr int kAhead = 4;
// The prefetch distance in bytes for channels-last logits.
constexpr int kBytesAhead = kVectorBytes < 64 ? 16384 : 8192;

using fastloss::Activation;
using fastloss::Blocks;
using fastloss::Faults;
using fastloss::Job;

template <class T>
FL_INLINE IVec<T> label_lanes(const typename Types<T>::Int* p) {
  IVec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// The same for labels stored as bytes.
template <class T>
FL_INLINE IVec<T> label_lanes(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (IVec<T>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (IVec<T>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
  IVec<T> v;
  for (int i = 0; i < lanes<T>; ++i) v[i] = p[i];
  return v;
}
// A class number in all lanes.
template <class T>
FL_INLINE IVec<T> class_number(int64_t c) {
  return IVec<T>{} + typename Types<T>::Int(c);
}

// The first `count` lanes.
template <class T>
FL_INLINE IVec<T> first_lanes(int count) {
  static const typename Types<T>::Int number[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                    8, 9, 10, 11, 12, 13, 14, 15};
  return label_lanes<T>(number) < typename Types<T>::Int(count);
}

// Σ term(v) over the `count` voxels from `first` on. Rows are read beyond, up to a whole vector.
template <class T, class F>
FL_INLINE double sum_run(int first, int count, const F& term) {
  constexpr int L = lanes<T>;
  Vec<T> a{};
  const int end = first + count;
  int v = first;
  for (; v + L <= end; v += L) a += term(v);
  if (v < end) a += keep<T>(first_lanes<T>(end - v), term(v));
  return total<T>(a);
}

// Named rows of one number per voxel.
enum Row {
  kWeight,     // m; 0 for ignored voxels and for padding
  kLabel,      // the label as a 64-bit integer, if the working type is double
  kLargest,    // largest logit
  kRest,       // Σ e^(x−largest) over the classes below the largest
  kInverse,    // 1 / Σ e^(x−largest)
  kLabelExp,   // e^(x−largest) of the label
  kLabelGap,   // largest − x of the label
  kSumOfMany,  // sums over many classes, accumulated from sums over a few
  kDotOfMany,
  kA,
  kB,
  kC,
  kD,
  kE,
  kF,
  kG,
  kH,
  kI,
  kJ,
  kRows
};

constexpr int64_t kFewClasses = 32;
// Padding of a row: rows a power of two apart would collide in few cache sets.
constexpr int kPad = 16;

// The number of voxels of the apply pass's tile that starts at v. A tile ends at the voxel `lead`,
// where the gradient starts a cache line.
inline int tile_from(int64_t v, int64_t last, int64_t lead, int step) {
  int64_t next = v + step;
  if (v < lead && next > lead) next = lead;
  return int((next < last ? next : last) - v);
}

// Stores `count` numbers to adjacent places.
template <class T>
void store_flat(char* to, DType dtype, int64_t count, const T* from, bool past_caches) {
  const int64_t size = item_size(dtype);
  Runs packed;
  packed.count = 1;
  packed.stride = size;
  for (int64_t i = 0; i < count; i += kMaxTile) {
    packed.run[0] = {0, 0, int32_t(count - i < kMaxTile ? count - i : kMaxTile)};
    store_row<T>(to + i * size, dtype, packed, from + i, past_caches);
  }
}

template <class T>
struct Tile {
  const Job& job;
  int64_t sample;
  int step;                    // voxels of a tile
  int stride;                  // numbers from row to row of the buffers
  T* x;                        // logits, later exponentials or gradients: (C, stride)
  T* second;                   // a second buffer of that shape
  T* rows;                     // (kRows, kMaxTile)
  T* table;                    // coefficients of the sample: (S, C)
  int32_t* y;                  // labels
  uint8_t* present;            // (C,): whether a label occurs in the tile; see `find_present`
  T* field_rows;               // (fields, kMaxTile)
  int32_t* field_labels;       // (fields, kMaxTile), for fields that are label maps
  int32_t* region;             // the row of each voxel; negative: none
  int runs = 0;                // of voxels of equal region
  bool regions_later = false;  // `move` does not find the regions
  int16_t run_start[kMaxTile + 1];
  Runs logit_runs, target_runs, weight_runs, out_runs;
  int64_t voxel = 0;   // the first one
  int n = 0;           // voxels
  int padded = 0;      // n rounded up to whole vectors
  bool even = true;    // every m is 1 and there is no padding
  bool ones = false;   // the row of m holds ones
  bool holes = false;  // some voxel has m = 0
  bool binary = true;  // all integers of a dense target loaded so far are 0, 1 or ignored
  // For softmax with a label map.
  bool direct = false;  // the logits are read in place
  bool flat = false;    // those of few classes, channels last, are read in place
  bool ahead = false;   // loops over the rows fetch the next tile; see `part_ahead`
  bool near = false;    // all |x| ≤ kNear: no maximum is subtracted
  // For softmax of two classes.
  bool keeps_bytes = false;              // byte labels may be read in place
  const uint8_t* label_bytes = nullptr;  // not null: all are 0 or 1, and `y` is not filled
  int ones_among = 0;                    // how many of them are 1

  T* row(int which) { return rows + which * kMaxTile; }
  const char* logits() const { return job.logits.data + sample * job.logits.batch_stride; }

  // The scratch memory of a tile.
  static size_t bytes(const Job& job) {
    size_t tile = size_t(fastloss::tile_voxels(job.classes) + kPad) * size_t(job.classes);
    size_t numbers = tile * 2 + kRows * kMaxTile + size_t(job.slots.count) * size_t(job.classes);
    // For fields and regions.
    size_t more = size_t(job.field_count) * kMaxTile * (sizeof(T) + sizeof(int32_t));
    if (job.regions) more += kMaxTile * sizeof(int32_t);
    return numbers * sizeof(T) + kMaxTile * sizeof(int32_t) + size_t(job.classes) + more + 320;
  }

  Tile(const Job& j, int64_t b, void* scratch) : job(j), sample(b) {
    step = fastloss::tile_voxels(j.classes);
    stride = step + kPad;
    T* p = (T*)(((uintptr_t)scratch + 63) / 64 * 64);
    int64_t size = int64_t(stride) * j.classes;
    x = p;
    second = x + size;
    rows = second + size;
    y = (int32_t*)(rows + kRows * kMaxTile);
    table = (T*)(y + kMaxTile);
    present = (uint8_t*)(table + int64_t(j.slots.count) * j.classes);
    field_rows = (T*)(((uintptr_t)(present + j.classes) + 63) / 64 * 64);
    field_labels = (int32_t*)(field_rows + j.field_count * kMaxTile);
    region = field_labels + j.field_count * kMaxTile;
    if (j.coefficients && j.rows == 1)
      for (int32_t i = 0; i < j.slots.count; ++i)
        for (int64_t c = 0; c < j.classes; ++c) {
          const T k = T(j.coefficients[(i * j.batch + b) * j.classes + c]);
          table[i * j.classes + c] = k == k ? k : T(NAN);  // the caller's NaN may have any bits
        }
    else if (j.loss_weights)
      for (int64_t c = 0; c < j.classes; ++c) table[c] = T(j.loss_weights[c]);
  }

  // Moves to the tile that starts at a voxel: finds the runs, and loads weights and labels.
  void move(int64_t first, int voxels, Faults* faults) {
    constexpr int L = lanes<T>;
    voxel = first;
    n = voxels;
    padded = (n + L - 1) / L * L;
    logit_runs.find(job.logits, first, n);
    target_runs.find(job.target, first, n);
    load_weights(faults);
    binary = true;
    if (!job.dense) {
      load_labels_of_tile(faults);
    } else if (job.has_ignore) {
      find_ignored();
    }
    if (job.regions && !regions_later && !job.regions_by_class) find_regions();
  }

  // Fills `region` with the regions of all classes, or of class c.
  void load_regions(int64_t c = 0) {
    const Array& a = *job.regions;
    Runs where;
    where.find(a, voxel, n);
    const char* from = a.data + sample * a.batch_stride;
    if (job.regions_by_class) from += c * a.channel_stride;
    load_labels(from, a.dtype, where, job.rows, false, 0, region);
  }

  // Finds the runs of the regions of class c.
  void find_regions_of(int64_t c) {
    load_regions(c);
    find_runs();
  }

  // Finds the runs of regions, and sets the weight of voxels without one to 0.
  void find_regions() {
    load_regions();
    find_runs();
    int32_t signs = 0;
    for (int v = 0; v < n; ++v) signs |= region[v];
    if (signs >= 0) return;
    T* m = row(kWeight);
    for (int v = 0; v < n; ++v)
      if (region[v] < 0) {
        m[v] = T(0);
        even = ones = false;
        holes = true;
      }
  }

  // Finds the runs of voxels of equal region.
  void find_runs() {
    constexpr int L = lanes<float>;
    runs = 0;
    run_start[runs++] = 0;
    int v = 0;
    for (; v + L < n; v += L) {
      const IVec<float> here = label_lanes<float>(region + v);
      const IVec<float> next = label_lanes<float>(region + v + 1);
#if defined(__AVX512F__)
      uint32_t ends = _mm512_cmpneq_epi32_mask((__m512i)here, (__m512i)next);
      for (; ends; ends &= ends - 1) run_start[runs++] = int16_t(v + __builtin_ctz(ends) + 1);
#else
      if (!any<float>(here != next)) continue;
      for (int i = v; i < v + L; ++i)
        if (region[i] != region[i + 1]) run_start[runs++] = int16_t(i + 1);
#endif
    }
    for (; v + 1 < n; ++v)
      if (region[v] != region[v + 1]) run_start[runs++] = int16_t(v + 1);
    run_start[runs] = int16_t(n);
  }

  // Calls f(row, first, count) for each of these runs that has a region.
  template <class F>
  void each_stretch(const F& f) const {
    for (int i = 0; i < runs; ++i) {
      const int first = run_start[i];
      if (region[first] >= 0) f(int64_t(region[first]), first, run_start[i + 1] - first);
    }
  }
  // The region that all voxels share, or −1.
  int64_t only_region() const { return runs == 1 ? int64_t(region[0]) : -1; }

  // Loads the fields that all classes share.
  void load_fields() {
    for (int i = 0; i < job.field_count; ++i) {
      const auto& field = job.fields[i];
      const char* base = field.array.data + sample * field.array.batch_stride;
      Runs runs;
      runs.find(field.array, voxel, n);
      if (field.kind == fastloss::FieldKind::labels) {
        int32_t* to = field_labels + i * kMaxTile;
        load_labels(base, field.array.dtype, runs, job.classes, false, 0, to);
        for (int v = n; v < padded; ++v) to[v] = -1;
      } else if (field.kind == fastloss::FieldKind::voxel) {
        load_row<T>(base, field.array.dtype, runs, field_rows + i * kMaxTile);
        finish_field(field_rows + i * kMaxTile);
      }
    }
  }
  // The rows of a field of kind `of_class`, in place where they can be read so.
  class ClassField {
   public:
    ClassField(Tile& tile, int field) : t_(tile), array_(tile.job.fields[field].array) {
      base_ = array_.data + t_.sample * array_.batch_stride;
      runs_.find(array_, t_.voxel, t_.n);
      buffer_ = t_.field_rows + field * kMaxTile;
      const int item = item_size(array_.dtype);
      const bool even = runs_.count == 1 && runs_.stride == item;
      const bool wide = array_.dtype == DType::f64, integers = array_.dtype > DType::f64;
      in_place_ = even && !integers && wide == (sizeof(T) == 8) && !t_.holes && t_.n == t_.padded;
    }
    bool in_place() const { return in_place_; }
    // Calls f(a number of the storage type), for a field in place.
    template <class F>
    void with_number(const F& f) const {
      with_storage<T>(array_.dtype, f);
    }
    // Calls f(c, storage type, R) for R adjacent classes: pairs of them, if they lie in place.
    template <class F>
    void over_classes(const F& f) const {
      const int64_t classes = t_.job.classes;
      using One = std::integral_constant<int, 1>;
      using Two = std::integral_constant<int, 2>;
      if (!in_place_) {
        for (int64_t c = 0; c < classes; ++c) f(c, T{}, One{});
        return;
      }
      with_number([&](auto number) {
        int64_t c = 0;
        for (; c + 2 <= classes; c += 2) f(c, number, Two{});
        if (c < classes) f(c, number, One{});
      });
    }
    // The numbers of class c.
    template <class S>
    const S* row(int64_t c) const {
      const char* from = base_ + c * array_.channel_stride;
      if (in_place_) return reinterpret_cast<const S*>(from + runs_.run[0].offset);
      load_row<T>(from, array_.dtype, runs_, buffer_);
      t_.finish_field(buffer_);
      return reinterpret_cast<const S*>(buffer_);
    }
    // The row of class c, where rows past the last class are those of the next tile. For
    // prefetching only.
    template <class S>
    const S* row_ahead(int64_t c) const {
      const int64_t classes = t_.job.classes, tiles = c / classes;
      const char* from = base_ + (c - tiles * classes) * array_.channel_stride;
      return reinterpret_cast<const S*>(from + runs_.run[0].offset) + tiles * t_.step;
    }

   private:
    Tile& t_;
    const Array& array_;
    const char* base_;
    Runs runs_;
    T* buffer_;
    bool in_place_;
  };

  // The row of a field for class c.
  const T* field_row(int i, int64_t c) {
    const auto& field = job.fields[i];
    T* to = field_rows + i * kMaxTile;
    if (field.kind == fastloss::FieldKind::labels) {
      const int32_t* label = field_labels + i * kMaxTile;
      for (int v = 0; v < padded; ++v) to[v] = T(label[v] == c);
      finish_field(to);
    } else if (field.kind == fastloss::FieldKind::of_class) {
      Runs runs;
      runs.find(field.array, voxel, n);
      const char* base = field.array.data + sample * field.array.batch_stride;
      load_row<T>(base + c * field.array.channel_stride, field.array.dtype, runs, to);
      finish_field(to);
    }
    return to;
  }
  void finish_field(T* r) {
    for (int v = n; v < padded; ++v) r[v] = T(0);
    if (holes) clear_holes(r);
  }

  void load_weights(Faults* faults) {
    T* m = row(kWeight);
    holes = false;
    even = n == padded;
    if (!job.weighted) {
      if (!ones)
        for (int v = 0; v < kMaxTile; ++v) m[v] = T(1);
      ones = true;
    } else {
      weight_runs.find(job.weight, voxel, n);
      load_row<T>(job.weight.data + sample * job.weight.batch_stride, job.weight.dtype, weight_runs,
                  m);
      ones = even = false;
      int bad = 0, zero = 0;
      for (int v = 0; v < n; ++v) {
        bad += !(m[v] >= T(0) && m[v] < T(INFINITY));
        zero += m[v] == T(0);
      }
      holes = zero > 0;
      if (bad)
        for (int v = 0; v < n; ++v)
          if (!(m[v] >= T(0) && m[v] < T(INFINITY))) {
            if (faults && faults->weights++ == 0) faults->first_weight = double(m[v]);
            m[v] = T(0);
            holes = true;
          }
    }
    if (n < padded) {
      for (int v = n; v < padded; ++v) m[v] = T(0);
      ones = false;
    }
  }

  void load_labels_of_tile(Faults* faults) {
    label_bytes = nullptr;
    const bool counts = !job.has_ignore || job.ignore < 0 || job.ignore > 1;
    if (keeps_bytes && even && counts && job.target.dtype == DType::u8 && target_runs.count == 1 &&
        target_runs.stride == 1) {
      const auto* bytes = (const uint8_t*)target_row(0) + target_runs.run[0].offset;
      ones_among = count_ones(bytes, n);
      if (ones_among >= 0) {
        label_bytes = bytes;
        return;
      }
    }
    widen_labels(faults);
  }

  // Fills `y`.
  void widen_labels(Faults* faults = nullptr) {
    bool all = load_labels(job.target.data + sample * job.target.batch_stride, job.target.dtype,
                           target_runs, job.classes, job.has_ignore, job.ignore, y);
    if (!all) find_unlabelled(faults);
    for (int v = n; v < padded; ++v) y[v] = 0;
    if constexpr (sizeof(T) == 8) {
      int64_t* wide = (int64_t*)row(kLabel);
      for (int v = 0; v < padded; ++v) wide[v] = y[v];
    }
  }

  // Sets the weight of voxels whose label is ignored or no class to 0.
  void find_unlabelled(Faults* faults) {
    int32_t lowest = 0;
    for (int v = 0; v < n; ++v) lowest = y[v] < lowest ? y[v] : lowest;
    if (lowest == 0) return;
    T* m = row(kWeight);
    for (int v = 0; v < n; ++v)
      if (y[v] < 0) {
        if (y[v] == -1 && faults && faults->labels++ == 0) faults->first_label = raw_label(v);
        m[v] = T(0);
        y[v] = 0;
      }
    even = ones = false;
    holes = true;
  }

  // Whether the labels of an even tile are bytes that can be read in place.
  bool has_byte_labels() const {
    return job.target.dtype == DType::u8 && target_runs.count == 1 && target_runs.stride == 1 &&
           even;
  }
  const uint8_t* byte_labels() const {
    return (const uint8_t*)target_row(0) + target_runs.run[0].offset;
  }

  // The labels as integers of the lanes' width.
  const typename Types<T>::Int* labels() const {
    if constexpr (sizeof(T) == 4) return y;
    else return (const int64_t*)(rows + kLabel * kMaxTile);
  }

  // The label that all voxels share, or −1.
  int32_t only_label() const {
    constexpr int L = lanes<float>;
    if (has_byte_labels()) return all_same(byte_labels(), n) ? y[0] : -1;
    IVec<float> others{};
    const IVec<float> first = class_number<float>(y[0]);
    int v = 0;
    for (; v + L <= padded; v += L) others |= label_lanes<float>(y + v) ^ first;
    bool any_other = any<float>(others != IVec<float>{});
    for (; v < padded; ++v) any_other |= y[v] != y[0];
    return any_other ? -1 : y[0];
  }

  // Finds the classes that occur: few, as a tile is a small part of the volume.
  void find_present() {
    constexpr int L = lanes<float>;
    std::memset(present, 0, size_t(job.classes));
    int v = 0;
    if (kPicks<float> && job.classes <= 32) {
      IVec<float> found{};
      for (; v + L <= padded; v += L) found |= (IVec<float>{} + 1) << label_lanes<float>(y + v);
      int32_t all = 0;
      for (int i = 0; i < L; ++i) all |= found[i];
      for (int64_t c = 0; c < job.classes; ++c) present[c] = all >> c & 1;
    } else {
      for (; v + L <= padded; v += L) {
        const IVec<float> first = class_number<float>(y[v]);
        present[y[v]] = 1;
        if (any<float>(label_lanes<float>(y + v) != first))
          for (int i = 1; i < L; ++i) present[y[v + i]] = 1;
      }
    }
    for (; v < padded; ++v) present[y[v]] = 1;
  }

  // Whether any of `count` classes from c on occurs.
  bool has_any(int64_t c, int count) const {
    bool any = false;
    for (int i = 0; i < count; ++i) any |= present[c + i] != 0;
    return any;
  }

  // The tile's part of the per-voxel losses.
  T* losses() const { return (T*)job.losses + sample * job.voxels + voxel; }

  double raw_label(int v) {
    double values[kMaxTile];
    load_row<double>(job.target.data + sample * job.target.batch_stride, job.target.dtype,
                     target_runs, values);
    return values[v];
  }

  const char* target_row(int64_t c) const {
    return job.target.data + sample * job.target.batch_stride + c * job.target.channel_stride;
  }

  // For a dense target: whether ignore_index is a number to be ignored; otherwise it is a class.
  bool ignores_number() const {
    const bool is_class = job.classes > 1 && job.ignore >= 0 && job.ignore < job.classes;
    return job.has_ignore && !is_class;
  }

  // Counts the integers of a dense target that are neither 0 nor 1 nor ignored, over all voxels.
  void find_bad_numbers(Faults* faults) {
    double values[kMaxTile], number = 0;
    int first = n;
    int64_t found = 0;
    for (int64_t c = 0; c < job.classes; ++c) {
      load_row<double>(target_row(c), job.target.dtype, target_runs, values);
      for (int v = 0; v < n; ++v) {
        if (values[v] == 0 || values[v] == 1) continue;
        if (ignores_number() && values[v] == double(job.ignore)) continue;
        ++found;
        if (v < first) first = v, number = values[v];
      }
    }
    if (faults->labels == 0) faults->first_label = number;
    faults->labels += found;
  }

  // For a dense target: ignores voxels whose ignored class is above ½, or with the ignored number
  // in any class.
  void find_ignored() {
    T* m = row(kWeight);
    T* g = row(kA);
    const bool is_class = !ignores_number();
    int found = 0;
    for (int64_t c = is_class ? job.ignore : 0; c < (is_class ? job.ignore + 1 : job.classes);
         ++c) {
      load_row<T>(target_row(c), job.target.dtype, target_runs, g);
      for (int v = 0; v < n; ++v) {
        bool ignored = is_class ? g[v] > T(0.5) : g[v] == T(job.ignore);
        found += ignored;
        m[v] = ignored ? T(0) : m[v];
      }
    }
    if (found) {
      even = ones = false;
      holes = true;
    }
  }

  // Row c of the target: dense, or 1 where the label is c.
  void load_target(int64_t c, T* g) {
    if (job.dense) {
      binary &= load_dense_row<T>(target_row(c), job.target.dtype, target_runs, ignores_number(),
                                  job.ignore, g);
      for (int v = n; v < padded; ++v) g[v] = T(0);
      if (holes) clear_holes(g);
    } else {
      const IVec<T> number = class_number<T>(c);
      const auto* label = labels();
      for (int64_t v = 0, end = padded; v < end; v += lanes<T>)
        store<T>(g + v, keep<T>(label_lanes<T>(label + v) == number, splat<T>(1)));
    }
  }

  // Row c of a dense target, in place or loaded to a buffer.
  const T* target_numbers(int64_t c, T* buffer) {
    const bool direct = target_runs.count == 1 && target_runs.stride == int64_t(sizeof(T)) &&
                        job.target.dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64) &&
                        n == padded && !holes;
    if (direct) return (const T*)(target_row(c) + target_runs.run[0].offset);
    load_target(c, buffer);
    return buffer;
  }

  // to += from, and from = 0.
  void add_row(T* from, T* to) const {
    for (int64_t v = 0, end = padded; v < end; v += lanes<T>) {
      store<T>(to + v, load<T>(to + v) + load<T>(from + v));
      store<T>(from + v, Vec<T>{});
    }
  }

  // An ignored voxel may hold anything, NaN included.
  void clear_holes(T* r) {
    const T* m = row(kWeight);
    for (int64_t v = 0, end = padded; v < end; v += lanes<T>)
      store<T>(r + v, drop<T>(load<T>(m + v) == T(0), load<T>(r + v)));
  }

  // Whether the rows of the logits can be read in place.
  bool contiguous() const {
    return logit_runs.count == 1 && logit_runs.stride == item_size(job.logits.dtype) &&
           n == padded && !holes;
  }
  template <class S = T>
  const S* source_row(int64_t c) const {
    return (const S*)(logits() + c * job.logits.channel_stride + logit_runs.run[0].offset);
  }
  // Row c, where rows past the last class are those of the next tile. For prefetching only.
  template <class S = T>
  const S* row_ahead(int64_t c) const {
    int64_t tiles = 0;
    for (; c >= job.classes; c -= job.classes) ++tiles;
    return source_row<S>(c) + tiles * step;
  }

  // Logits whose channels are last.
  template <class S>
  const S* flat_logits() const {
    return (const S*)(logits() + logit_runs.run[0].offset);
  }
  // The part of the next tile's that a loop over the row of class c fetches. For prefetching only.
  template <class S>
  const S* part_ahead(int64_t c) const {
    return flat_logits<S>() + n * job.classes + c * padded;
  }

  bool channels_last(const Array& a, const Runs& runs) const {
    return runs.count == 1 && job.classes > 1 && a.channel_stride == item_size(a.dtype) &&
           runs.stride == a.channel_stride * job.classes;
  }

  // Whether logits, and the gradient if there is one, are channels last and can be used in place.
  bool is_flat() {
    if (n != padded || holes || !channels_last(job.logits, logit_runs)) return false;
    if (!job.out.data) return true;
    find_out();
    return channels_last(job.out, out_runs);
  }

  // Loads all rows of logits into x. `later`: loops over the rows may fetch the next tile.
  void load_logits(bool later = false) {
    const Array& a = job.logits;
    const char* base = logits();
    ahead = flat = false;
    if (sizeof(T) == 4 && channels_last(a, logit_runs)) {
      ahead = later && a.dtype == DType::f32;
      const char* from = base + logit_runs.run[0].offset;
      // About 1 KB at a time: more prefetches at once would stall the loads behind them.
      const int64_t some = job.classes < 16 ? 256 / job.classes / 16 * 16 : 16;
      for (int64_t v = 0; v < n; v += some) {
        const int64_t voxels = n - v < some ? n - v : some, count = voxels * job.classes;
        const int64_t bytes = count * item_size(a.dtype);
        const float* numbers = (const float*)from;
        if (a.dtype != DType::f32) {
          load_flat(from, a.dtype, count, second);
          numbers = (const float*)second;
        }
        const char *soon = from + kBytesAhead, *end = ahead ? soon : soon + bytes;
        for (int64_t c = 0, few; c < job.classes; c += few) {
          few = job.classes - c < 32 ? job.classes - c : 16;
          // The hardware prefetcher does not follow an address that jumps between voxels.
          const char* part = few < job.classes - c ? soon + (end - soon) / job.classes * few : end;
          for (; soon < part; soon += 64) prefetch(soon);
          transpose(numbers + c, job.classes, (float*)x + c * stride + v, stride, voxels, few);
        }
        from += bytes;
      }
    } else {
      for (int64_t c = 0; c < job.classes; ++c)
        load_row<T>(base + c * a.channel_stride, a.dtype, logit_runs, x + c * stride);
    }
    finish_logits();
  }

  void finish_logits() {
    if (n < padded)
      for (int64_t c = 0; c < job.classes; ++c)
        for (int v = n; v < padded; ++v) x[c * stride + v] = T(0);
    if (holes)
      for (int64_t c = 0; c < job.classes; ++c) clear_holes(x + c * stride);
  }

  void load_flat(const char* from, DType dtype, int64_t count, T* to) {
    int size = item_size(dtype);
    Runs packed;
    packed.count = 1;
    packed.stride = size;
    for (int64_t i = 0; i < count; i += kMaxTile) {
      packed.run[0] = {0, 0, int32_t(count - i < kMaxTile ? count - i : kMaxTile)};
      load_row<T>(from + i * size, dtype, packed, to + i);
    }
  }

  // A number of voxels whose classes leave room in the L1 cache.
  int64_t few_voxels() const { return job.classes < 128 ? 2048 / job.classes / 16 * 16 : 16; }

  void find_out() { out_runs.find(job.out, voxel, n); }
  char* out_base(int64_t c) const {
    return job.out.data + sample * job.out.batch_stride + c * job.out.channel_stride;
  }

  // Writes all rows of `from` (C, stride) to the gradient; `spare` is a buffer of that size.
  void store_gradient(const T* from, T* spare) {
    const Array& a = job.out;
    if (sizeof(T) == 4 && channels_last(a, out_runs)) {
      char* to = out_base(0) + out_runs.run[0].offset;
      const int64_t size = item_size(a.dtype);
      // A few voxels at a time, which stay in the L1 cache.
      const int64_t some = few_voxels();
      for (int64_t v = 0; v < n; v += some) {
        const int64_t voxels = n - v < some ? n - v : some;
        join((const float*)from + v, stride, (float*)spare, job.classes, voxels);
        store_flat<T>(to + v * job.classes * size, a.dtype, voxels * job.classes, spare,
                      job.stream);
      }
    } else {
      for (int64_t c = 0; c < job.classes; ++c)
        store_row<T>(out_base(c), a.dtype, out_runs, from + c * stride, job.stream);
    }
  }
};

// A tile's gradient, complete in a buffer, that is written to channels-last memory little by little
// beside the loops over later tiles. Written at once past the caches it would wait for the memory,
// which is idle while those loops compute.
template <class T>
class Later {
 public:
  // Whether it may take tiles of such a gradient.
  static bool suits(const Job& job) {
    return sizeof(T) == 4 && job.out.dtype == DType::f32 && job.classes <= kMostClasses &&
           job.out.channel_stride == int64_t(sizeof(T));
  }
  // Takes over the rows (C, stride) of a tile, unless they have to be written in another way.
  bool take(Tile<T>& t, const T* from, T* spare) {
    finish();
    if (!t.channels_last(t.job.out, t.out_runs)) return false;
    from_ = from, spare_ = spare, to_ = t.out_base(0) + t.out_runs.run[0].offset;
    classes_ = t.job.classes, left_ = t.n, stride_ = t.stride, stream_ = t.job.stream;
    due_ = 0;
    return true;
  }
  // Writes a part now and then: all of it while a loop calls this for each two vectors of two
  // classes of a tile.
  FL_INLINE void step() {
    if (left_ == 0 || (due_ += 4) < classes_) return;
    due_ -= classes_;
    write();
  }
  void finish() {
    while (left_ > 0) write();
  }

 private:
  // With more classes a part would be long enough to wait for the memory.
  static constexpr int64_t kMostClasses = 64;

  __attribute__((noinline)) void write() {
    const int64_t voxels = left_ < 16 ? left_ : 16, count = voxels * classes_;
    join((const float*)from_, stride_, (float*)spare_, classes_, voxels);
    store_flat<T>(to_, DType::f32, count, spare_, stream_);
    from_ += voxels, to_ += count * int64_t(sizeof(T)), left_ -= voxels;
  }

  const T* from_;
  T* spare_;
  char* to_;
  int64_t classes_, left_ = 0, stride_, due_;
  bool stream_;
};

// Where the rows of a gradient are written: straight to the output, as numbers of type S, if they
// are contiguous there, else to a buffer of T first.
template <class T, class S>
struct Writer {
  Tile<T>& tile;
  bool straight, past_caches;

  explicit Writer(Tile<T>& t) : tile(t) {
    t.find_out();
    straight = t.out_runs.count == 1 && t.out_runs.stride == int64_t(sizeof(S)) &&
               item_size(t.job.out.dtype) == int(sizeof(S)) && t.n == t.padded;
    past_caches = straight && t.job.stream;
    if (past_caches)
      for (int64_t c = 0; c < t.job.classes; ++c)
        past_caches = past_caches && uintptr_t(row(c)) % 64 == 0;
  }
  S* row(int64_t c) const { return (S*)(tile.out_base(c) + tile.out_runs.run[0].offset); }
};

// Stores numbers computed in T as S.
template <class T, class S, bool kStream>
struct Put {
  static constexpr bool kRounds = !std::is_same<S, T>::value;
  // A vector.
  FL_INLINE void operator()(S* p, Vec<T> v) const { store_as<S, kStream, T>(p, v); }
  // Two consecutive vectors; see narrow_vectors for NaN.
  FL_INLINE void two(S* p, Vec<T> a, Vec<T> b) const {
    store_two_as<S, kStream, false, T>(p, a, b);
  }
  // Whole vectors to p, and their negatives to q.
  FL_INLINE void opposites(const T* from, int64_t count, S* p, S* q) const {
    store_opposites<S, kStream, T>(from, count, p, q);
  }
};

// Calls write(row, put): row(c) is the address of row c, and `put` stores there. Rows that cannot
// be written straight to the output go through `buffer`; `spare` is a scratch buffer of that size.
// `later` may write them from there.
template <class T, class F>
void write_rows(Tile<T>& t, T* buffer, T* spare, const F& write, Later<T>* later = nullptr) {
  with_storage<T>(t.job.out.dtype, [&](auto number) {
    using S = decltype(number);
    Writer<T, S> writer(t);
    auto row = [&](int64_t c) { return writer.row(c); };
    if (writer.past_caches) {
      write(row, Put<T, S, true>());
    } else if (writer.straight) {
      write(row, Put<T, S, false>());
    } else {
      write([&](int64_t c) { return buffer + c * t.stride; }, Put<T, T, false>());
      if (!later || !later->take(t, buffer, spare)) t.store_gradient(buffer, spare);
    }
  });
}

}  // namespace
