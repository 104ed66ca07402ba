// The first touch of a row: its exponential sums.
//
// Every thread keeps the running pair of an online softmax; warps, blocks and segments merge theirs in a fixed tree, so the
// bits are the same in every run.
#pragma once

#include "row_logprob_cuda.h"
#include "row_span.cuh"

namespace robust_dpo {
namespace {

constexpr int kRowWarps = kRowThreads / kWarp;
// Vectors that a thread loads before it uses the first: 64 bytes, with 1,024 threads 64 KB under way on a multiprocessor,
// twice what HBM of 4.8 TB/s with a latency of 0.8 µs needs on each of 132.
constexpr int kLoadsInFlight = 4;
// e^d is 0 in fp32 long before; keeps 0·d finite.
constexpr float kFaint = -200.0f;

struct alignas(kVectorBytes) Partial {
    ExpSums<float> sums;
    float target_logit;  // where the row is overwritten, the second launch has it from here
};

// At the start of a block's shared memory; its part of the row follows.
struct RowShared {
    ExpSums<float> of_warp[kRowWarps];
    Partial of_block;
};
constexpr size_t kRowSharedBytes = sizeof(RowShared);
static_assert(kRowSharedBytes % kVectorBytes == 0 && kRowSharedBytes <= 1024, "kernels/row_plan_cuda.py reserves 2 KB, 1 of them for the system");

__device__ __forceinline__ void add_exp(ExpSums<float>& sums, float base, float v, bool entropy) {
    const float d = v - base, e = fast_exp(d);
    sums.sum += e;
    if (entropy) sums.moment = fmaf(e, fmaxf(d, kFaint), sums.moment);
}

// Raises the shift to a logit, and says relative to what exponentials are taken: not to −inf, as long as there is no other.
__device__ __forceinline__ float raise(ExpSums<float>& sums, float top) {
    if (top > sums.shift) sums.move(top);
    return sums.shift == -INFINITY ? 0.0f : sums.shift;
}

template <bool kEntropy, class Tile, bool kTransformed>
__device__ __forceinline__ void add_vector(ExpSums<float>& sums, const Vector16& raw, int column, int target,
                                           const Logits<Tile, kTransformed>& logits) {
    constexpr int kCount = Elements<Tile>::kCount;
    float x[kCount];
    Elements<Tile>::unpack(raw, x);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = logits.of(x[k], column + k).value;
    const int place = target - column;
    if (place >= 0 && place < kCount) {  // one vector of the row; the target is left out, see finish_row
#pragma unroll
        for (int k = 0; k < kCount; ++k) x[k] = k == place ? -INFINITY : x[k];
    }
    float top = x[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) top = fmaxf(top, x[k]);
    const float base = raise(sums, top);
#pragma unroll
    for (int k = 0; k < kCount; ++k) add_exp(sums, base, x[k], kEntropy);
}

template <bool kEntropy, class Tile, bool kTransformed>
__device__ ExpSums<float> own_sums(const Vector16* body, const Span& span, int edge, float edge_z,
                                   const Logits<Tile, kTransformed>& logits, Vector16* kept) {
    constexpr int kCount = Elements<Tile>::kCount;
    const int step = static_cast<int>(blockDim.x);
    ExpSums<float> sums;
    if (edge >= 0 && edge != span.target) {
        const float v = logits.of(edge_z, edge).value;
        add_exp(sums, raise(sums, v), v, kEntropy);
    }
    int i = span.first + static_cast<int>(threadIdx.x);
    for (; i + (kLoadsInFlight - 1) * step < span.last; i += kLoadsInFlight * step) {
        Vector16 raw[kLoadsInFlight];
#pragma unroll
        for (int u = 0; u < kLoadsInFlight; ++u) raw[u] = body[i + u * step];
#pragma unroll
        for (int u = 0; u < kLoadsInFlight; ++u) {
            const int at = i + u * step;
            if (kept != nullptr) kept[at - span.first] = raw[u];
            add_vector<kEntropy>(sums, raw[u], span.head + at * kCount, span.target, logits);
        }
    }
    for (; i < span.last; i += step) {
        const Vector16 raw = body[i];
        if (kept != nullptr) kept[i - span.first] = raw;
        add_vector<kEntropy>(sums, raw, span.head + i * kCount, span.target, logits);
    }
    return sums;
}

__device__ __forceinline__ ExpSums<float> merge_lanes(ExpSums<float> sums) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        ExpSums<float> other;
        other.shift = shuffle_xor(sums.shift, mask);
        other.sum = shuffle_xor(sums.sum, mask);
        other.moment = shuffle_xor(sums.moment, mask);
        sums.merge(other);
    }
    return sums;
}

// What the first lane has: a fused multiply-add rounds a + b otherwise than b + a, so lanes differ in the last bit.
__device__ __forceinline__ ExpSums<float> first_lane(const ExpSums<float>& sums) {
    return {shuffle_first(sums.shift), shuffle_first(sums.sum), shuffle_first(sums.moment)};
}

// Of all threads of the block. Every warp merges the same numbers in the same order, so all have the same bits.
__device__ __forceinline__ ExpSums<float> merge_block(ExpSums<float> sums, RowShared& shared) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    sums = merge_lanes(sums);
    if (lane == 0) shared.of_warp[warp] = sums;
    __syncthreads();
    ExpSums<float> mine;
    if (lane < static_cast<int>(blockDim.x) / kWarp) mine = shared.of_warp[lane];
    return first_lane(merge_lanes(mine));
}

// Of all segments, 64 at most, by every warp for itself.
__device__ __forceinline__ ExpSums<float> merge_partials(const Partial* of_row, int segments) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    ExpSums<float> sums;
    if (lane < segments) sums = of_row[lane].sums;
    if (lane + kWarp < segments) sums.merge(of_row[lane + kWarp].sums);
    return first_lane(merge_lanes(sums));
}

}  // namespace
}  // namespace robust_dpo
