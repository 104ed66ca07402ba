// The second touch of a row: softmax − onehot, from its logits and its results. A row of nobody gets zeros.
#pragma once

#include "row_span.cuh"

namespace robust_dpo {
namespace {

// Vectors that a thread loads before it stores the first where it loads them a second time.
constexpr int kLoadsPerStore = 2;

// What a row's gradient needs: e^{v − shift}·factor of a logit v, and target_factor at the target.
struct Gradient {
    float shift, factor, target_factor;
};

// Whether the values of one vector of the tile, stored together, go to an address for that.
template <int kCount, class Out>
__device__ __forceinline__ bool stores_wide(const Out* out) {
    constexpr int kBytes = kCount * sizeof(Out) < kVectorBytes ? kCount * sizeof(Out) : kVectorBytes;
    return reinterpret_cast<uintptr_t>(out) % kBytes == 0;
}

template <class Out, int kCount>
__device__ __forceinline__ void store_values(Out* out, bool wide, const float (&y)[kCount]) {
    if (wide) return store_vector(out, y);
#pragma unroll
    for (int k = 0; k < kCount; ++k) Elements<Out>::store(out + k, y[k]);
}

template <class Tile, bool kTransformed>
__device__ __forceinline__ float gradient_of(float z, int column, int target, const Gradient& g,
                                             const Logits<Tile, kTransformed>& logits) {
    const ValueSlope<float> v = logits.of(z, column);
    return (column == target ? g.target_factor : fast_exp(v.value - g.shift) * g.factor) * v.slope;
}

template <class Out, class Tile, bool kTransformed>
__device__ __forceinline__ void write_vector(Out* out, bool wide, const Vector16 raw, int column, int target,
                                             const Gradient& g, const Logits<Tile, kTransformed>& logits) {
    constexpr int kCount = Elements<Tile>::kCount;
    float z[kCount], y[kCount];
    Elements<Tile>::unpack(raw, z);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        const ValueSlope<float> v = logits.of(z[k], column + k);
        y[k] = fast_exp(v.value - g.shift) * g.factor * v.slope;
    }
    const int place = target - column;
    if (place >= 0 && place < kCount) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) y[k] = k == place ? g.target_factor * logits.of(z[k], column + k).slope : y[k];
    }
    store_values(out + column, wide, y);
}

// A gradient narrower than the tile may lie over the front of the same row: its element i covers bytes of elements ≤ i of
// the tile. Where the part is kept, all has been read before anything is written. Otherwise vectors go upwards with a
// barrier between the loads of a step and its stores. A gradient of the tile's width covers what the same thread has just
// loaded; then vectors go downwards, because the end of the row was touched last and is the likeliest to be cached still.
template <class Out, class Tile, bool kTransformed>
__device__ __forceinline__ void write_gradient(Out* out, const Vector16* body, const Vector16* kept, const Span& span,
                                               int edge, float edge_z, const Gradient& g,
                                               const Logits<Tile, kTransformed>& logits) {
    constexpr int kCount = Elements<Tile>::kCount;
    const bool wide = stores_wide<kCount>(out + span.head);
    const int count = span.last - span.first, step = static_cast<int>(blockDim.x);
    const int start = static_cast<int>(threadIdx.x);
    if (kept != nullptr) {
#pragma unroll 2
        for (int i = start; i < count; i += step) {
            const Vector16 raw = kept[i];
            write_vector(out, wide, raw, span.head + (span.first + i) * kCount, span.target, g, logits);
        }
    } else if (sizeof(Out) < sizeof(Tile)) {
        for (int block = 0; block < count; block += step) {
            const int i = block + start;
            Vector16 raw{};
            if (i < count) raw = body[span.first + i];
            __syncthreads();
            if (i < count) write_vector(out, wide, raw, span.head + (span.first + i) * kCount, span.target, g, logits);
        }
        __syncthreads();  // the edge may lie over vectors that another warp has yet to load
    } else {
        int i = count - 1 - start;
        for (; i - (kLoadsPerStore - 1) * step >= 0; i -= kLoadsPerStore * step) {
            Vector16 raw[kLoadsPerStore];
#pragma unroll
            for (int u = 0; u < kLoadsPerStore; ++u) raw[u] = body[span.first + i - u * step];
#pragma unroll
            for (int u = 0; u < kLoadsPerStore; ++u) {
                const int column = span.head + (span.first + i - u * step) * kCount;
                write_vector(out, wide, raw[u], column, span.target, g, logits);
            }
        }
        for (; i >= 0; i -= step) {
            const Vector16 raw = body[span.first + i];
            write_vector(out, wide, raw, span.head + (span.first + i) * kCount, span.target, g, logits);
        }
    }
    if (edge >= 0) Elements<Out>::store(out + edge, gradient_of(edge_z, edge, span.target, g, logits));
}

// Zeros, without a look at the tile.
template <int kCount, class Out>
__device__ __forceinline__ void write_zeros(Out* out, const Span& span, int edge) {
    constexpr float kZeros[kCount] = {};
    const bool wide = stores_wide<kCount>(out + span.head);
    for (int i = span.first + static_cast<int>(threadIdx.x); i < span.last; i += static_cast<int>(blockDim.x))
        store_values(out + span.head + i * kCount, wide, kZeros);
    if (edge >= 0) Elements<Out>::store(out + edge, 0.0f);
}

}  // namespace
}  // namespace robust_dpo
