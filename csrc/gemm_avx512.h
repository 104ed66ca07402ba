// The GEMM building blocks of the head: packing, and a microkernel that leaves its tile of sums in registers.
//
// A matrix element is a "word" of 32 bits: one float, or two bf16 neighbours along the summed dimension. In words the two
// types share every layout; they differ in the multiply-add (vfmadd231ps, vdpbf16ps: both one 512-bit instruction per cycle
// on Zen 4) and in how words are made.
//
// The microkernel multiplies 8 rows (words broadcast from A) with 48 columns (three vectors of B): 24 sums, 3 vectors of B
// and one broadcast fit the 32 registers, and 24 independent chains cover the latency of 6 cycles at one per cycle. B costs
// 192 bytes of L1/L2 bandwidth per 24 multiply-adds.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "element.h"

namespace robust_dpo {
namespace {

constexpr int kLanes = 16;
constexpr int kStrip = 8;                           // rows of a microkernel
constexpr int kPanelVectors = 3;                    // its columns, in vectors
constexpr int kPanel = kPanelVectors * kLanes;      // its columns

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A panel holds 48 columns, the last one as many vectors as it needs.
inline int vectors_of_panel(int64_t columns, int64_t panel) {
    return static_cast<int>(std::min<int64_t>(kPanelVectors, ceil_div(columns - panel * kPanel, kLanes)));
}

// Lanes < count.
inline __mmask16 first_lanes(int64_t count) {
    return count >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
}

struct Float32Words {
    using Element = float;
    static constexpr int kPerWord = 1;

    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    // Up to 16 words of consecutive elements, the rest 0.
    static __m512i load_words(const float* p, int64_t elements) {
        return _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(elements), p));
    }
    // Up to 16 consecutive elements, the rest 0.
    static __m512 load_floats(const float* p, int64_t elements) { return _mm512_maskz_loadu_ps(first_lanes(elements), p); }
    // Words of a column each: the kPerWord rows p, p + stride, … of up to 16 columns.
    static __m512i load_rows(const float* p, int64_t, int64_t columns, bool) { return load_words(p, columns); }
    // Elements of kPerWord vectors, one after the other.
    static __m512i pack(__m512 first, __m512) { return _mm512_castps_si512(first); }
    // The same as words of one lane each.
    static __m512i interleave(__m512i packed) { return packed; }
};

#if defined(__AVX512BF16__)
struct BFloat16Words {
    using Element = BFloat16;
    static constexpr int kPerWord = 2;

    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static __m512i load_words(const BFloat16* p, int64_t elements) {
        const auto mask = elements >= 32 ? ~__mmask32{0} : (__mmask32{1} << std::max<int64_t>(elements, 0)) - 1;
        return _mm512_maskz_loadu_epi16(mask, p);
    }
    static __m512 load_floats(const BFloat16* p, int64_t elements) {
        const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(elements), p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static __m512i load_rows(const BFloat16* p, int64_t stride, int64_t columns, bool has_second) {
        const __mmask16 mask = first_lanes(columns);
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
        if (!has_second) return first;
        const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + stride));
        return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    }
    static __m512i pack(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
    static __m512i interleave(__m512i packed) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
        return _mm512_permutexvar_epi16(order, packed);
    }
};
#endif

// Adds the product of 8 rows of A and the columns of B to `sum`, over segments·kSteps words of the summed dimension.
// Word (row m, step k of a segment) of A is a[m·kRowStride + k·kStepStride], segments lie `a_segment` words apart; B is
// contiguous, kVectors·16 words for each step.
template <class Words, int kVectors, int kRowStride, int kStepStride, int kSteps>
[[gnu::always_inline]] inline void multiply(const uint32_t* a, int64_t a_segment, const uint32_t* b, int64_t segments,
                                            __m512 (&sum)[kStrip][kVectors]) {
    for (int64_t s = 0; s < segments; ++s, a += a_segment, b += kSteps * kVectors * kLanes) {
#pragma GCC unroll 16
        for (int k = 0; k < kSteps; ++k) {
            __m512i columns[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_load_si512(b + (k * kVectors + v) * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kStrip; ++m) {
                const __m512i row = _mm512_set1_epi32(static_cast<int>(a[m * kRowStride + k * kStepStride]));
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sum[m][v] = Words::multiply_add(sum[m][v], row, columns[v]);
            }
        }
    }
}

// The same for an A that is contiguous in steps of kStepStride words: any number of steps.
template <class Words, int kVectors, int kStepStride>
[[gnu::always_inline]] inline void multiply_steps(const uint32_t* a, const uint32_t* b, int64_t steps,
                                                  __m512 (&sum)[kStrip][kVectors]) {
    constexpr int kUnroll = 4;
    const int64_t whole = steps / kUnroll;
    multiply<Words, kVectors, 1, kStepStride, kUnroll>(a, kUnroll * kStepStride, b, whole, sum);
    multiply<Words, kVectors, 1, kStepStride, 1>(a + whole * kUnroll * kStepStride, kStepStride,
                                                 b + whole * kUnroll * kVectors * kLanes, steps % kUnroll, sum);
}

// Rows of a row-major matrix, transposed: word k of row m goes to out[k·pitch + m], for `pitch` ≥ rows rounded up to 8
// rows; missing rows are 0.
template <class Words>
void pack_transposed(const typename Words::Element* source, int64_t stride, int64_t rows, int64_t elements, int64_t pitch,
                     uint32_t* out) {
    const int64_t words = ceil_div(elements, Words::kPerWord);
    for (int64_t m = 0; m < pitch; m += kStrip) {
        for (int64_t k = 0; k < words; k += kLanes) {
            __m512i r[kStrip];
            for (int i = 0; i < kStrip; ++i)
                r[i] = m + i < rows ? Words::load_words(source + (m + i) * stride + k * Words::kPerWord,
                                                        elements - k * Words::kPerWord)
                                    : _mm512_setzero_si512();
            // Four by four in every 128-bit lane: quarter[h][j] holds word 4·lane + j of rows 4h … 4h + 3.
            __m512i quarter[2][4];
            for (int h = 0; h < 2; ++h) {
                const __m512i low01 = _mm512_unpacklo_epi32(r[4 * h], r[4 * h + 1]);
                const __m512i low23 = _mm512_unpacklo_epi32(r[4 * h + 2], r[4 * h + 3]);
                const __m512i high01 = _mm512_unpackhi_epi32(r[4 * h], r[4 * h + 1]);
                const __m512i high23 = _mm512_unpackhi_epi32(r[4 * h + 2], r[4 * h + 3]);
                quarter[h][0] = _mm512_unpacklo_epi64(low01, low23);
                quarter[h][1] = _mm512_unpackhi_epi64(low01, low23);
                quarter[h][2] = _mm512_unpacklo_epi64(high01, high23);
                quarter[h][3] = _mm512_unpackhi_epi64(high01, high23);
            }
            alignas(64) uint32_t block[2][4][kLanes];
            for (int h = 0; h < 2; ++h)
                for (int j = 0; j < 4; ++j) _mm512_store_si512(block[h][j], quarter[h][j]);
            for (int64_t i = 0; i < std::min<int64_t>(kLanes, words - k); ++i)
                for (int h = 0; h < 2; ++h)
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (k + i) * pitch + m + 4 * h),
                                     _mm_load_si128(reinterpret_cast<const __m128i*>(block[h][i % 4] + i / 4 * 4)));
        }
    }
}

// Rows of a row-major matrix as the summed dimension: panels of 48 columns, `words` steps each (those past `rows` are 0).
// Panel p starts at out + p·words·48. Steps [begin, end) are filled.
template <class Words>
void pack_rows(const typename Words::Element* source, int64_t stride, int64_t rows, int64_t columns, int64_t words,
               int64_t begin, int64_t end, uint32_t* out) {
    for (int64_t w = begin; w < end; ++w) {
        const int64_t row = w * Words::kPerWord;
        for (int64_t column = 0, panel = 0; column < columns; column += kPanel, ++panel) {
            const int vectors = vectors_of_panel(columns, panel);
            uint32_t* to = out + (panel * words * kPanelVectors + w * vectors) * kLanes;
            for (int v = 0; v < vectors; ++v) {
                const int64_t at = column + v * kLanes;
                const __m512i packed =
                    row < rows ? Words::load_rows(source + row * stride + at, stride, columns - at, row + 1 < rows)
                               : _mm512_setzero_si512();
                _mm512_store_si512(to + v * kLanes, packed);
            }
        }
    }
}

}  // namespace
}  // namespace robust_dpo
