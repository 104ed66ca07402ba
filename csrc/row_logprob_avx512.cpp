// Compiled with AVX-512 F, BW, DQ and VL; called only where CPUID has them.
#include "simd_avx512.h"

namespace robust_dpo {

void row_logprob_avx512(const RowLogprobArgs& args, int64_t begin, int64_t end) {
    row_logprob_rows<Avx512>(args, begin, end);
}

}  // namespace robust_dpo
