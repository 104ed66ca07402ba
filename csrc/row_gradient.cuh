// The second touch of a row: softmax − onehot, from its logits and its results. A row of nobody gets zeros.
#pragma once

#include "row_logprob.h"
#include "row_span.cuh"

namespace robust_dpo {
namespace {

// Vectors that a thread loads before it stores the first where it loads them a second time.
constexpr int kLoadsPerStore = 2;

// What a row's gradient needs: e^{v − shift}·factor of a logit v, and target_factor at the target.
struct Gradient {
    float shift, factor, target_factor;
};

// Where a row's gradient goes, kCount elements at a time. Its dtype is a branch that all threads take alike: loops for each
// dtype would double the time to compile.
template <int kCount>
struct GradientRow {
    void* row;
    Dtype dtype;
    bool wide;  // vectors of the tile go to addresses for one store

    __device__ __forceinline__ GradientRow(const RowLogprobArgs& a, int64_t i, const Span& span) : dtype(a.grad_dtype) {
        const int size = dtype == Dtype::kFloat32 ? 4 : 2;
        row = static_cast<unsigned char*>(a.grad) + i * a.grad_stride * size;
        const int bytes = min(kCount * size, kVectorBytes);
        wide = (reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(span.head * size)) % bytes == 0;
    }

    // Calls `store` with a column's address, as what it is.
    template <class Store>
    __device__ __forceinline__ void at(int column, const Store& store) const {
        if (dtype == Dtype::kBFloat16) return store(static_cast<BFloat16*>(row) + column);
        if (dtype == Dtype::kFloat16) return store(static_cast<Float16*>(row) + column);
        store(static_cast<float*>(row) + column);
    }

    __device__ __forceinline__ void store_one(int column, float y) const {
        at(column, [&](auto* out) { store_element(out, y); });
    }

    __device__ __forceinline__ void store(int column, const float (&y)[kCount]) const {
        at(column, [&](auto* out) {
            if (wide) return store_vector(out, y);
#pragma unroll
            for (int k = 0; k < kCount; ++k) store_element(out + k, y[k]);
        });
    }
};

template <class Tile, bool kTransformed>
__device__ __forceinline__ float gradient_of(float z, int column, int target, const Gradient& g,
                                             const Logits<Tile, kTransformed>& logits) {
    const ValueSlope<float> v = logits.of(z, column);
    return (column == target ? g.target_factor : fast_exp(v.value - g.shift) * g.factor) * v.slope;
}

template <int kCount, class Tile, bool kTransformed>
__device__ __forceinline__ void write_vector(const GradientRow<kCount>& out, const Vector16 raw, int column, int target,
                                             const Gradient& g, const Logits<Tile, kTransformed>& logits) {
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
    out.store(column, y);
}

// A gradient narrower than the tile may lie over the front of the same row: its element i covers bytes of elements ≤ i of
// the tile. Where the part is kept, all has been read before anything is written. Otherwise vectors go upwards with a
// barrier between the loads of a step and its stores. A gradient of the tile's width covers what the same thread has just
// loaded; then vectors go downwards, because the end of the row was touched last and is the likeliest to be cached still.
template <int kCount, class Tile, bool kTransformed>
__device__ __forceinline__ void write_gradient(const GradientRow<kCount>& out, const Vector16* body, const Vector16* kept,
                                               const Span& span, int edge, float edge_z, const Gradient& g,
                                               const Logits<Tile, kTransformed>& logits) {
    const int count = span.last - span.first, step = static_cast<int>(blockDim.x);
    const int start = static_cast<int>(threadIdx.x);
    const auto write = [&](const Vector16& raw, int i) {
        write_vector(out, raw, span.head + (span.first + i) * kCount, span.target, g, logits);
    };
    if (kept != nullptr) {
#pragma unroll 2
        for (int i = start; i < count; i += step) write(kept[i], i);
    } else if (sizeof(Tile) == sizeof(float) && out.dtype != Dtype::kFloat32) {
        for (int block = 0; block < count; block += step) {
            const int i = block + start;
            Vector16 raw{};
            if (i < count) raw = body[span.first + i];
            __syncthreads();
            if (i < count) write(raw, i);
        }
        __syncthreads();  // the edge may lie over vectors that another warp has yet to load
    } else {
        int i = count - 1 - start;
        for (; i - (kLoadsPerStore - 1) * step >= 0; i -= kLoadsPerStore * step) {
            Vector16 raw[kLoadsPerStore];
#pragma unroll
            for (int u = 0; u < kLoadsPerStore; ++u) raw[u] = body[span.first + i - u * step];
#pragma unroll
            for (int u = 0; u < kLoadsPerStore; ++u) write(raw[u], i - u * step);
        }
        for (; i >= 0; i -= step) write(body[span.first + i], i);
    }
    if (edge >= 0) out.store_one(edge, gradient_of(edge_z, edge, span.target, g, logits));
}

// Zeros, without a look at the tile.
template <int kCount>
__device__ __forceinline__ void write_zeros(const GradientRow<kCount>& out, const Span& span, int edge) {
    constexpr float kZeros[kCount] = {};
    for (int i = span.first + static_cast<int>(threadIdx.x); i < span.last; i += static_cast<int>(blockDim.x))
        out.store(span.head + i * kCount, kZeros);
    if (edge >= 0) out.store_one(edge, 0.0f);
}

}  // namespace
}  // namespace robust_dpo
