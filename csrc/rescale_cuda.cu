// rescale on a GPU: 8 bytes of traffic for each fp32 number, or one read of the factor by each block where that is 1.
#include "cuda_device.cuh"
#include "operators_cuda.h"

namespace robust_dpo {
namespace {

constexpr int kThreads = 256;
// Vectors of a thread that are loaded before the first is stored: a load may not pass a store to what may be its address.
constexpr int kVectors = 4;

template <class T>
struct alignas(kVectorBytes) Numbers {
    T values[kVectorBytes / sizeof(T)];
};

template <class T, class Factor>
__global__ void __launch_bounds__(kThreads) rescale_kernel(T* const total, const int64_t count, const Factor* const factor) {
    constexpr int64_t kCount = kVectorBytes / sizeof(T);
    const T by = static_cast<T>(*factor);
    if (by == T(1)) return;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t to_boundary = -reinterpret_cast<uintptr_t>(total) % kVectorBytes / sizeof(T);
    const int64_t head = to_boundary < count ? to_boundary : count;
    auto* const body = reinterpret_cast<Numbers<T>*>(total + head);
    const int64_t vectors = (count - head) / kCount;
#pragma unroll 1  // otherwise a division counts the turns
    for (int64_t first = thread; first < vectors; first += kVectors * threads) {
        Numbers<T> x[kVectors];
#pragma unroll
        for (int64_t j = 0; j < kVectors; ++j)
            if (const int64_t i = first + j * threads; i < vectors) x[j] = body[i];
#pragma unroll
        for (int64_t j = 0; j < kVectors; ++j) {
            const int64_t i = first + j * threads;
            if (i >= vectors) break;
#pragma unroll
            for (int64_t k = 0; k < kCount; ++k) x[j].values[k] *= by;
            body[i] = x[j];
        }
    }
    // Fewer than a vector before and behind the whole ones.
    if (thread < head) total[thread] *= by;
    const int64_t rest = head + vectors * kCount + thread;
    if (rest < count) total[rest] *= by;
}

}  // namespace

void rescale_cuda(const CudaTarget& target, void* total, bool total_is_double, int64_t count, const void* factor,
                  bool factor_is_double, int blocks) {
    const auto run = [&](auto* numbers, const auto* by) {
        const int64_t bytes_of_block = kVectors * kVectorBytes * kThreads;
        const int64_t wanted = (count * static_cast<int64_t>(sizeof(*numbers)) + bytes_of_block - 1) / bytes_of_block;
        const CudaGrid grid{wanted < blocks ? wanted : blocks, kThreads, 1, 0};
        using T = std::remove_pointer_t<decltype(numbers)>;
        using Factor = std::remove_const_t<std::remove_pointer_t<decltype(by)>>;
        launch(target, grid, "rescale [" + std::to_string(count) + "]", rescale_kernel<T, Factor>, numbers, count, by);
    };
    const auto with_factor = [&](auto* numbers) {
        if (factor_is_double) return run(numbers, static_cast<const double*>(factor));
        run(numbers, static_cast<const float*>(factor));
    };
    if (count == 0) return;
    if (total_is_double) return with_factor(static_cast<double*>(total));
    with_factor(static_cast<float*>(total));
}

}  // namespace robust_dpo
