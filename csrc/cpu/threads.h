// Threads: how many compute, and a loop that they share. For what is compiled once, beside the
// binding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastloss {

inline int wanted_threads = 0;   // set_num_threads; 0: not set
inline int default_threads = 1;  // what OpenMP said at first
inline bool pool_used = false;
// A forked child of a process whose OpenMP threads it did not inherit.
inline bool orphaned = false;

inline void in_child() { orphaned = orphaned || pool_used; }

inline int num_threads() {
#ifdef _OPENMP
  int limit = omp_get_max_threads();
  if (wanted_threads == 0) return limit;
  // A limit below the default comes from a tool such as threadpoolctl: it holds.
  return limit < default_threads ? std::min(limit, wanted_threads) : wanted_threads;
#else
  return 1;
#endif
}

// A thread's working memory, kept for its next call: new pages would take as long as a small call.
inline void* working_memory(size_t bytes) {
  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory kept;
  if (kept.bytes < bytes) {
    std::free(kept.data);
    kept.data = std::malloc(bytes);
    kept.bytes = kept.data ? bytes : 0;
  }
  return kept.data;
}

// Calls work(i, scratch) for i in [0, count); the order of the calls is free.
template <class Work>
void parallel(int64_t count, size_t scratch_bytes, const Work& work) {
  int threads = int(std::min<int64_t>(orphaned ? 1 : num_threads(), count));
#ifdef _OPENMP
  if (threads > 1) {
    pool_used = true;
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
      void* scratch = working_memory(scratch_bytes);
      if (!scratch) failed = true;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i)
        if (scratch) work(i, scratch);
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  void* scratch = working_memory(scratch_bytes);
  if (!scratch) throw std::bad_alloc();
  for (int64_t i = 0; i < count; ++i) work(i, scratch);
}

}  // namespace fastloss
