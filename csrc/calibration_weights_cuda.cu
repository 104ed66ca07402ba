// calibration_weights on a GPU: one thread for each response.
#include "calibration_weights.h"
#include "cuda_device.cuh"
#include "operators_cuda.h"

namespace robust_dpo {
namespace {

constexpr int kThreads = 256;

template <class Prob>
struct Load {
    __device__ float operator()(const Prob* probs, int64_t i) const { return Elements<Prob>::load(probs + i); }
};

template <>
struct Load<double> {
    __device__ double operator()(const double* probs, int64_t i) const { return probs[i]; }
};

template <class Prob, class Acc>
__global__ void __launch_bounds__(kThreads) calibration_weights_kernel(const CalibrationWeightsArgs a) {
    const int64_t response = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (response >= a.responses) return;
    static_cast<Acc*>(a.weights)[response] = calibration_weight<Acc, Acc, Prob>(a, response, Load<Prob>{});
}

}  // namespace

void calibration_weights_cuda(const CudaTarget& target, const CalibrationWeightsArgs& args) {
    if (args.responses == 0) return;
    const auto run = [&](auto kernel) {
        const std::string shape = " [" + std::to_string(args.responses) + ", " + std::to_string(args.classifiers) + "]";
        launch(target, {(args.responses + kThreads - 1) / kThreads, kThreads, 1, 0}, "calibration_weights" + shape, kernel, args);
    };
    switch (args.prob_dtype) {
        case Dtype::kFloat64: return run(calibration_weights_kernel<double, double>);
        case Dtype::kBFloat16: return run(calibration_weights_kernel<BFloat16, float>);
        case Dtype::kFloat16: return run(calibration_weights_kernel<Float16, float>);
        default: return run(calibration_weights_kernel<float, float>);
    }
}

}  // namespace robust_dpo
