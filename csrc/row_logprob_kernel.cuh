// The row kernel for GPUs, compiled for each dtype of the tile.
//
// A row is cut into the elements before its first 16-byte boundary, whole vectors of 16 bytes and the elements behind
// them; the two ends, fewer than a vector each, are the edge. One block takes the row, or several blocks ("segments") a
// run of its vectors each, and the first of them the edge. Every thread keeps the running pair of an online softmax; warps,
// blocks and segments merge theirs in a fixed tree, so the bits are the same in every run. Then each block writes the
// gradient of its part. In the first touch it may have kept that part in shared memory (`keep`): then HBM is read once
// whatever the caches do. Segments exchange their sums through the shared memory of a cluster, in one launch, or through
// global memory, in two.
#pragma once

#include "cuda_device.cuh"
#include "row_finish.h"
#include "row_logprob_cuda.h"

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

// The column of the edge that this thread holds, or −1.
template <int kCount>
__device__ __forceinline__ int edge_column(const Span& span, int64_t vocab, int rank) {
    const int t = static_cast<int>(threadIdx.x);
    if (rank != 0 || t >= 2 * kCount) return -1;
    const int column = t < kCount ? t : span.head + span.vectors * kCount + t - kCount;
    return t < kCount ? (t < span.head ? column : -1) : (column < vocab ? column : -1);
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

// What a row's gradient needs.
struct Gradient {
    float shift, factor, target_factor;
};

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
    if (wide) {
        store_vector(out + column, y);
    } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) Elements<Out>::store(out + column + k, y[k]);
    }
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
    constexpr int kStore = kCount * sizeof(Out) < kVectorBytes ? kCount * sizeof(Out) : kVectorBytes;
    const bool wide = reinterpret_cast<uintptr_t>(out + span.head) % kStore == 0;
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
#pragma unroll 2
        for (int i = count - 1 - start; i >= 0; i -= step) {
            const Vector16 raw = body[span.first + i];
            write_vector(out, wide, raw, span.head + (span.first + i) * kCount, span.target, g, logits);
        }
    }
    if (edge >= 0) Elements<Out>::store(out + edge, gradient_of(edge_z, edge, span.target, g, logits));
}

template <class Tile, bool kTransformed, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, 2)
    row_logprob_kernel(const RowLogprobArgs a, const int segments, const bool keep, const RowPhase phase,
                       Partial* const partials) {
    constexpr int kCount = Elements<Tile>::kCount;
    RowShared& shared = *reinterpret_cast<RowShared*>(shared_memory());
    const int64_t row = blockIdx.x / segments;
    const int rank = static_cast<int>(blockIdx.x % segments);
    const auto* tile = static_cast<const Tile*>(a.tile) + row * a.tile_stride;
    const Logits<Tile, kTransformed> logits{static_cast<const float*>(a.bias), static_cast<float>(a.scale),
                                            static_cast<float>(a.softcap)};

    Span span;
    const int vocab = static_cast<int>(a.vocab);
    const int to_boundary =
        static_cast<int>(-reinterpret_cast<uintptr_t>(tile) % kVectorBytes) / static_cast<int>(sizeof(Tile));
    span.head = to_boundary < vocab ? to_boundary : vocab;
    span.vectors = (vocab - span.head) / kCount;
    const int share = (span.vectors + segments - 1) / segments;
    span.first = min(rank * share, span.vectors);
    span.last = min(span.first + share, span.vectors);
    const int64_t target = a.targets[row];
    const bool inside = target >= 0 && target < a.vocab;
    span.target = inside ? static_cast<int>(target) : -1;
    const auto* body = reinterpret_cast<const Vector16*>(tile + span.head);
    auto* kept = keep ? reinterpret_cast<Vector16*>(shared_memory() + kRowSharedBytes) : nullptr;
    const int edge = edge_column<kCount>(span, a.vocab, rank);
    const float edge_z = edge >= 0 ? Elements<Tile>::load(tile + edge) : 0.0f;

    Partial* const of_row = partials + row * segments;
    ExpSums<float> others;
    float target_logit = NAN;
    if (phase == RowPhase::kFinish) {
        others = merge_partials(of_row, segments);
        target_logit = of_row->target_logit;
    } else {
        if (inside) target_logit = logits.of(Elements<Tile>::load(tile + span.target), span.target).value;
        others = merge_block(own_sums<kEntropy>(body, span, edge, edge_z, logits, kept), shared);
        if (phase == RowPhase::kPartials) {
            if (threadIdx.x == 0) of_row[rank] = {others, target_logit};
            return;
        }
        if (segments > 1) {
            if (threadIdx.x == 0) shared.of_block.sums = others;
            cluster_arrive();
            cluster_wait();
            others = *cluster_peer(&shared.of_block.sums, 0);
            for (int s = 1; s < segments; ++s) others.merge(*cluster_peer(&shared.of_block.sums, s));
            cluster_arrive();  // waited for at the end: no block may be gone while another still reads its sums
        }
    }

    const RowResult result = finish_row(others, target_logit, inside);
    if (rank == 0 && threadIdx.x == 0) {
        static_cast<float*>(a.logp)[row] = result.logp;
        static_cast<float*>(a.lse)[row] = result.lse;
        if constexpr (kEntropy) static_cast<float*>(a.entropy)[row] = result.entropy;
    }
    if (a.grad != nullptr) {
        const float row_scale = a.row_scale == nullptr ? 1.0f : static_cast<const float*>(a.row_scale)[row];
        const Gradient g{result.shift, row_scale / result.total, row_scale * result.target_minus_one};
        const int64_t start = row * a.grad_stride;
        const auto write = [&](auto* out) { write_gradient(out + start, body, kept, span, edge, edge_z, g, logits); };
        if (a.grad_dtype == Dtype::kBFloat16) {
            write(static_cast<BFloat16*>(a.grad));
        } else if (a.grad_dtype == Dtype::kFloat16) {
            write(static_cast<Float16*>(a.grad));
        } else {
            write(static_cast<float*>(a.grad));
        }
    }
    if (phase == RowPhase::kWhole && segments > 1) cluster_wait();
}

template <class Tile>
size_t row_shared_bytes(const RowLogprobArgs& a, const RowPlan& plan) {
    if (!plan.keep) return kRowSharedBytes;
    const int64_t vectors = a.vocab / Elements<Tile>::kCount;
    return kRowSharedBytes + static_cast<size_t>((vectors + plan.segments - 1) / plan.segments) * kVectorBytes;
}

template <class Tile, bool kTransformed, bool kEntropy>
void launch_rows(const CudaTarget& target, const RowLogprobArgs& a, const RowPlan& plan) {
    const std::string what = "row_logprob [" + std::to_string(a.rows) + ", " + std::to_string(a.vocab) + "]";
    auto* partials = reinterpret_cast<Partial*>(plan.partials);
    const auto run = [&](RowPhase phase, int segments, int cluster, size_t shared) {
        const CudaGrid grid{a.rows * segments, plan.threads, cluster, shared};
        launch(target, grid, what, row_logprob_kernel<Tile, kTransformed, kEntropy>, a, segments, plan.keep, phase, partials);
    };
    if (plan.segments == 1 || plan.cluster)
        return run(RowPhase::kWhole, plan.segments, plan.segments, row_shared_bytes<Tile>(a, plan));
    run(RowPhase::kPartials, plan.segments, 1, kRowSharedBytes);
    run(RowPhase::kFinish, plan.segments, 1, kRowSharedBytes);
}

template <class Tile>
void launch_rows_of(const CudaTarget& target, const RowLogprobArgs& a, const RowPlan& plan) {
    const bool transformed = a.bias != nullptr || a.softcap != 0.0, entropy = a.entropy != nullptr;
    if (transformed && entropy) return launch_rows<Tile, true, true>(target, a, plan);
    if (transformed) return launch_rows<Tile, true, false>(target, a, plan);
    if (entropy) return launch_rows<Tile, false, true>(target, a, plan);
    launch_rows<Tile, false, false>(target, a, plan);
}

}  // namespace
}  // namespace robust_dpo
