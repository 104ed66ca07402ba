// The dtype of the tile chooses the translation unit.
#include "row_logprob_cuda.h"

namespace robust_dpo {

void row_logprob_cuda(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan) {
    if (args.rows == 0) return;
    switch (args.tile_dtype) {
        case Dtype::kBFloat16: return row_logprob_cuda_bf16(target, args, plan);
        case Dtype::kFloat16: return row_logprob_cuda_fp16(target, args, plan);
        default: return row_logprob_cuda_fp32(target, args, plan);
    }
}

}  // namespace robust_dpo
