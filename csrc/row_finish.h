// From the exponential sums of a row's other logits to what row_logprob gives back.
#pragma once

#include "formulas.h"

namespace robust_dpo {
namespace {

struct RowResult {
    float logp, lse, entropy;
    float shift;              // largest logit of the row, target included
    float total;              // Σ e^{v − shift}, target included
    float target_minus_one;   // softmax − 1 of the target
};

// `others` holds the row without its target, so that odds of 10⁻¹⁰ against a nearly certain target are not lost beside
// its 1. Without a target (`has_target` false) they are the whole row and logp is NaN.
RDPO_HOST_DEVICE inline RowResult finish_row(ExpSums<float> others, float target_logit, bool has_target) {
    RowResult row;
    if (!has_target) {
        row.shift = others.shift;
        row.total = others.sum;
        row.lse = others.lse();
        row.logp = NAN;
        row.entropy = others.entropy();
        row.target_minus_one = 0.0f;
        return row;
    }
    others.move(target_logit > others.shift ? target_logit : others.shift);
    ExpSums<float> all = others, target;
    target.shift = target_logit;
    target.sum = target_logit == -INFINITY ? 0.0f : 1.0f;
    all.merge(target);
    const float e_target = std::exp(target_logit - all.shift);
    row.shift = all.shift;
    row.total = all.sum;
    row.lse = all.lse();
    row.entropy = all.entropy();
    row.logp = e_target > others.sum ? -std::log1p(others.sum / e_target) : all.logp(target_logit);
    row.target_minus_one = -others.sum / all.sum;
    return row;
}

}  // namespace
}  // namespace robust_dpo
