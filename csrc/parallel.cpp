// Torch runs its CPU operators on an OpenMP pool whose threads spin for a while after each one. A second pool would fight
// them for the cores, and linking a libgomp of our own would load a second runtime beside the one in torch's wheel. So the
// entry point of the runtime that is already loaded is looked up by name: GOMP_parallel, the stable ABI that GCC compiles
// `#pragma omp parallel` to, which LLVM's and Intel's runtimes export as well.
//
// After fork() a libgomp pool hangs in the child, so there (and where no OpenMP is loaded) threads are started per call.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace robust_dpo {
namespace {

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};

GompParallel find_openmp() {
#if defined(_WIN32)
    return nullptr;
#else
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

GompParallel openmp() {
    static std::once_flag once;
    static GompParallel found = nullptr;
    std::call_once(once, [] {
        found = find_openmp();
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif
    });
    return forked.load() ? nullptr : found;
}

struct Job {
    std::atomic<int64_t> next{0};
    int64_t items, grain;
    RangeFunction run;
    const void* context;
};

// Every thread takes pieces until none is left, so the result is complete however many threads the runtime grants.
void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (;;) {
        const int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
        if (begin >= job.items) return;
        job.run(job.context, begin, std::min(begin + job.grain, job.items));
    }
}

void run_on_new_threads(Job& job, int threads) {
    std::vector<std::thread> helpers;
    try {
        for (int k = 1; k < threads; ++k) helpers.emplace_back(work, &job);
    } catch (const std::system_error&) {
        // The system grants no more threads; those that run, and this one, do all the work.
    }
    work(&job);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_ranges(int64_t items, int64_t grain, int threads, RangeFunction run, const void* context) {
    Job job;
    job.items = items;
    job.grain = grain;
    job.run = run;
    job.context = context;
    if (threads <= 1 || items <= grain) return work(&job);
    // The team keeps torch's size even when there are fewer pieces: libgomp rebuilds its pool when the size changes.
    if (const GompParallel parallel = openmp()) return parallel(work, &job, static_cast<unsigned>(threads), 0);
    run_on_new_threads(job, static_cast<int>(std::min<int64_t>(threads, (items + grain - 1) / grain)));
}

const char* thread_runtime() { return openmp() != nullptr ? "openmp" : "std::thread"; }

}  // namespace robust_dpo
