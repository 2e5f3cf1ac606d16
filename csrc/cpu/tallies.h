// Tallies of errors: one of every thread, added to sums of double precision.
#pragma once

#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "errors.h"
#include "job.h"

namespace fastloss {

// v = start + unit · d for the numbers of a bin; of the first bin 0, which they are taken for.
struct BinScale {
  double start, unit;
};
template <size_t N>
BinScale scale_of_place(const Octaves (&octaves)[N], int32_t place) {
  const auto value = [](int32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return double(number);
  };
  if (place == 0) return {0, 0};
  int32_t first = 1;
  for (const Octaves& o : octaves) {
    const int32_t count = o.count << o.bits;
    if (place < first + count) {
      const int32_t start = float_bits(o.exponent) + ((place - first) << (23 - o.bits));
      return {value(start), value((start & 0x7f800000) - (23 << 23))};
    }
    first += count;
  }
  return {value(end_bits(octaves)), 0};
}
inline BinScale scale_of_bin(ErrorKind kind, int32_t bin) {
  if (kind == ErrorKind::hinge) return scale_of_place(kHingeErrors, bin);
  if (bin <= last_place(kSmallErrors)) return scale_of_place(kSmallErrors, bin);
  return scale_of_place(kLargeErrors, bins_of(kind) - 1 - bin);
}

// The numbers of all classes of a sample, per word of a tally.
inline int64_t tally_numbers(const Job& job) {
  int64_t size = 0;
  for (int i = 0; i < job.histograms; ++i) size += tally_size(job.error_kinds[i]) * job.classes;
  return size;
}

class Tallies {
 public:
  // `sums`: (slots of all histograms, B, C), see `Request.slots` in fastloss/request.py.
  Tallies(const Job& job, double* sums) : job_(job), sums_(sums) {
    words_ = job.weighted ? 2 : 1;
    for (int i = 0; i < job.histograms; ++i) {
      scales_[i].reserve(size_t(bins_of(job.error_kinds[i])));
      for (int32_t bin = 0; bin < bins_of(job.error_kinds[i]); ++bin)
        scales_[i].push_back(scale_of_bin(job.error_kinds[i], bin));
      std::fill(sums, sums + 4 * scales_[i].size() * size_t(job.batch * job.classes), 0.0);
      sums += 4 * scales_[i].size() * size_t(job.batch * job.classes);
    }
  }

  // The tally of the calling thread, for `voxels` more voxels of a sample.
  uint64_t* of_thread(int64_t sample, int64_t voxels) {
    Own* own;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      own = &threads_[std::this_thread::get_id()];
    }
    if (own->words.empty()) own->words.resize(size_t(tally_numbers(job_) * words_));
    if (own->sample != sample || own->voxels + voxels > kMostTallied) {
      add(*own);
      own->sample = sample;
    }
    own->voxels += voxels;
    return own->words.data();
  }

  // Adds what no thread is counting any more.
  void finish() {
    for (auto& entry : threads_) add(entry.second);
  }

 private:
  struct Own {
    std::vector<uint64_t> words;
    int64_t sample = 0, voxels = 0;
  };
  const Job& job_;
  double* sums_;
  int words_;
  std::vector<BinScale> scales_[kMaxHistograms];
  std::mutex mutex_;
  std::map<std::thread::id, Own> threads_;

  // Adds a tally to the sums, and clears it. Sums of double precision are exact: a bin's numbers are
  // multiples of one unit, and less than 2^24 of it.
  void add(Own& own) {
    if (!own.voxels) return;
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t* from = own.words.data();
    double* to = sums_;
    const int64_t step = job_.batch * job_.classes;
    for (int kind = 0; kind < job_.histograms; ++kind) {
      const auto& scales = scales_[kind];
      const int64_t bins = int64_t(scales.size());
      for (int64_t c = 0; c < job_.classes; ++c) {
        double* own_class = to + own.sample * job_.classes + c;
        for (int64_t i = 0; i < 2 * bins; ++i) {
          const uint64_t* word = from + i * words_;
          if (!word[0]) continue;
          double count = double(word[0]), rest = words_ == 2 ? double(word[1]) : 0;
          if (words_ == 1) {
            count = double(word[0] >> kCountShift);
            rest = double(word[0] & ((uint64_t(1) << kCountShift) - 1));
          }
          const BinScale& scale = scales[size_t(i % bins)];
          own_class[i * step] += count / job_.weight_scale;
          own_class[(2 * bins + i) * step] +=
              (scale.start * count + scale.unit * rest) / job_.weight_scale;
        }
        from += tally_size(job_.error_kinds[kind]) * words_;
      }
      to += 4 * bins * step;
    }
    std::fill(own.words.begin(), own.words.end(), 0);
    own.voxels = 0;
  }
};

// The derivatives by Σ v of every bin, of T: (B, histograms, C, tally size); 0 where voxels do not
// count.
template <class T>
std::vector<T> slopes_of(const Job& job, const double* coefficients) {
  const int64_t numbers = tally_numbers(job), step = job.batch * job.classes;
  std::vector<T> found(size_t(numbers * job.batch));
  for (int64_t b = 0; b < job.batch; ++b) {
    T* to = found.data() + b * numbers;
    const double* from = coefficients;
    for (int kind = 0; kind < job.histograms; ++kind) {
      const int64_t bins = bins_of(job.error_kinds[kind]);
      const int64_t size = tally_size(job.error_kinds[kind]);
      for (int64_t i = 0; i < 2 * bins; ++i) {
        const double* row = from + (2 * bins + i) * step + b * job.classes;
        for (int64_t c = 0; c < job.classes; ++c) to[c * size + i] = T(row[c]);
      }
      to += size * job.classes;
      from += 4 * bins * step;
    }
  }
  return found;
}

}  // namespace fastloss
