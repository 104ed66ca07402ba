// Where the part of a row lies that a block takes, and what the logits in it are.
//
// A row is cut into the elements before its first 16-byte boundary, whole vectors of 16 bytes and the elements behind
// them; the two ends, fewer than a vector each, are the edge. One block takes the row, or several blocks ("segments") a
// run of its vectors each, and the first of them the edge.
#pragma once

#include "cuda_device.cuh"
#include "formulas.h"

namespace robust_dpo {
namespace {

// Where a block's part of a row lies, in vectors from the first 16-byte boundary on.
struct Span {
    int head;         // elements before that boundary
    int vectors;      // of the row
    int first, last;  // this block's
    int target;       // column, −1 outside of the vocabulary
};

template <class Tile, bool kTransformed>
struct Logits {
    static constexpr int kCount = Elements<Tile>::kCount;

    const float* bias;
    float scale, softcap;

    // Logit of z in a column, and its derivative by z.
    __device__ __forceinline__ ValueSlope<float> of(float z, int column) const {
        if constexpr (!kTransformed) return {z * scale, scale};
        if (bias != nullptr) z += bias[column];
        const ValueSlope<float> c = capped(z * scale, softcap);
        return {c.value, c.slope * scale};
    }
};

// The column of the edge that this thread holds, or −1.
template <int kCount>
__device__ __forceinline__ int edge_column(const Span& span, int64_t vocab, int rank) {
    const int t = static_cast<int>(threadIdx.x);
    if (rank != 0 || t >= 2 * kCount) return -1;
    const int column = t < kCount ? t : span.head + span.vectors * kCount + t - kCount;
    return t < kCount ? (t < span.head ? column : -1) : (column < vocab ? column : -1);
}

}  // namespace
}  // namespace robust_dpo
