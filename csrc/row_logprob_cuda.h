// row_logprob on NVIDIA GPUs: what the binding calls. Raw pointers of the device; the Python launcher allocates and checks.
#pragma once

#include "cuda_launch.h"
#include "row_logprob.h"

namespace robust_dpo {

// How a launch is cut (kernels/row_plan_cuda.py decides). Where the results are known, blocks neither keep nor exchange anything.
struct RowPlan {
    int threads;   // of a block: a multiple of 32, at most kRowThreads
    int segments;  // blocks that share a row
    bool cluster;  // they are a cluster (at most 8 of them) and exchange their sums in shared memory, in one launch
    bool keep;     // a block keeps its part of the row in shared memory between the two touches
    float* partials;  // [rows, segments, 4] where several blocks without a cluster share a row: two launches
};

constexpr int kRowThreads = 512;

// Which part of row_logprob a launch does.
enum class RowPhase : int { kWhole, kPartials, kFinish, kGradient };

void row_logprob_cuda(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan);

// One translation unit for each dtype of the tile, so that they compile side by side.
void row_logprob_cuda_fp32(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan);
void row_logprob_cuda_bf16(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan);
void row_logprob_cuda_fp16(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan);

}  // namespace robust_dpo
