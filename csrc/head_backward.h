// Backward pass of the head; see head.h.
//
// A row's gradient by z is a dense part, coefficient·softmax·derivative, and one large number at its target. The latter is
// kept out of the products, where bf16 would round it: it adds a multiple of one row to another, in fp32.
//
// A block of the tile becomes the dense part once, in two layouts: with neighbours along the rows for grad_weight (whose
// sums run over rows) and with neighbours along the vocabulary for grad_x. Both stay in L2 while they are used, and the tile
// is not written back. A block's part of grad_weight belongs to one thread; grad_x is the sum of
// fixed shares of the blocks, added in order: runs with the same number of threads agree in every bit.
#pragma once

#include <atomic>
#include <cmath>
#include <vector>

#include "gemm_avx512.h"
#include "head.h"
#include "head_scratch.h"
#include "simd_avx512.h"

namespace robust_dpo {
namespace {

constexpr int64_t kRowGroup = 1024;      // rows whose gradients are in cache together
constexpr int64_t kPrefetchRows = 256;  // the tile comes from memory: 4 KB (bf16) ahead

template <class Words>
class HeadBackward {
    using S = Avx512;
    using Element = typename Words::Element;
    static constexpr int kLaneWords = kLanes / Words::kPerWord;

public:
    HeadBackward(const HeadInputs& in, const HeadTile& tile, const HeadBackwardOutputs& out)
        : in_(in), tile_(tile), out_(out), rows8_(round_up(in.rows, kStrip)), rows16_(round_up(in.rows, kLanes)),
          hidden16_(round_up(in.hidden, kLanes)), blocks_(ceil_div(in.vocab, kVocabBlock)),
          shares_(std::min(in.threads * shares_per_thread(in), blocks_)) {}

    void run() const {
        const bool with_x = out_.grad_x != nullptr, with_weight = out_.grad_weight != nullptr;
        const int64_t row_words = rows16_ / Words::kPerWord, group = std::min(kRowGroup, rows16_);
        const Scratch<uint32_t> x(with_weight ? row_words * hidden16_ : 0);
        if (with_weight)
            parallel_items(rows16_ / kLanes, in_.threads, [&](int64_t q) {
                pack_rows<Words>(static_cast<const Element*>(in_.x), in_.x_stride, in_.rows, in_.hidden, row_words,
                                 q * kLaneWords, (q + 1) * kLaneWords, x.get());
            });

        const std::vector<std::vector<int64_t>> rows_of_block = rows_by_target();
        const Scratch<float> partial(with_x ? shares_ * rows8_ * hidden16_ : 0);
        const int64_t weight_words = with_x ? kVocabBlock / Words::kPerWord * hidden16_ : 0;
        const int64_t gradient_words = kVocabBlock * group / Words::kPerWord;
        const int64_t threads = std::min<int64_t>(in_.threads, shares_);
        const Scratch<float> factors(threads * rows16_);
        const Scratch<uint32_t> weights(threads * weight_words);
        const Scratch<uint32_t> by_row(with_weight ? threads * gradient_words : 0);
        const Scratch<uint32_t> by_column(with_x ? threads * gradient_words : 0);
        std::atomic<int64_t> next{0};
        parallel_items(threads, in_.threads, [&](int64_t thread) {
            Workplace own{};
            own.x = x.get();
            own.factors = factors.get() + thread * rows16_;
            own.weight = weights.get() + thread * weight_words;
            own.by_row = with_weight ? by_row.get() + thread * gradient_words : nullptr;
            own.by_column = with_x ? by_column.get() + thread * gradient_words : nullptr;
            for (int64_t share; (share = next.fetch_add(1, std::memory_order_relaxed)) < shares_;) {
                own.grad_x = partial.get() + share * rows8_ * hidden16_;
                const int64_t begin = blocks_ * share / shares_, end = blocks_ * (share + 1) / shares_;
                for (int64_t b = begin; b < end; ++b) {
                    block(b, b == begin, own);
                    for (const int64_t row : rows_of_block[static_cast<size_t>(b)]) add_target(row, own);
                }
            }
        });
        if (with_x)
            parallel_items(rows8_ / kStrip, in_.threads, [&](int64_t strip) { reduce(strip, partial.get()); });
    }

private:
    // Two shares for each thread, so that one that is held up is helped out, while their sums of grad_x stay below a quarter
    // of the tile.
    static int64_t shares_per_thread(const HeadInputs& in) {
        const int64_t tile = in.vocab * static_cast<int64_t>(sizeof(Element)), sums = in.threads * in.hidden * 4;
        return std::clamp<int64_t>(tile / 4 / sums, 1, 2);
    }

    // What one thread works with.
    struct Workplace {
        const uint32_t* x;    // [hidden panels, rows16 / kPerWord, 48] words, neighbours along the rows
        float* factors;       // [rows16]
        uint32_t* weight;     // [hidden panels, block / kPerWord, 48] words, neighbours along the vocabulary
        uint32_t* by_row;     // [block / 8, group / 16, 8, 16 / kPerWord] words, neighbours along the rows
        uint32_t* by_column;  // [group / 16, block / kPerWord, 16] words, neighbours along the vocabulary
        float* grad_x;        // [hidden panels, rows8 / 8, 8, 48] sum of the share at hand
    };

    std::vector<std::vector<int64_t>> rows_by_target() const {
        std::vector<std::vector<int64_t>> rows(static_cast<size_t>(blocks_));
        for (int64_t i = 0; i < in_.rows; ++i)
            if (in_.targets[i] >= 0 && in_.targets[i] < in_.vocab)
                rows[static_cast<size_t>(in_.targets[i] / kVocabBlock)].push_back(i);
        return rows;
    }

    void block(int64_t b, bool is_first, const Workplace& own) const {
        const int64_t first = b * kVocabBlock, count = std::min(kVocabBlock, in_.vocab - first);
        const int64_t steps = round_up(count, kStrip) / Words::kPerWord;
        if (own.by_column != nullptr)
            pack_rows<Words>(static_cast<const Element*>(in_.weight) + first * in_.weight_stride, in_.weight_stride, count,
                             in_.hidden, steps, 0, steps, own.weight);
        for (int64_t i = 0; i < rows16_; i += kLanes) {
            const __mmask16 valid = first_lanes(in_.rows - i);
            const __m512 factor = exp<S>(S::sub(_mm512_load_ps(tile_.references + b * rows16_ + i),
                                                _mm512_maskz_loadu_ps(valid, out_.lse + i)));
            const __m512 scale = S::mul(_mm512_maskz_loadu_ps(valid, out_.coefficients + i), S::set1(in_.scale));
            _mm512_store_ps(own.factors + i, S::mul(factor, scale));
        }
        for (int64_t row = 0; row < rows16_; row += kRowGroup) {
            const int64_t end = std::min(row + kRowGroup, rows16_);
            for (int64_t s = 0; s * kStrip < count; ++s) gradients(first, s, row, end, steps, own);
            for (int64_t panel = 0; panel * kPanel < in_.hidden; ++panel) {
                switch (vectors_of_panel(in_.hidden, panel)) {
                    case 1: products<1>(first, count, panel, row, end, is_first, steps, own); break;
                    case 2: products<2>(first, count, panel, row, end, is_first, steps, own); break;
                    default: products<3>(first, count, panel, row, end, is_first, steps, own);
                }
            }
        }
    }

    // One strip of the tile, rows [begin, end) → its gradient.
    void gradients(int64_t first, int64_t s, int64_t begin, int64_t end, int64_t steps, const Workplace& own) const {
        const int64_t column = first + s * kStrip;
        const auto* tile = static_cast<const Element*>(tile_.values) + column * rows16_;
        __m512 total[kStrip];
        for (int m = 0; m < kStrip; ++m) total[m] = _mm512_setzero_ps();
        for (int64_t row = begin; row < end; row += kLanes) {
            for (int m = 0; m < kStrip; m += Words::kPerWord)
                __builtin_prefetch(tile + ((row + kPrefetchRows) * kStrip + m * kLanes), 0, 2);
            const __mmask16 valid = first_lanes(in_.rows - row);
            const __m512 factor = _mm512_load_ps(own.factors + row);
            __m512 g[kStrip];
            for (int m = 0; m < kStrip; ++m)
                g[m] = _mm512_maskz_mul_ps(valid, factor, S::load(tile + (row * kStrip + m * kLanes)));
            clear_targets(g, row, valid, column);
            if (out_.grad_bias != nullptr)
                for (int m = 0; m < kStrip; ++m) total[m] = S::add(total[m], g[m]);
            const int64_t q = (row - begin) / kLanes;
            for (int m = 0; m < kStrip; m += Words::kPerWord) {
                const __m512i packed = Words::pack(g[m], g[m + Words::kPerWord - 1]);
                if (own.by_row != nullptr)
                    _mm512_store_si512(own.by_row + ((s * ((end - begin) / kLanes) + q) * kStrip + m) * kLaneWords, packed);
                if (own.by_column != nullptr)
                    _mm512_store_si512(own.by_column + (q * steps + (s * kStrip + m) / Words::kPerWord) * kLanes,
                                       Words::interleave(packed));
            }
        }
        if (out_.grad_bias == nullptr) return;
        for (int64_t m = 0; m < std::min<int64_t>(kStrip, in_.vocab - column); ++m)
            out_.grad_bias[column + m] += _mm512_reduce_add_ps(total[m]);
    }

    void clear_targets(__m512 (&g)[kStrip], int64_t row, __mmask16 valid, int64_t column) const {
        const __m512i from = _mm512_set1_epi64(column);
        const auto inside = [&](int64_t i, __mmask8 mask) {
            const __m512i target = _mm512_mask_loadu_epi64(_mm512_set1_epi64(-1), mask, in_.targets + i);
            return _mm512_sub_epi64(target, from);
        };
        const __m512i low = inside(row, static_cast<__mmask8>(valid));
        const __m512i high = inside(row + 8, static_cast<__mmask8>(valid >> 8));
        const __m512i strip = _mm512_set1_epi64(kStrip);
        const auto here = static_cast<__mmask16>(_mm512_cmplt_epu64_mask(low, strip) |
                                                 _mm512_cmplt_epu64_mask(high, strip) << 8);
        if (here == 0) return;
        const __m512i offset = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)),
                                                  _mm512_cvtepi64_epi32(high), 1);
        for (int m = 0; m < kStrip; ++m)
            g[m] = _mm512_maskz_mov_ps(~_mm512_mask_cmpeq_epi32_mask(here, offset, _mm512_set1_epi32(m)), g[m]);
    }

    // The row's gradient at its target: softmax − 1 is e^{logp} − 1 and not a difference of rounded numbers.
    void add_target(int64_t row, const Workplace& own) const {
        const int64_t target = in_.targets[row];
        const float gradient = out_.coefficients[row] * in_.scale * tile_.target_derivative[row] *
                               softmax_minus_one(tile_.target_logp[row]);
        if (out_.grad_bias != nullptr) out_.grad_bias[target] += gradient;
        const __m512 factor = S::set1(gradient);
        const auto* x = static_cast<const Element*>(in_.x) + row * in_.x_stride;
        const auto* weight = static_cast<const Element*>(in_.weight) + target * in_.weight_stride;
        for (int64_t column = 0; column < in_.hidden; column += kLanes) {
            const int64_t left = in_.hidden - column;
            if (out_.grad_weight != nullptr) {
                float* at = out_.grad_weight + target * out_.grad_weight_stride + column;
                const __m512 sum = S::fma(factor, Words::load_floats(x + column, left), Float32Words::load_floats(at, left));
                _mm512_mask_storeu_ps(at, first_lanes(left), sum);
            }
            if (out_.grad_x != nullptr) {
                float* at = own.grad_x + partial_offset(row, column);
                _mm512_store_ps(at, S::fma(factor, Words::load_floats(weight + column, left), _mm512_load_ps(at)));
            }
        }
    }

    // Where a share keeps row `row` of grad_x from `column` on, a multiple of 16.
    int64_t partial_offset(int64_t row, int64_t column) const {
        const int64_t panel = column / kPanel;
        return panel * rows8_ * kPanel + row * vectors_of_panel(in_.hidden, panel) * kLanes + column % kPanel;
    }

    // One panel of hidden columns: both products of the block and the rows [begin, end).
    template <int kVectors>
    void products(int64_t first, int64_t count, int64_t panel, int64_t begin, int64_t end, bool is_first, int64_t steps,
                  const Workplace& own) const {
        if (own.by_column != nullptr) {
            const uint32_t* weight = own.weight + panel * steps * kPanel;
            float* sums = own.grad_x + panel * rows8_ * kPanel;
            for (int64_t row = begin; row < std::min(end, rows8_); row += kStrip) {
                const int64_t q = (row - begin) / kLanes;
                const uint32_t* gradient = own.by_column + q * steps * kLanes + row % kLanes;
                float* to = sums + row * kVectors * kLanes;
                // The next tile of sums is on its way from L3 while this one is summed.
                for (int i = 0; i < kStrip * kVectors; ++i)
                    __builtin_prefetch(to + (kStrip * kVectors + i) * kLanes, 1);
                __m512 sum[kStrip][kVectors];
                for (int m = 0; m < kStrip; ++m)
                    for (int v = 0; v < kVectors; ++v)
                        sum[m][v] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(to + (m * kVectors + v) * kLanes);
                multiply_steps<Words, kVectors, kLanes>(gradient, weight, steps, sum);
                for (int m = 0; m < kStrip; ++m)
                    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(to + (m * kVectors + v) * kLanes, sum[m][v]);
            }
        }
        if (own.by_row != nullptr) {
            const int64_t segments = (end - begin) / kLanes;
            const uint32_t* x = own.x + panel * (rows16_ / Words::kPerWord) * kPanel +
                                begin / Words::kPerWord * kVectors * kLanes;
            for (int64_t s = 0; s * kStrip < count; ++s) {
                const int64_t column = first + s * kStrip, valid_rows = std::min<int64_t>(kStrip, in_.vocab - column);
                float* to = out_.grad_weight + column * out_.grad_weight_stride + panel * kPanel;
                const bool adds = begin > 0 || !out_.overwrites_weight;
                // Read once per chunk, from memory: on its way while the products are summed.
                for (int64_t m = 0; m < valid_rows; ++m)
                    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(to + m * out_.grad_weight_stride + v * kLanes, 1);
                __m512 sum[kStrip][kVectors];
                for (int m = 0; m < kStrip; ++m)
                    for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_setzero_ps();
                multiply<Words, kVectors, kLaneWords, 1, kLaneWords>(own.by_row + s * segments * kStrip * kLaneWords,
                                                                     kStrip * kLaneWords, x, segments, sum);
                const __mmask16 last = first_lanes(in_.hidden - panel * kPanel - (kVectors - 1) * kLanes);
                for (int m = 0; m < valid_rows; ++m)
                    for (int v = 0; v < kVectors; ++v) {
                        const __mmask16 mask = v == kVectors - 1 ? last : __mmask16{0xffff};
                        float* at = to + m * out_.grad_weight_stride + v * kLanes;
                        const __m512 before = adds ? _mm512_maskz_loadu_ps(mask, at) : _mm512_setzero_ps();
                        _mm512_mask_storeu_ps(at, mask, S::add(before, sum[m][v]));
                    }
            }
        }
    }

    // 8 rows of grad_x: the sum over the shares, in order.
    void reduce(int64_t strip, const float* partial) const {
        const int64_t end = std::min((strip + 1) * kStrip, in_.rows);
        for (int64_t column = 0; column < in_.hidden; column += kLanes) {
            for (int64_t row = strip * kStrip; row < end; ++row) {
                const float* from = partial + partial_offset(row, column);
                __m512 sum = _mm512_load_ps(from);
                for (int64_t share = 1; share < shares_; ++share)
                    sum = S::add(sum, _mm512_load_ps(from + share * rows8_ * hidden16_));
                _mm512_mask_storeu_ps(out_.grad_x + row * out_.grad_x_stride + column,
                                      first_lanes(in_.hidden - column), sum);
            }
        }
    }

    const HeadInputs& in_;
    const HeadTile& tile_;
    const HeadBackwardOutputs& out_;
    const int64_t rows8_, rows16_, hidden16_, blocks_, shares_;
};

}  // namespace
}  // namespace robust_dpo
