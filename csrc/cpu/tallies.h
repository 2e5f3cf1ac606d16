// Tallies of errors: one of every thread, added to sums of double precision.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "errors.h"
#include "job.h"

namespace fastloss {

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
    numbers_ = tally_numbers(job);
    if (job.weighted) wide_.resize(size_t(numbers_ * job.batch));
    for (int i = 0; i < job.histograms; ++i) {
      scales_[i].reserve(size_t(bins_of(job.error_kinds[i])));
      for (int32_t bin = 0; bin < bins_of(job.error_kinds[i]); ++bin)
        scales_[i].push_back(scale_of_bin(job.error_kinds[i], bin));
      std::fill(sums, sums + 4 * scales_[i].size() * size_t(job.batch * job.classes), 0.0);
      sums += 4 * scales_[i].size() * size_t(job.batch * job.classes);
    }
  }

  // The tally of the calling thread, for `voxels` more voxels of a sample; null without memory.
  uint64_t* of_thread(int64_t sample, int64_t voxels) {
    Own* own;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      own = &threads_[std::this_thread::get_id()];
    }
    try {
      if (own->words.empty()) own->words.resize(size_t(numbers_ * words_));
    } catch (const std::bad_alloc&) {  // which may not leave a thread
      failed_ = true;
      return nullptr;
    }
    if (own->sample != sample || own->voxels + voxels > kMostTallied) {
      add(*own);
      own->sample = sample;
    }
    own->voxels += voxels;
    return own->words.data();
  }

  // Adds what no thread is counting any more.
  void finish() {
    if (failed_) throw std::bad_alloc();
    for (auto& entry : threads_) add(entry.second);
    for (int64_t b = 0; words_ == 2 && b < job_.batch; ++b)
      each_number(b, [&](int64_t i, const BinScale& scale, double& count, double& sum) {
        const double rest = double(wide_[size_t(b * numbers_ + i)]);
        sum = (scale.start * count + scale.unit * rest) / job_.weight_scale;
        count /= job_.weight_scale;
      });
  }

 private:
  struct Own {
    std::vector<uint64_t> words;
    int64_t sample = 0, voxels = 0;
  };
  const Job& job_;
  double* sums_;
  int words_;
  int64_t numbers_;
  std::vector<unsigned __int128> wide_;  // Σ m d, (B, numbers), with voxel weights
  std::vector<BinScale> scales_[kMaxHistograms];
  std::mutex mutex_;
  std::atomic<bool> failed_{false};
  std::map<std::thread::id, Own> threads_;

  // Adds a tally to the sums, and clears it. Sums of double precision are exact: without voxel
  // weights a bin's numbers are multiples of one unit, less than 2^24 of it, and with them counts
  // have 21 bits. Σ m d has more, and goes to wide integers first.
  void add(Own& own) {
    if (!own.voxels) return;
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t* words = own.words.data();
    each_number(own.sample, [&](int64_t i, const BinScale& scale, double& count, double& sum) {
      const uint64_t* word = words + i * words_;
      if (words_ == 2) {
        count += double(word[0]);
        wide_[size_t(own.sample * numbers_ + i)] += word[1];
      } else if (*word) {
        const double voxels = double(*word >> kCountShift);
        count += voxels;
        sum +=
            scale.start * voxels + scale.unit * double(*word & ((uint64_t(1) << kCountShift) - 1));
      }
    });
    std::fill(own.words.begin(), own.words.end(), 0);
    own.voxels = 0;
  }

  // Calls f(i, scale, count, Σ v) for every number of a sample's tally but those of voxels that do
  // not count.
  template <class F>
  void each_number(int64_t sample, const F& f) {
    double* to = sums_ + sample * job_.classes;
    const int64_t step = job_.batch * job_.classes;
    int64_t first = 0;
    for (int kind = 0; kind < job_.histograms; ++kind) {
      const auto& scales = scales_[kind];
      const int64_t bins = int64_t(scales.size());
      for (int64_t c = 0; c < job_.classes; ++c) {
        for (int64_t i = 0; i < 2 * bins; ++i)
          f(first + i, scales[size_t(i < bins ? i : i - bins)], to[i * step + c],
            to[(2 * bins + i) * step + c]);
        first += tally_size(job_.error_kinds[kind]);
      }
      to += 4 * bins * step;
    }
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
