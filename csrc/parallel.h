// Rows over threads, on the OpenMP pool that the process already has.
#pragma once

#include <cstdint>

namespace robust_dpo {

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

// Calls run(context, begin, end) over [0, items) in pieces of at most `grain`, on up to `threads` threads; which thread
// takes which piece is not determined. Returns when all are done. `run` must not throw.
void parallel_ranges(int64_t items, int64_t grain, int threads, RangeFunction run, const void* context);

// "openmp" where the process has an OpenMP runtime that can be shared, otherwise "std::thread".
const char* thread_runtime();

}  // namespace robust_dpo
