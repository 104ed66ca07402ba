// group_epilogue on CPU and GPU: from token log-probs to group losses, scores and the coefficients of rows.
//
// What is computed and in what order of chunks is written in kernels/group_epilogue.py; here are the arguments and what a
// kernel does with one row, response or group. Everything between the fp32 vectors is double: the blocks are small, and
// robust weights are exponentials of what comes out. Raw pointers; the Python launchers allocate and check.
#pragma once

#include <cstdint>

#include "formulas.h"
#include "group_losses.h"

namespace robust_dpo {

// Vectors of rows may be empty, and then null though they are there: `live` and `tilted` say whether they are.
struct GroupEpilogueArgs {
    const float* token_logps;      // [rows]
    const float* ref_token_logps;  // [rows] of a live reference
    const uint8_t* counted;        // [rows] 0 or 1, or null where all count
    const int64_t* seq_offsets;    // [responses + 1]
    const int64_t* group_offsets;  // [groups + 1]
    const float* lengths;          // [responses] ≥ 1
    const float* scores;           // [responses], or null: best first
    const float* calibration;      // [groups], or null for ones
    float* logps;                  // [responses] out
    float* ref_logps;              // [responses] out with a live reference, in with a cached one, or null for neither
    float* losses;                 // [groups] out
    float* derivative;             // [responses] out, ∂ℓ/∂logp
    float* coefficients;           // [rows] out where tilted
    double* state;                 // [3] (shift, Σ e^{s − shift}, rescale) in and out where tilted
    bool live;                     // there is a live reference
    bool tilted;                   // scores, state and coefficients are wanted, not losses and derivatives alone
    int64_t first_group, last_group;
    double temperature, headroom;
    double first, second;  // the loss's options
};

namespace {

RDPO_HOST_DEVICE inline LossOptions<double> loss_options(const GroupEpilogueArgs& a) { return {a.first, a.second}; }

// A row's log-prob, 0 where it belongs to nobody. Where it does not count it may be NaN.
RDPO_HOST_DEVICE inline double counted_logp(const GroupEpilogueArgs& a, const float* logps, int64_t row) {
    return a.counted == nullptr || a.counted[row] != 0 ? static_cast<double>(logps[row]) : 0.0;
}

// Under the reference; `sum` is that of its ref_token_logps, where the reference is live.
RDPO_HOST_DEVICE inline double reference_logp(const GroupEpilogueArgs& a, int64_t response, double sum) {
    if (a.live) return sum;
    return a.ref_logps == nullptr ? 0.0 : static_cast<double>(a.ref_logps[response]);
}

// What the responses of a group are ranked by; `slot` is the position in the group.
RDPO_HOST_DEVICE inline double quality(const GroupEpilogueArgs& a, int64_t response, int64_t slot) {
    return a.scores == nullptr ? -static_cast<double>(slot) : static_cast<double>(a.scores[response]);
}

RDPO_HOST_DEVICE inline double group_calibration(const GroupEpilogueArgs& a, int64_t group) {
    return a.calibration == nullptr ? 1.0 : static_cast<double>(a.calibration[group]);
}

// Of the loss as it is stored, so that all who normalise by the stored losses agree on the score.
RDPO_HOST_DEVICE inline double group_score(const GroupEpilogueArgs& a, int64_t group) {
    return tilted_score(static_cast<double>(a.losses[group]), group_calibration(a, group), a.temperature);
}

RDPO_HOST_DEVICE inline TiltState<double> tilt_state(const GroupEpilogueArgs& a) {
    return {a.state[0], a.state[1], a.state[2]};
}

// What softmax − onehot of every counted row of a response is to be multiplied by; `weight` is e^{s − shift}·h of its group.
RDPO_HOST_DEVICE inline float row_coefficient(const GroupEpilogueArgs& a, int64_t response, double weight) {
    return static_cast<float>(-weight * static_cast<double>(a.derivative[response]));
}

}  // namespace

// Groups first_group … last_group − 1 on the CPU, on up to `threads` threads; `loss` is a code of GroupLosses.
void group_epilogue_cpu(const GroupEpilogueArgs& args, int loss, int threads);

}  // namespace robust_dpo
