// The LM head on CPU, fused with its log-softmax: no logits are ever written.
//
//   z = x·Wᵀ + bias,   logits = softcap·tanh(scale·z/softcap)      (without the tanh where softcap is 0)
//
// The forward pass works through blocks of the vocabulary. While the sums of a microkernel are in registers they become
// e^{logit − reference}, where `reference` belongs to one row and one block; so blocks are independent of each other, and
// the result does not depend on the number of threads or on who did what. Where a gradient will be needed, the
// exponentials times ∂logit/∂(scale·z) are all that is kept (the tile): the backward pass multiplies them by one factor
// of the row and block. In bf16 they have a relative error below 2⁻⁸ whatever the size of the logit.
//
// Nothing here knows about torch: raw pointers, sizes and strides; the Python launcher allocates and checks.
#pragma once

#include <cstdint>

namespace robust_dpo {

constexpr int64_t kVocabBlock = 256;  // vocabulary entries that share a row's reference

struct HeadInputs {
    const void* x;           // [rows, hidden], fp32 or bf16, row stride x_stride (elements), unit column stride
    const void* weight;      // [vocab, hidden], the same dtype, row stride weight_stride
    const int64_t* targets;  // [rows]
    const float* bias;       // [vocab], or null
    int64_t rows, hidden, vocab, x_stride, weight_stride;
    float scale, softcap;
    int threads;
};

// What backward needs from forward. rows16 is `rows` rounded up to 16, vocab8 is `vocab` rounded up to 8.
struct HeadTile {
    void* values;              // [vocab8 / 8, rows16 / 16, 8, 16] of x's dtype, 64-byte aligned
    float* references;         // [vocab blocks, rows16], 64-byte aligned
    float* target_logp;        // [rows]
    float* target_derivative;  // [rows], ∂logit/∂(scale·z) at the target
};

struct HeadForwardOutputs {
    float* logp;           // [rows]; NaN where the target lies outside the vocabulary
    float* lse;            // [rows]
    float* entropy;        // [rows], or null
    const HeadTile* tile;  // or null
};

struct HeadBackwardOutputs {
    const float* lse;           // [rows], of the forward pass
    const float* coefficients;  // [rows], ∂L/∂logp with the sign of softmax − onehot
    float* grad_x;              // [rows, hidden], overwritten, or null
    float* grad_weight;         // [vocab, hidden], row stride grad_weight_stride, or null
    float* grad_bias;           // [vocab], added to, or null
    int64_t grad_x_stride, grad_weight_stride;
    bool overwrites_weight;  // whether grad_weight is overwritten, and not added to
};

// One translation unit for each dtype and instruction set.
#if defined(ROBUST_DPO_X86)
void head_forward_avx512(const HeadInputs& in, const HeadForwardOutputs& out);
void head_backward_avx512(const HeadInputs& in, const HeadTile& tile, const HeadBackwardOutputs& out);
void head_forward_avx512_bf16(const HeadInputs& in, const HeadForwardOutputs& out);
void head_backward_avx512_bf16(const HeadInputs& in, const HeadTile& tile, const HeadBackwardOutputs& out);
#endif

}  // namespace robust_dpo
