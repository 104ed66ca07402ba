// group_epilogue on a GPU: one block for each group, and the last of them to finish takes the scores together.
//
// The sums of a group's log-probs are spread over the block's warps, and its loss over its responses, one thread for each.
// Everything behind the fp32 vectors is double, in an order that depends on the shape of the launch alone.
#include "cuda_device.cuh"
#include "operators_cuda.h"

namespace robust_dpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// The last block writes the rows of so few groups in less time than the 3 µs of another launch; each warp takes one.
constexpr int64_t kGroupsOfLastBlock = kWarps;

struct GroupShared {
    double logp[kMaxWidth], ref[kMaxWidth], length[kMaxWidth], quality[kMaxWidth];
    Memo<double> memos[kMaxWidth];
    double of_warp[2][kMaxWidth > kWarps ? kMaxWidth : kWarps];  // sums of both models, by response and share of it
    double value[kWarps], divisor[kWarps];
    bool is_last;
};

struct Sum {
    __device__ double operator()(double a, double b) const { return a + b; }
};

// The larger; a NaN loses, and reaches the sum of the weights instead.
struct Larger {
    __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

template <class Combine>
__device__ double combine_lanes(double x, Combine combine) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = combine(x, shuffle_xor(x, mask));
    return x;
}

// Of all threads; `scratch` [kWarps] must not be in use.
template <class Combine>
__device__ double combine_block(double x, double* scratch, Combine combine) {
    x = combine_lanes(x, combine);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    double all = scratch[0];
    for (int warp = 1; warp < kWarps; ++warp) all = combine(all, scratch[warp]);
    __syncthreads();
    return all;
}

// Warps that share a response: all 8 for a group of one, one for each response from 8 on.
__device__ __forceinline__ int warps_per_response(int size) { return size >= kWarps ? 1 : kWarps / size; }

// Sums of the counted log-probs of a group's responses, policy and reference, in doubles.
__device__ void sum_responses(const GroupEpilogueArgs& a, int64_t first, int size, GroupShared& shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, shares = warps_per_response(size);
    for (int piece = warp; piece < size * shares; piece += kWarps) {
        const int64_t response = first + piece / shares;
        const int64_t start = a.seq_offsets[response], stop = a.seq_offsets[response + 1];
        double sum = 0.0, ref_sum = 0.0;
#pragma unroll 4
        for (int64_t row = start + piece % shares * kWarp + lane; row < stop; row += shares * kWarp) {
            sum += counted_logp(a, a.token_logps, row);
            if (a.live) ref_sum += counted_logp(a, a.ref_token_logps, row);
        }
        sum = combine_lanes(sum, Sum{});
        ref_sum = combine_lanes(ref_sum, Sum{});
        if (lane == 0) {
            shared.of_warp[0][piece] = sum;
            shared.of_warp[1][piece] = ref_sum;
        }
    }
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i < size) {
        double sum = 0.0, ref_sum = 0.0;
        for (int share = 0; share < shares; ++share) {
            sum += shared.of_warp[0][i * shares + share];
            ref_sum += shared.of_warp[1][i * shares + share];
        }
        const int64_t response = first + i;
        shared.logp[i] = sum;
        shared.ref[i] = reference_logp(a, response, ref_sum);
        shared.length[i] = static_cast<double>(a.lengths[response]);
        shared.quality[i] = quality(a, response, i);
        a.logps[response] = static_cast<float>(sum);
        if (a.live) a.ref_logps[response] = static_cast<float>(ref_sum);
    }
    __syncthreads();
}

template <class Loss>
__device__ void solve(const GroupEpilogueArgs& a, int64_t group_index, int64_t first, int size, GroupShared& shared) {
    const Group<double> group{shared.logp, shared.ref, shared.length, shared.quality, size};
    const LossOptions<double> options = loss_options(a);
    const int i = static_cast<int>(threadIdx.x);
    if (i < size) shared.memos[i] = Loss::memo(group, i, options);
    __syncthreads();
    LossPart<double> part{0.0, 0.0, 0.0};
    if (i < size) part = Loss::part(group, shared.memos, i, options);
    const double value = combine_block(part.value, shared.value, Sum{});
    double divisor = combine_block(part.divisor, shared.divisor, Sum{});
    divisor = divisor > 1.0 ? divisor : 1.0;
    if (i < size) a.derivative[first + i] = static_cast<float>(part.slope / divisor);
    if (i == 0) a.losses[group_index] = static_cast<float>(value / divisor);
}

// Takes the chunk's scores into the state.
__device__ void advance(const GroupEpilogueArgs& a, GroupShared& shared) {
    double highest = -INFINITY;
    for (int64_t g = a.first_group + threadIdx.x; g < a.last_group; g += kThreads)
        highest = Larger{}(highest, group_score(a, g));
    highest = combine_block(highest, shared.value, Larger{});
    TiltState<double> state = tilt_state(a);
    state.make_room(highest, a.headroom);
    double total = 0.0;
    for (int64_t g = a.first_group + threadIdx.x; g < a.last_group; g += kThreads) total += state.weight(group_score(a, g));
    total = combine_block(total, shared.value, Sum{});
    if (threadIdx.x == 0) {
        a.state[0] = state.shift;
        a.state[1] = state.total + total;
        a.state[2] = state.rescale;
    }
    __syncthreads();
}

// Coefficients of the rows of a group, by some threads, under the shift now in force.
__device__ void write_rows(const GroupEpilogueArgs& a, int64_t group, int thread, int threads) {
    const double weight = tilt_state(a).weight(group_score(a, group)) * group_calibration(a, group);
    for (int64_t response = a.group_offsets[group]; response < a.group_offsets[group + 1]; ++response) {
        const float coefficient = row_coefficient(a, response, weight);
        const int64_t stop = a.seq_offsets[response + 1];
#pragma unroll 4
        for (int64_t row = a.seq_offsets[response] + thread; row < stop; row += threads)
            a.coefficients[row] = a.counted == nullptr || a.counted[row] != 0 ? coefficient : 0.0f;
    }
}

template <class Loss>
__global__ void __launch_bounds__(kThreads) group_epilogue_kernel(const GroupEpilogueArgs a, int32_t* const counter) {
    GroupShared& shared = *reinterpret_cast<GroupShared*>(shared_memory());
    const int64_t group = a.first_group + blockIdx.x, first = a.group_offsets[group];
    const int size = static_cast<int>(a.group_offsets[group + 1] - first);
    sum_responses(a, first, size, shared);
    solve<Loss>(a, group, first, size, shared);
    if (!a.tilted) return;

    // What this block has stored is visible to all before it counts as done; the block that counts last sees everything.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.is_last = atomicAdd(counter, 1) == static_cast<int32_t>(gridDim.x) - 1;
        if (shared.is_last) *counter = 0;  // for the next launch
    }
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    advance(a, shared);
    const int64_t groups = a.last_group - a.first_group;
    if (groups > kGroupsOfLastBlock) return;
    const int warp = threadIdx.x / kWarp;
    if (warp < groups) write_rows(a, a.first_group + warp, threadIdx.x % kWarp, kWarp);
}

__global__ void __launch_bounds__(kThreads) row_coefficients_kernel(const GroupEpilogueArgs a) {
    write_rows(a, a.first_group + blockIdx.x, threadIdx.x, kThreads);
}

__global__ void no_groups_kernel(double* const state) { state[2] = 1.0; }

}  // namespace

void group_epilogue_cuda(const CudaTarget& target, const GroupEpilogueArgs& args, int loss, int widest, int32_t* counter) {
    const int64_t groups = args.last_group - args.first_group;
    const std::string shape = " [" + std::to_string(groups) + " groups of up to " + std::to_string(widest) + "]";
    if (groups == 0) {
        if (args.tilted) launch(target, {1, 1, 1, 0}, "group_epilogue" + shape, no_groups_kernel, args.state);
        return;
    }
    with_loss(loss, [&](auto chosen) {
        using Loss = decltype(chosen);
        launch(target, {groups, kThreads, 1, sizeof(GroupShared)}, std::string("group_epilogue ") + Loss::kName + shape,
               group_epilogue_kernel<Loss>, args, counter);
    });
    if (args.tilted && groups > kGroupsOfLastBlock)
        launch(target, {groups, kThreads, 1, 0}, "row_coefficients" + shape, row_coefficients_kernel, args);
}

}  // namespace robust_dpo
