// The row kernel for GPUs, compiled for each dtype of the tile: sums (row_sums.cuh), then the gradient (row_gradient.cuh).
//
// In the first touch a block may have kept its part of the row in shared memory (`keep`): then HBM is read once whatever the
// caches do. Segments exchange their sums through the shared memory of a cluster, in one launch, or through global memory,
// in two. Where the results are known, there is the second touch only.
#pragma once

#include "row_finish.h"
#include "row_gradient.cuh"
#include "row_sums.cuh"

namespace robust_dpo {
namespace {

template <bool kEntropy>
__device__ __forceinline__ void store_result(const RowLogprobArgs& a, int64_t row, const RowResult& result) {
    static_cast<float*>(a.logp)[row] = result.logp;
    static_cast<float*>(a.lse)[row] = result.lse;
    if constexpr (kEntropy) static_cast<float*>(a.entropy)[row] = result.entropy;
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
    const int edge = edge_column<kCount>(span, a.vocab, rank);
    if (target == kIgnoreIndex) {  // the same for all blocks of a cluster, so none waits for another
        if (phase == RowPhase::kPartials) return;
        if (phase != RowPhase::kGradient && rank == 0 && threadIdx.x == 0) store_result<kEntropy>(a, row, {});
        if (a.grad != nullptr) write_zeros(GradientRow<kCount>(a, row, span), span, edge);
        return;
    }
    const auto* body = reinterpret_cast<const Vector16*>(tile + span.head);
    auto* kept = keep ? reinterpret_cast<Vector16*>(shared_memory() + kRowSharedBytes) : nullptr;
    const float edge_z = edge >= 0 ? Elements<Tile>::load(tile + edge) : 0.0f;

    float shift, total, target_minus_one;
    if (phase == RowPhase::kGradient) {
        const float logp = static_cast<const float*>(a.logp)[row];
        shift = static_cast<const float*>(a.lse)[row];
        total = 1.0f;
        target_minus_one = softmax_minus_one(logp);
        if (inside && logp > -INFINITY) {
            const float z = Elements<Tile>::load(static_cast<const Tile*>(a.target_logits) + row);
            const SumError<float> lse = exact_difference(logits.of(z, span.target).value, logp);
            shift = lse.sum;
            total = std::exp(lse.error);
        }
    } else {
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
        if (rank == 0 && threadIdx.x == 0) store_result<kEntropy>(a, row, result);
        shift = result.shift;
        total = result.total;
        target_minus_one = result.target_minus_one;
    }
    if (a.grad != nullptr) {
        const float row_scale = a.row_scale == nullptr ? 1.0f : static_cast<const float*>(a.row_scale)[row];
        const Gradient g{shift, row_scale / total, row_scale * target_minus_one};
        write_gradient(GradientRow<kCount>(a, row, span), body, kept, span, edge, edge_z, g, logits);
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
    const auto run = [&](RowPhase phase, int cluster, bool keep, size_t shared) {
        const CudaGrid grid{a.rows * plan.segments, plan.threads, cluster, shared};
        const auto kernel = row_logprob_kernel<Tile, kTransformed, kEntropy>;
        launch(target, grid, what, kernel, a, plan.segments, keep, phase, partials);
    };
    if (a.target_logits != nullptr) return run(RowPhase::kGradient, 1, false, kRowSharedBytes);
    if (plan.segments == 1 || plan.cluster)
        return run(RowPhase::kWhole, plan.segments, plan.keep, row_shared_bytes<Tile>(a, plan));
    run(RowPhase::kPartials, 1, false, kRowSharedBytes);
    run(RowPhase::kFinish, 1, false, kRowSharedBytes);
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
