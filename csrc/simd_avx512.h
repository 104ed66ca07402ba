// AVX-512 F, BW, DQ and VL as the `Simd` of row_logprob_kernel.h.
#pragma once

#include <immintrin.h>

#include "row_logprob_kernel.h"

namespace robust_dpo {
namespace {

struct Avx512 {
    using Vec = __m512;
    static constexpr int kWidth = 16;
    static constexpr int kUnroll = 8;
    static constexpr float kExpLow = -110.0f;  // 2^-158.7 rounds to 0

    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load(const BFloat16* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

    static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
    static void store(BFloat16* p, Vec x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
    static void store(Float16* p, Vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }

    static Vec set1(float x) { return _mm512_set1_ps(x); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
    static Vec abs(Vec a) { return _mm512_abs_ps(a); }
    static Vec copysign(Vec magnitude, Vec sign) {
        const Vec sign_bit = _mm512_set1_ps(-0.0f);
        return _mm512_or_ps(_mm512_and_ps(sign_bit, sign), _mm512_andnot_ps(sign_bit, magnitude));
    }
    static Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
    }
    static bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
    static float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
    static double reduce_add(Vec a) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
        return _mm512_reduce_add_pd(_mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))));
    }
    static Vec keep_first(Vec a, int count) {
        return _mm512_mask_mov_ps(set1(-kInfinity), static_cast<__mmask16>((1u << count) - 1), a);
    }
    // vscalefps rounds once and underflows to 0 by itself.
    static Vec exp2_scale(Vec p, Vec n, Vec) { return _mm512_scalef_ps(p, n); }
};

}  // namespace
}  // namespace robust_dpo
