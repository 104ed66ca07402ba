// calibration_weights on CPU and GPU: classifier probabilities → h. Contract: kernels/calibration_weights.py.
#pragma once

#include <cstdint>

#include "formulas.h"
#include "row_logprob.h"

namespace robust_dpo {

// "acc" is double for float64 probabilities and float for all others.
struct CalibrationWeightsArgs {
    const void* probs;   // [responses, classifiers] of prob_dtype, contiguous
    const void* betas;   // [period, slots] acc, contiguous; of response s in row s mod period
    const void* gammas;  // [slots] acc
    void* weights;       // [responses] acc, out
    int64_t responses, classifiers, slots, period;
    double offset;  // α (mixture) or 1/n (paper)
    double clip;    // upper bound of h, or infinity
    Dtype prob_dtype;
    bool paper;
};

namespace {

// h of one response in precision T, from its row of probabilities; `load(p, i)` is entry i of p as a T.
// mixture: 1 / (α + Σ_i β_i (1 − c_i)/(γ_i c_i)); a probability of 0 gives infinity there, and 0 in the end.
// paper: the mean over i of γ_i c_i / (β_i (1 − c_i) + 1/n).
template <class T, class Acc, class Prob, class Load>
RDPO_HOST_DEVICE T calibration_weight(const CalibrationWeightsArgs& a, int64_t response, Load load) {
    const Prob* probs = static_cast<const Prob*>(a.probs) + response * a.classifiers;
    const Acc* betas = static_cast<const Acc*>(a.betas) + response % a.period * a.slots;
    const Acc* gammas = static_cast<const Acc*>(a.gammas);
    T sum = 0;
    for (int64_t i = 0; i < a.slots; ++i) {
        // Of one classifier, every slot reads the same probability.
        const T c = load(probs, a.classifiers == 1 ? 0 : i), beta = betas[i], gamma = gammas[i];
        const T odds = gamma * c, others = beta * (T(1) - c);
        sum += a.paper ? odds / (others + static_cast<T>(a.offset)) : others / odds;
    }
    const T h = a.paper ? sum / static_cast<T>(a.slots) : T(1) / (static_cast<T>(a.offset) + sum);
    return h > static_cast<T>(a.clip) ? static_cast<T>(a.clip) : h;
}

}  // namespace

// On up to `threads` threads.
void calibration_weights_cpu(const CalibrationWeightsArgs& args, int threads);

}  // namespace robust_dpo
