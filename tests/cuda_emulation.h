// CUDA on the host, for tests: the kernels of csrc/*.cu compiled by the C++ compiler and run thread by thread.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it has to wait for others, at a barrier or a
// shuffle; then the next one runs. Blocks run one after the other, those of a cluster together. The order of fibers and of
// blocks is another in every launch, and shared memory is poisoned: a kernel that leans on an order that CUDA does not
// promise gives other results from launch to launch. Arithmetic is IEEE's; only 2^x is more exact than the chip's.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "element.h"

#define ROBUST_DPO_DEVICE_TYPE "cpu"
#define ROBUST_DPO_CUDA_ARCHITECTURES "emulated"
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Dim {
    unsigned x;
};

// Fibers wait here until `expected` of them have arrived.
struct Barrier {
    int expected = 0, arrived = 0;
    uint64_t generation = 0;
};

struct Block {
    std::vector<unsigned char> shared;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::vector<unsigned char> lanes;  // 8 bytes for each thread, what it gives into a shuffle
};

struct Cluster {
    std::vector<Block> blocks;
    Barrier barrier;
};

struct Fiber {
    Dim thread{}, block{};
    int rank = 0;  // of the block in its cluster
    uint64_t awaited = 0;
    bool begun = false, done = false;
    jmp_buf resume;
    std::unique_ptr<unsigned char[]> stack;
};

struct State {
    Dim block_dim{}, grid_dim{};
    Cluster* cluster = nullptr;
    Fiber* fiber = nullptr;
    const std::function<void()>* kernel = nullptr;
    jmp_buf scheduler;
    ucontext_t home;
};

inline State& state() {
    static State it;
    return it;
}

inline Block& block() { return state().cluster->blocks[static_cast<size_t>(state().fiber->rank)]; }

inline void yield() {
    if (_setjmp(state().fiber->resume) == 0) _longjmp(state().scheduler, 1);
}

inline uint64_t arrive(Barrier& barrier) {
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    return generation;
}

inline void wait(const Barrier& barrier, uint64_t generation) {
    while (barrier.generation == generation) yield();
}

inline void meet(Barrier& barrier) { wait(barrier, arrive(barrier)); }

inline void fiber_main() {
    (*state().kernel)();
    state().fiber->done = true;
    _longjmp(state().scheduler, 1);
}

constexpr size_t kStackBytes = 64 * 1024;

// Runs a fiber until it waits or ends.
inline void step(Fiber& fiber) {
    state().fiber = &fiber;
    if (_setjmp(state().scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.resume, 1);
    fiber.begun = true;
    fiber.stack.reset(new unsigned char[kStackBytes]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

inline std::mt19937& order() {
    static std::mt19937 generator(20261121);
    return generator;
}

inline void run_cluster(const std::vector<unsigned>& blocks, int threads, size_t shared_bytes) {
    Cluster cluster;
    cluster.blocks.resize(blocks.size());
    cluster.barrier.expected = static_cast<int>(blocks.size()) * threads;
    std::vector<Fiber> fibers(blocks.size() * static_cast<size_t>(threads));
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
        Block& block = cluster.blocks[rank];
        block.shared.assign(shared_bytes + 16, 0xff);  // NaN, or −1
        block.barrier.expected = threads;
        block.warps.resize(static_cast<size_t>(threads) / 32);
        for (Barrier& warp : block.warps) warp.expected = 32;
        block.lanes.resize(static_cast<size_t>(threads) * 8);
        for (int thread = 0; thread < threads; ++thread) {
            Fiber& fiber = fibers[rank * static_cast<size_t>(threads) + static_cast<size_t>(thread)];
            fiber.thread.x = static_cast<unsigned>(thread);
            fiber.block.x = blocks[rank];
            fiber.rank = static_cast<int>(rank);
        }
    }
    std::vector<size_t> turns(fibers.size());
    std::iota(turns.begin(), turns.end(), 0);
    std::shuffle(turns.begin(), turns.end(), order());
    state().cluster = &cluster;
    for (size_t left = fibers.size(); left > 0;) {
        for (const size_t turn : turns) {
            if (fibers[turn].done) continue;
            step(fibers[turn]);
            if (!fibers[turn].done) continue;
            --left;
            fibers[turn].stack.reset();
        }
    }
}

inline void run(int64_t blocks, int threads, int cluster, size_t shared_bytes, const std::function<void()>& kernel) {
    state().block_dim.x = static_cast<unsigned>(threads);
    state().grid_dim.x = static_cast<unsigned>(blocks);
    state().kernel = &kernel;
    std::vector<unsigned> clusters(static_cast<size_t>(blocks / cluster));
    std::iota(clusters.begin(), clusters.end(), 0u);
    std::shuffle(clusters.begin(), clusters.end(), order());
    for (const unsigned first : clusters) {
        std::vector<unsigned> members(static_cast<size_t>(cluster));
        std::iota(members.begin(), members.end(), first * static_cast<unsigned>(cluster));
        run_cluster(members, threads, shared_bytes);
    }
}

template <class T>
T shuffle(T value, int from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves one number");
    Block& mine = block();
    const int thread = static_cast<int>(state().fiber->thread.x), warp = thread / 32;
    std::memcpy(&mine.lanes[static_cast<size_t>(thread) * 8], &value, sizeof(T));
    meet(mine.warps[static_cast<size_t>(warp)]);
    T got;
    std::memcpy(&got, &mine.lanes[static_cast<size_t>(warp * 32 + from) * 8], sizeof(T));
    meet(mine.warps[static_cast<size_t>(warp)]);
    return got;
}

}  // namespace emulation

#define threadIdx (emulation::state().fiber->thread)
#define blockIdx (emulation::state().fiber->block)
#define blockDim (emulation::state().block_dim)
#define gridDim (emulation::state().grid_dim)

inline int min(int a, int b) { return a < b ? a : b; }
inline void __syncthreads() { emulation::meet(emulation::block().barrier); }
inline void __threadfence() {}

template <class T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address += value;
    return old;
}

namespace robust_dpo {
namespace {

inline float fast_exp2(float x) { return std::exp2(x); }
inline float bits_to_float(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t float_to_bits(float x) { return bit_cast<uint32_t>(x); }

template <class Half>
uint32_t pack(float low, float high) {
    Half a, b;
    from_float(low, a);
    from_float(high, b);
    return static_cast<uint32_t>(a.bits) | static_cast<uint32_t>(b.bits) << 16;
}
inline uint32_t pack_bf16(float low, float high) { return pack<BFloat16>(low, high); }
inline uint32_t pack_fp16(float low, float high) { return pack<Float16>(low, high); }
inline float fp16_to_float(uint32_t half) { return to_float(Float16{static_cast<uint16_t>(half)}); }

inline unsigned char* shared_memory() {
    const auto address = reinterpret_cast<uintptr_t>(emulation::block().shared.data());
    return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

template <class T>
T shuffle_xor(T value, int mask) {
    return emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class T>
T shuffle_first(T value) {
    return emulation::shuffle(value, 0);
}

inline void cluster_arrive() {
    emulation::state().fiber->awaited = emulation::arrive(emulation::state().cluster->barrier);
}
inline void cluster_wait() { emulation::wait(emulation::state().cluster->barrier, emulation::state().fiber->awaited); }

template <class T>
const T* cluster_peer(const T* mine, int rank) {
    const auto offset = reinterpret_cast<const unsigned char*>(mine) - shared_memory();
    const auto address = reinterpret_cast<uintptr_t>(emulation::state().cluster->blocks[static_cast<size_t>(rank)].shared.data());
    return reinterpret_cast<const T*>((address + 15) / 16 * 16 + static_cast<uintptr_t>(offset));
}

}  // namespace

inline std::string cuda_problem() { return ""; }

struct DeviceScope {
    explicit DeviceScope(int) {}
    ~DeviceScope() {}
};

template <class... Parameters, class... Arguments>
void launch(const CudaTarget&, const CudaGrid& grid, const std::string& what, void (*kernel)(Parameters...),
            Arguments... arguments) {
    const bool fits = grid.blocks > 0 && grid.blocks % grid.cluster == 0 && grid.threads % 32 == 0 && grid.threads <= 1024 &&
                      grid.cluster <= 8 && grid.shared_bytes <= 227 * 1024;
    // A launch of one thread needs no warp.
    if (!fits && grid.threads != 1) throw std::runtime_error(what + ": cudaErrorInvalidConfiguration, emulated");
    emulation::run(grid.blocks, grid.threads, grid.cluster, grid.shared_bytes, [&] { kernel(Parameters(arguments)...); });
}

}  // namespace robust_dpo
