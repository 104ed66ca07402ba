// row_logprob: log-sum-exp and target log-prob of every row of a logits tile, and optionally its gradient in place.
//
// Nothing here knows about torch: raw pointers, sizes, strides and dtype codes; the Python launcher allocates and checks.
#pragma once

#include <cstdint>

namespace robust_dpo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// The target of a row that belongs to nobody: it is not read, its results are 0 and its gradient is 0.
constexpr int64_t kIgnoreIndex = -100;

// logits = softcap·tanh(scale·(z + bias)/softcap), without the tanh where softcap is 0.
// "acc" below is double for float64 tiles and float for all others.
struct RowLogprobArgs {
    const void* tile;         // [rows, vocab] of tile_dtype, row stride tile_stride (elements), unit column stride
    const int64_t* targets;   // [rows]
    const void* bias;         // [vocab] acc, or null
    const void* row_scale;    // [rows] acc, factor of each row's gradient, or null for 1
    const void* target_logits;  // [rows] of tile_dtype, the tile at the targets: logp and lse are known too, and only the
                              // gradient is left to do; or null. Not on the CPU.
    void* logp;               // [rows] acc, out: logits[target] − lse; NaN where the target lies outside the vocabulary
    void* lse;                // [rows] acc, out
    void* entropy;            // [rows] acc, out, or null
    void* grad;               // [rows, vocab] of grad_dtype, out, or null: row_scale·(softmax − onehot)·∂logits/∂z.
                              // A row may start where its tile row starts if grad_dtype is not wider than tile_dtype.
    int64_t rows, vocab, tile_stride, grad_stride;
    double scale, softcap;
    Dtype tile_dtype, grad_dtype;
};

// Rows [begin, end), one translation unit for each instruction set. Float64 tiles always take the generic one.
void row_logprob_generic(const RowLogprobArgs& args, int64_t begin, int64_t end);
#if defined(ROBUST_DPO_X86)
void row_logprob_avx2(const RowLogprobArgs& args, int64_t begin, int64_t end);
void row_logprob_avx512(const RowLogprobArgs& args, int64_t begin, int64_t end);
void row_logprob_avx512_bf16(const RowLogprobArgs& args, int64_t begin, int64_t end);
#endif

}  // namespace robust_dpo
