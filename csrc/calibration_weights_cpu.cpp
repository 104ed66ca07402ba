// calibration_weights on the CPU, in double whatever the probabilities are: it costs nothing here.
#include "calibration_weights.h"

#include <algorithm>

#include "element.h"
#include "parallel.h"

namespace robust_dpo {
namespace {

template <class Acc, class Prob>
void weights_of(const CalibrationWeightsArgs& a, int64_t begin, int64_t end) {
    const auto load = [](const Prob* probs, int64_t i) {
        if constexpr (sizeof(Prob) == sizeof(double)) return probs[i];
        else return static_cast<double>(to_float(probs[i]));
    };
    Acc* weights = static_cast<Acc*>(a.weights);
    for (int64_t s = begin; s < end; ++s) weights[s] = static_cast<Acc>(calibration_weight<double, Acc, Prob>(a, s, load));
}

void weights_of_range(const void* context, int64_t begin, int64_t end) {
    const auto& a = *static_cast<const CalibrationWeightsArgs*>(context);
    switch (a.prob_dtype) {
        case Dtype::kFloat64: return weights_of<double, double>(a, begin, end);
        case Dtype::kBFloat16: return weights_of<float, BFloat16>(a, begin, end);
        case Dtype::kFloat16: return weights_of<float, Float16>(a, begin, end);
        case Dtype::kFloat32: return weights_of<float, float>(a, begin, end);
    }
}

}  // namespace

void calibration_weights_cpu(const CalibrationWeightsArgs& args, int threads) {
    // Two divisions for each slot: a piece of 16 K of them takes some 100 µs, several times what waking a thread costs.
    const int64_t grain = std::max<int64_t>(1, 16384 / args.slots);
    parallel_ranges(args.responses, grain, threads, weights_of_range, &args);
}

}  // namespace robust_dpo
