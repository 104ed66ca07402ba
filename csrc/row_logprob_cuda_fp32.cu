#include "row_logprob_kernel.cuh"

namespace robust_dpo {

void row_logprob_cuda_fp32(const CudaTarget& target, const RowLogprobArgs& args, const RowPlan& plan) {
    launch_rows_of<float>(target, args, plan);
}

}  // namespace robust_dpo
