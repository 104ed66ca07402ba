#include "row_logprob_kernel.cuh"

namespace robust_dpo {

void row_logprob_cuda_fp16(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan) {
    launch_rows_of<Float16>(target, args, plan);
}

}  // namespace robust_dpo
