// The small operators on NVIDIA GPUs: what the binding calls. Raw pointers of the device; Python launchers allocate and check.
#pragma once

#include "calibration_weights.h"
#include "cuda_launch.h"
#include "group_epilogue.h"

namespace robust_dpo {

// Responses of a group that one block of group_epilogue takes.
constexpr int kMaxWidth = 256;

// Groups first_group … last_group − 1, of up to `widest` ≤ kMaxWidth responses. `loss` is a code of GroupLosses; `counter` an
// int32 of the device that is 0 and that no launch on another stream uses meanwhile; it is 0 again afterwards.
void group_epilogue_cuda(const CudaTarget& target, const GroupEpilogueArgs& args, int loss, int widest, int32_t* counter);

void calibration_weights_cuda(const CudaTarget& target, const CalibrationWeightsArgs& args);

// total[count] *= factor, and nothing but a read of the factor where that is 1. On at most `blocks` blocks.
void rescale_cuda(const CudaTarget& target, void* total, bool total_is_double, int64_t count, const void* factor,
                  bool factor_is_double, int blocks);

}  // namespace robust_dpo
