// What the parts of the module share: the instruction set that was chosen, dtypes, and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "job.h"

namespace fastloss {

// The C++ name of the instruction set that computes, as x86_64_v3.
const char* chosen_isa();
// Raises TypeError for a dtype that no kernel reads.
DType dtype_of(const std::string& name);
// How many threads compute now: one in a forked child that cannot have others.
int usable_threads();
// Calls work(i) for i in [0, count), on as many threads; the order of the calls is free.
void run_parallel(int64_t count, const std::function<void(int64_t)>& work);

}  // namespace fastloss
