// Forward pass of the head; see head.h.
#pragma once

#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "gemm_avx512.h"
#include "head.h"
#include "head_scratch.h"
#include "simd_avx512.h"

namespace robust_dpo {
namespace {

// A row's reference is the maximum of its first 8 logits in the block, and stays unless a later one exceeds it by this much:
// 256 values of 64·e^64 are far from overflow. Then the 48 rows are done again with the true maximum.
constexpr float kHeadSlack = 64.0f;

// Words of the hidden dimension that are multiplied at once: 48 columns of B, 147 KB, stay in L2.
constexpr int64_t kHiddenBlock = 768;

// 48 rows while they meet one block of the vocabulary. Lanes are rows.
struct alignas(64) PanelState {
    float highest[kPanel];    // of all logits so far
    float reference[kPanel];  // −inf until a logit above −inf is met
    float limit[kPanel];      // reference + kHeadSlack
    float sum[kPanel];        // Σ e^{logit − reference} …
    float lost[kPanel];       // … and what rounding took from it: a row's log-prob is near 0 where one term is nearly all
    float moment[kPanel];     // Σ e^{logit − reference}·(logit − reference)
    int32_t target[kPanel];   // relative to the block
    float target_logit[kPanel];
    float target_derivative[kPanel];
    bool exceeded;
};

// Results of a block, one value for each row.
struct BlockSums {
    float* references;  // [blocks, rows16]
    float* sums;        // [blocks, rows16]
    float* moments;     // [blocks, rows16], or null
    float* target_logit;       // [rows16]
    float* target_derivative;  // [rows16]
};

template <class Words, Transform kTransform, bool kEntropy>
class HeadForward {
    using S = Avx512;
    using Element = typename Words::Element;

public:
    HeadForward(const HeadInputs& in, const HeadForwardOutputs& out)
        : in_(in), out_(out), words_(ceil_div(in.hidden, Words::kPerWord)), rows16_(round_up(in.rows, kLanes)),
          blocks_(ceil_div(in.vocab, kVocabBlock)) {}

    void run() const {
        const int64_t panels = ceil_div(rows16_, kPanel);
        const Scratch<uint32_t> x(panels * kPanel * words_);
        parallel_items(panels, in_.threads, [&](int64_t p) {
            pack_transposed<Words>(static_cast<const Element*>(in_.x) + p * kPanel * in_.x_stride, in_.x_stride,
                                   in_.rows - p * kPanel, in_.hidden, vectors_of_panel(rows16_, p) * kLanes,
                                   x.get() + p * kPanel * words_);
        });

        const Scratch<float> block_sums(blocks_ * rows16_), moments(kEntropy ? blocks_ * rows16_ : 0);
        const Scratch<float> references(out_.tile == nullptr ? blocks_ * rows16_ : 0), per_row(2 * rows16_);
        BlockSums sums{};
        sums.sums = block_sums.get();
        sums.references = out_.tile == nullptr ? references.get() : out_.tile->references;
        sums.moments = moments.get();
        sums.target_logit = per_row.get();
        sums.target_derivative = per_row.get() + rows16_;
        std::fill_n(per_row.get(), 2 * rows16_, std::numeric_limits<float>::quiet_NaN());

        const int64_t pack_words = kVocabBlock * words_, spill_floats = kVocabBlock * kPanel;
        const Scratch<uint32_t> packs(in_.threads * pack_words);
        const Scratch<float> spills(in_.threads * spill_floats);
        std::atomic<int64_t> next{0};
        parallel_items(in_.threads, in_.threads, [&](int64_t thread) {
            for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks_;)
                block(b, x.get(), packs.get() + thread * pack_words, spills.get() + thread * spill_floats, sums);
            _mm_sfence();  // the tile is written past the caches
        });
        parallel_items(rows16_ / kLanes, in_.threads, [&](int64_t q) { merge(q * kLanes, sums); });
    }

private:
    void block(int64_t b, const uint32_t* x, uint32_t* weight, float* spill, const BlockSums& sums) const {
        const int64_t first = b * kVocabBlock, count = std::min(kVocabBlock, in_.vocab - first);
        const auto* source = static_cast<const Element*>(in_.weight) + first * in_.weight_stride;
        for (int64_t s = 0; s * kStrip < count; ++s)
            pack_transposed<Words>(source + s * kStrip * in_.weight_stride, in_.weight_stride, count - s * kStrip,
                                   in_.hidden, kStrip, weight + s * kStrip * words_);
        for (int64_t p = 0; p * kPanel < rows16_; ++p) {
            const uint32_t* columns = x + p * kPanel * words_;
            switch (vectors_of_panel(rows16_, p)) {
                case 1: panel<1>(b, p, weight, columns, spill, sums); break;
                case 2: panel<2>(b, p, weight, columns, spill, sums); break;
                default: panel<3>(b, p, weight, columns, spill, sums);
            }
        }
    }

    template <int kVectors>
    void panel(int64_t b, int64_t p, const uint32_t* weight, const uint32_t* x, float* spill, const BlockSums& sums) const {
        const int64_t row = p * kPanel, first = b * kVocabBlock;
        PanelState state;
        for (int i = 0; i < kVectors * kLanes; ++i) {
            const int64_t target = row + i < in_.rows ? in_.targets[row + i] : -1;
            // Anything outside the block becomes −1.
            state.target[i] = target >= first && target < first + kVocabBlock ? static_cast<int32_t>(target - first) : -1;
            state.highest[i] = state.reference[i] = state.limit[i] = -kInfinity;
        }
        strips<kVectors>(b, p, weight, x, spill, sums, state);
        if (state.exceeded) {
            for (int i = 0; i < kVectors * kLanes; ++i) {
                state.reference[i] = state.highest[i];
                state.limit[i] = kInfinity;
            }
            strips<kVectors>(b, p, weight, x, spill, sums, state);
        }
        const int64_t at = b * rows16_ + row;
        std::copy_n(state.reference, kVectors * kLanes, sums.references + at);
        std::transform(state.sum, state.sum + kVectors * kLanes, state.lost, sums.sums + at, std::plus<>());
        if (kEntropy) std::copy_n(state.moment, kVectors * kLanes, sums.moments + at);
    }

    template <int kVectors>
    void strips(int64_t b, int64_t p, const uint32_t* weight, const uint32_t* x, float* spill, const BlockSums& sums,
                PanelState& state) const {
        state.exceeded = false;
        std::fill_n(state.sum, kPanel, 0.0f);
        std::fill_n(state.lost, kPanel, 0.0f);
        std::fill_n(state.moment, kPanel, 0.0f);
        const int64_t count = std::min(kVocabBlock, in_.vocab - b * kVocabBlock);
        const int64_t pieces = ceil_div(words_, kHiddenBlock), piece = ceil_div(words_, pieces);
        for (int64_t k = 0; k < words_; k += piece) {
            const int64_t steps = std::min(piece, words_ - k);
            for (int64_t s = 0; s * kStrip < count; ++s) {
                float* kept = spill + s * kStrip * kPanel;
                __m512 sum[kStrip][kVectors];
                for (int m = 0; m < kStrip; ++m)
                    for (int v = 0; v < kVectors; ++v)
                        sum[m][v] = k == 0 ? _mm512_setzero_ps() : _mm512_load_ps(kept + (m * kVectors + v) * kLanes);
                multiply_steps<Words, kVectors, kStrip>(weight + s * kStrip * words_ + k * kStrip,
                                                        x + k * kVectors * kLanes, steps, sum);
                if (k + steps < words_) {
                    for (int m = 0; m < kStrip; ++m)
                        for (int v = 0; v < kVectors; ++v)
                            _mm512_store_ps(kept + (m * kVectors + v) * kLanes, sum[m][v]);
                } else if ((s + 1) * kStrip <= count) {
                    finish<kVectors, true>(sum, b * kVocabBlock, s, p, sums, state);
                } else {
                    finish<kVectors, false>(sum, b * kVocabBlock, s, p, sums, state);
                }
            }
        }
    }

    // Logits of one strip of the vocabulary → sums, target and tile. Inlined, with unrolled loops, so that the logits never
    // leave the registers (in memory they cost a quarter of the speed). Only the last strip can be short (not kWhole).
    template <int kVectors, bool kWhole>
    [[gnu::always_inline]] void finish(__m512 (&z)[kStrip][kVectors], int64_t first, int64_t s, int64_t p,
                                       const BlockSums& sums, PanelState& state) const {
        const int64_t column = first + s * kStrip;
        const int count = kWhole ? kStrip : static_cast<int>(in_.vocab - column);
#pragma GCC unroll 8
        for (int m = 0; m < kStrip; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                z[m][v] = kWhole || m < count ? logit(z[m][v], column + m) : S::set1(-kInfinity);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            __m512 highest = _mm512_load_ps(state.highest + v * kLanes);
#pragma GCC unroll 8
            
for (int m = 0; m < kStrip; ++m) highest = S::max(highest, z[m][v]);
            _mm512_store_ps(state.highest + v * kLanes, highest);
            const __mmask16 above = _mm512_cmp_ps_mask(highest, _mm512_load_ps(state.limit + v * kLanes), _CMP_GT_OQ);
            if (above != 0) raise_reference(state, v, above);
            const __m512i strip = _mm512_sub_epi32(_mm512_load_si512(state.target + v * kLanes),
                                                   _mm512_set1_epi32(static_cast<int>(s) * kStrip));
            const __mmask16 here = _mm512_cmplt_epu32_mask(strip, _mm512_set1_epi32(count));
            if (here != 0) {
                __m512 logits[kStrip];
#pragma GCC unroll 8
                for (int m = 0; m < kStrip; ++m) logits[m] = z[m][v];
                keep_targets(logits, here, strip, p * kPanel + v * kLanes, sums);
            }
        }
        auto* tile = out_.tile == nullptr
                         ? nullptr
                         : static_cast<Element*>(out_.tile->values) + (column * rows16_ + p * kPanel * kStrip);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const __m512 reference = _mm512_load_ps(state.reference + v * kLanes);
            // A row that has met only −inf subtracts 0: its exponentials are 0, not NaN.
            const __m512 shift = _mm512_mask_mov_ps(
                reference, _mm512_cmp_ps_mask(reference, S::set1(-kInfinity), _CMP_EQ_OQ), _mm512_setzero_ps());
            __m512 total = _mm512_setzero_ps(), moment = _mm512_load_ps(state.moment + v * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kStrip; ++m) {
                const __m512 distance = S::sub(z[m][v], shift);
                const __m512 e = exp<S>(distance);
                total = S::add(total, e);
                // Bounded below, so that a logit of −inf adds 0·bound and not 0·inf.
                if (kEntropy) moment = S::fma(e, S::max(S::set1(-1000.0f), distance), moment);
                if (!kWhole && m >= count) {
                    z[m][v] = _mm512_setzero_ps();
                } else {
                    z[m][v] = kTransform == Transform::kCapped ? S::mul(e, derivative(z[m][v])) : e;
                }
            }
            add_exactly(total, state.sum + v * kLanes, state.lost + v * kLanes);
            if (kEntropy) _mm512_store_ps(state.moment + v * kLanes, moment);
            if (tile == nullptr) continue;
#pragma GCC unroll 8
            for (int m = 0; m < kStrip; m += Words::kPerWord)
                _mm512_stream_si512(reinterpret_cast<__m512i*>(tile + (v * kStrip + m) * kLanes),
                                    Words::pack(z[m][v], z[m + Words::kPerWord - 1][v]));
        }
    }

    __m512 logit(__m512 z, int64_t column) const {
        if constexpr (kTransform != Transform::kNone) {
            if (in_.bias != nullptr) z = S::add(z, S::set1(in_.bias[column]));
            z = S::mul(z, S::set1(in_.scale));
        }
        if constexpr (kTransform == Transform::kCapped)
            z = S::mul(tanh<S>(S::mul(z, S::set1(1.0f / in_.softcap))), S::set1(in_.softcap));
        return z;
    }

    // ∂logit/∂(scale·z) = 1 − (logit/softcap)²
    __m512 derivative(__m512 logit) const {
        if (kTransform != Transform::kCapped) return S::set1(1.0f);
        const __m512 t = S::mul(logit, S::set1(1.0f / in_.softcap));
        return _mm512_fnmadd_ps(t, t, S::set1(1.0f));
    }

    // sum + lost += x, where `lost` takes the rounding error of the addition (Knuth's two-sum).
    static void add_exactly(__m512 x, float* sum, float* lost) {
        const __m512 old = _mm512_load_ps(sum), total = S::add(old, x), added = S::sub(total, old);
        const __m512 error = S::add(S::sub(old, S::sub(total, added)), S::sub(x, added));
        _mm512_store_ps(sum, total);
        _mm512_store_ps(lost, S::add(_mm512_load_ps(lost), error));
    }

    [[gnu::noinline]] static void raise_reference(PanelState& state, int v, __mmask16 above) {
        for (int i = v * kLanes; i < (v + 1) * kLanes; ++i, above >>= 1) {
            if ((above & 1) == 0) continue;
            if (state.reference[i] != -kInfinity) state.exceeded = true;
            state.reference[i] = state.highest[i];
            state.limit[i] = state.highest[i] + kHeadSlack;
        }
    }

    [[gnu::noinline]] void keep_targets(const __m512 (&logits)[kStrip], __mmask16 here, __m512i strip, int64_t row,
                                        const BlockSums& sums) const {
        for (int m = 0; m < kStrip; ++m) {
            const __mmask16 hit = _mm512_mask_cmpeq_epi32_mask(here, strip, _mm512_set1_epi32(m));
            _mm512_mask_storeu_ps(sums.target_logit + row, hit, logits[m]);
            _mm512_mask_storeu_ps(sums.target_derivative + row, hit, derivative(logits[m]));
        }
    }

    // 16 rows: log Σ e^{reference}·sum over the blocks, in their order.
    void merge(int64_t row, const BlockSums& sums) const {
        __m512 highest = S::set1(-kInfinity);
        for (int64_t b = 0; b < blocks_; ++b) highest = S::max(_mm512_load_ps(sums.references + b * rows16_ + row), highest);
        const __m512 shift = _mm512_mask_mov_ps(
            highest, _mm512_cmp_ps_mask(highest, S::set1(-kInfinity), _CMP_EQ_OQ), _mm512_setzero_ps());
        double total[kLanes] = {}, moment[kLanes] = {};
        for (int64_t b = 0; b < blocks_; ++b) {
            const int64_t at = b * rows16_ + row;
            const __m512 distance = S::max(S::set1(-1000.0f), S::sub(_mm512_load_ps(sums.references + at), shift));
            alignas(64) float factor[kLanes], delta[kLanes];
            _mm512_store_ps(factor, exp<S>(distance));
            _mm512_store_ps(delta, distance);
            for (int i = 0; i < kLanes; ++i) {
                const double sum = double{sums.sums[at + i]} * factor[i];
                total[i] += sum;
                if (kEntropy) moment[i] += double{sums.moments[at + i]} * factor[i] + sum * delta[i];
            }
        }
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, in_.rows - row); ++i) {
            const ExpSums<double> all{shift[i], total[i], moment[i]};
            const double logp = all.logp(sums.target_logit[row + i]);
            out_.lse[row + i] = static_cast<float>(all.lse());
            out_.logp[row + i] = static_cast<float>(logp);
            if (kEntropy) out_.entropy[row + i] = static_cast<float>(all.entropy());
            if (out_.tile != nullptr) {
                out_.tile->target_logp[row + i] = static_cast<float>(logp);
                out_.tile->target_derivative[row + i] = sums.target_derivative[row + i];
            }
        }
    }

    const HeadInputs& in_;
    const HeadForwardOutputs& out_;
    const int64_t words_, rows16_, blocks_;
};

template <class Words>
void head_forward(const HeadInputs& in, const HeadForwardOutputs& out) {
    const auto with = [&](auto transform) {
        constexpr Transform kTransform = decltype(transform)::value;
        if (out.entropy != nullptr) return HeadForward<Words, kTransform, true>(in, out).run();
        HeadForward<Words, kTransform, false>(in, out).run();
    };
    if (in.softcap != 0.0f) return with(std::integral_constant<Transform, Transform::kCapped>{});
    if (in.bias != nullptr || in.scale != 1.0f) return with(std::integral_constant<Transform, Transform::kAffine>{});
    with(std::integral_constant<Transform, Transform::kNone>{});
}

}  // namespace
}  // namespace robust_dpo
