// Working memory and threads of the head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "parallel.h"

namespace robust_dpo {
namespace {

// Uninitialised memory that starts on a cache line.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T* get() const { return data_; }

private:
    T* data_;
};

// body(item) for every item, on up to `threads` threads.
template <class Body>
void parallel_items(int64_t items, int threads, const Body& body) {
    parallel_ranges(
        items, 1, threads,
        [](const void* context, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
        },
        &body);
}

}  // namespace
}  // namespace robust_dpo
