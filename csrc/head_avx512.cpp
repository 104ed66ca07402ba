// The head in fp32. Compiled with AVX-512 F, BW, DQ and VL; called only where CPUID has them.
#include "head_backward.h"
#include "head_forward.h"

namespace robust_dpo {

void head_forward_avx512(const HeadInputs& in, const HeadForwardOutputs& out) { head_forward<Float32Words>(in, out); }

void head_backward_avx512(const HeadInputs& in, const HeadTile& tile, const HeadBackwardOutputs& out) {
    HeadBackward<Float32Words>(in, tile, out).run();
}

}  // namespace robust_dpo
