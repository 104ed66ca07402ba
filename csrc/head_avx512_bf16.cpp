// The head in bf16. Compiled with AVX-512 F, BW, DQ, VL and BF16; called only where CPUID has them.
#include "head_backward.h"
#include "head_forward.h"

namespace robust_dpo {

void head_forward_avx512_bf16(const HeadInputs& in, const HeadForwardOutputs& out) { head_forward<BFloat16Words>(in, out); }

void head_backward_avx512_bf16(const HeadInputs& in, const HeadTile& tile, const HeadBackwardOutputs& out) {
    HeadBackward<BFloat16Words>(in, tile, out).run();
}

}  // namespace robust_dpo
