// The row kernel, written once over a vector type `Simd` and compiled for each instruction set.
//
// A row is read once from memory: blocks of kUnroll vectors stay in registers while their maximum and then their
// exponentials are taken. The second touch (gradient) finds the row in L2: 96 KB for 49152 bf16 columns.
//
// `Simd` provides: Vec, kWidth, kUnroll, load/store for the element types, set1, add, sub, mul, div, fma (a·b + c), fms
// (a·b − c), max and min (second argument if either is NaN), abs, copysign, select_less (a < b ? x : y), any_greater, reduce_max,
// reduce_add (to double), keep_first (lanes < count, the rest −inf) and exp2_scale(p, n, x): p·2^n, n integral.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "element.h"
#include "formulas.h"
#include "row_logprob.h"

namespace robust_dpo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The running shift of the exponentials is moved only when a value exceeds it by this much, so the rescaling branch is
// taken a few times in a row. More slack would cost the entropy digits: it is the difference of two terms of that size.
constexpr float kSlack = 2.0f;

// Blocks after which the fp32 lane sums are folded into double; bounds the error of long vocabularies.
constexpr int64_t kFoldBlocks = 64;

enum class Transform { kNone, kAffine, kCapped };

// e^x for x ≤ 88: n = round(x·log2 e), f = x·log2 e − n in [−½, ½] with log2 e in two parts, 2^f by a minimax polynomial
// of degree 6 with 2^0 = 1 exact (relative error 2.0e-9 before rounding; ≤ 1 ulp in all). Below `Simd::kExpLow` it is 0.
template <class Simd>
inline typename Simd::Vec exp(typename Simd::Vec x) {
    using S = Simd;
    x = S::max(S::set1(S::kExpLow), x);
    const auto n = S::round(S::mul(x, S::set1(0x1.715476p+0f)));
    auto f = S::fms(x, S::set1(0x1.715476p+0f), n);
    f = S::fma(x, S::set1(0x1.4ae0cp-26f), f);
    auto p = S::set1(1.5353362e-4f);
    p = S::fma(p, f, S::set1(1.3398875e-3f));
    p = S::fma(p, f, S::set1(9.6184369e-3f));
    p = S::fma(p, f, S::set1(5.5503324e-2f));
    p = S::fma(p, f, S::set1(2.4022648e-1f));
    p = S::fma(p, f, S::set1(6.9314718e-1f));
    p = S::fma(p, f, S::set1(1.0f));
    return S::exp2_scale(p, n, x);
}

// tanh: below 0.625 an odd minimax polynomial (relative error 4.4e-9 before rounding), above it 1 − 2/(e^{2|x|} + 1).
template <class Simd>
inline typename Simd::Vec tanh(typename Simd::Vec x) {
    using S = Simd;
    const auto magnitude = S::abs(x);
    const auto e = exp<S>(S::mul(S::set1(2.0f), S::min(S::set1(10.0f), magnitude)));
    const auto large = S::copysign(S::sub(S::set1(1.0f), S::div(S::set1(2.0f), S::add(e, S::set1(1.0f)))), x);
    const auto square = S::mul(x, x);
    auto p = S::set1(-5.7049864e-3f);
    p = S::fma(p, square, S::set1(2.0639086e-2f));
    p = S::fma(p, square, S::set1(-5.3739715e-2f));
    p = S::fma(p, square, S::set1(1.3331442e-1f));
    p = S::fma(p, square, S::set1(-3.3333281e-1f));
    const auto small = S::fma(S::mul(p, square), x, x);
    return S::select_less(magnitude, S::set1(0.625f), small, large);
}

template <class Simd, class Tile, Transform kTransform>
struct Row {
    using S = Simd;
    using Vec = typename S::Vec;

    const Tile* tile;   // [vocab]
    const float* bias;  // [vocab] or null
    int64_t vocab;
    float scale, softcap, inverse_softcap;

    // Column j onwards: logits, and their derivative by z without the constant factor `scale`.
    Vec finish(Vec z, const float* bias_at, Vec& derivative) const {
        derivative = S::set1(1.0f);
        if constexpr (kTransform != Transform::kNone) {
            if (bias_at != nullptr) z = S::add(z, S::load(bias_at));
            z = S::mul(z, S::set1(scale));
        }
        if constexpr (kTransform == Transform::kCapped) {
            const Vec t = tanh<S>(S::mul(z, S::set1(inverse_softcap)));
            derivative = S::sub(S::set1(1.0f), S::mul(t, t));
            z = S::mul(t, S::set1(softcap));
        }
        return z;
    }

    Vec logits(int64_t j, Vec& derivative) const {
        return finish(S::load(tile + j), bias == nullptr ? nullptr : bias + j, derivative);
    }

    // The last `count` < kWidth columns, through a copy: nothing past the row is read. Other lanes are −inf.
    Vec logits_tail(int64_t j, int64_t count, Vec& derivative) const {
        Tile z[S::kWidth] = {};
        float b[S::kWidth] = {};
        std::memcpy(z, tile + j, static_cast<size_t>(count) * sizeof(Tile));
        if (bias != nullptr) std::memcpy(b, bias + j, static_cast<size_t>(count) * sizeof(float));
        return S::keep_first(finish(S::load(z), bias == nullptr ? nullptr : b, derivative), static_cast<int>(count));
    }
};

// Of a row so far. Its shift is a logit, exact in fp32; the sums need double.
using Sums = ExpSums<double>;

template <class Simd, class RowType, bool kEntropy>
Sums row_sums(const RowType& row) {
    using S = Simd;
    using Vec = typename S::Vec;
    constexpr int64_t kBlock = int64_t{S::kWidth} * S::kUnroll;
    const Vec zero = S::set1(0.0f);
    Sums sums;
    Vec total[S::kUnroll], moment[S::kUnroll], shift = zero, limit = S::set1(-kInfinity);
    for (int u = 0; u < S::kUnroll; ++u) total[u] = moment[u] = zero;

    const auto fold = [&] {
        for (int u = 0; u < S::kUnroll; ++u) {
            sums.sum += S::reduce_add(total[u]);
            if (kEntropy) sums.moment += S::reduce_add(moment[u]);
            total[u] = moment[u] = zero;
        }
    };
    int64_t unfolded = 0;
    Vec ignored;
    for (int64_t start = 0; start < row.vocab; start += kBlock) {
        Vec x[S::kUnroll];
        if (row.vocab - start >= kBlock) {
            for (int u = 0; u < S::kUnroll; ++u) x[u] = row.logits(start + u * S::kWidth, ignored);
        } else {
            for (int u = 0; u < S::kUnroll; ++u) {
                const int64_t j = start + u * S::kWidth, left = row.vocab - j;
                x[u] = left >= S::kWidth ? row.logits(j, ignored)
                       : left > 0        ? row.logits_tail(j, left, ignored)
                                         : S::set1(-kInfinity);
            }
        }
        Vec highest = x[0];
        for (int u = 1; u < S::kUnroll; ++u) highest = S::max(highest, x[u]);
        if (S::any_greater(highest, limit)) {
            fold();
            const float to = S::reduce_max(highest);
            sums.move(to);
            shift = S::set1(to);
            limit = S::set1(to + kSlack);
        }
        for (int u = 0; u < S::kUnroll; ++u) {
            const Vec distance = S::sub(x[u], shift);
            const Vec e = exp<S>(distance);
            total[u] = S::add(total[u], e);
            // Bounded below, so that a logit of −inf adds 0·bound and not 0·inf.
            if (kEntropy) moment[u] = S::fma(e, S::max(S::set1(-1000.0f), distance), moment[u]);
        }
        if (++unfolded == kFoldBlocks) {
            fold();
            unfolded = 0;
        }
    }
    fold();
    return sums;
}

// Left to right, each vector read before it is written: `out` may be the row itself, in a type no wider than the tile's.
template <class Simd, class Out, class RowType>
void row_gradient(const RowType& row, const Sums& sums, float row_scale, Out* out) {
    using S = Simd;
    using Vec = typename S::Vec;
    const Vec shift = S::set1(static_cast<float>(sums.shift));
    const Vec factor = S::set1(static_cast<float>(static_cast<double>(row_scale) * row.scale / sums.sum));
    Vec derivative;
    int64_t j = 0;
    for (; j + S::kWidth <= row.vocab; j += S::kWidth) {
        const Vec e = exp<S>(S::sub(row.logits(j, derivative), shift));
        S::store(out + j, S::mul(S::mul(e, factor), derivative));
    }
    if (j < row.vocab) {
        const int64_t left = row.vocab - j;
        const Vec e = exp<S>(S::sub(row.logits_tail(j, left, derivative), shift));
        Out tail[S::kWidth];
        S::store(tail, S::mul(S::mul(e, factor), derivative));
        std::memcpy(static_cast<void*>(out + j), tail, static_cast<size_t>(left) * sizeof(Out));
    }
}

// Results and gradient of a row of nobody, which is not read.
template <class Accumulator, class Out>
void ignore_row(const RowLogprobArgs& a, int64_t i) {
    for (void* results : {a.logp, a.lse, a.entropy})
        if (results != nullptr) static_cast<Accumulator*>(results)[i] = 0;
    if (a.grad != nullptr)
        std::memset(static_cast<void*>(static_cast<Out*>(a.grad) + i * a.grad_stride), 0,
                    static_cast<size_t>(a.vocab) * sizeof(Out));
}

template <class Simd, class Tile, class Out, Transform kTransform>
void rows_of(const RowLogprobArgs& a, int64_t begin, int64_t end) {
    using RowType = Row<Simd, Tile, kTransform>;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t target = a.targets[i];
        if (target == kIgnoreIndex) {
            ignore_row<float, Out>(a, i);
            continue;
        }
        const auto softcap = static_cast<float>(a.softcap);
        const RowType row{static_cast<const Tile*>(a.tile) + i * a.tile_stride,
                          static_cast<const float*>(a.bias),
                          a.vocab,
                          static_cast<float>(a.scale),
                          softcap,
                          1.0f / softcap};
        const Sums sums = a.entropy == nullptr ? row_sums<Simd, RowType, false>(row) : row_sums<Simd, RowType, true>(row);
        const bool inside = target >= 0 && target < a.vocab;
        double logp = std::numeric_limits<double>::quiet_NaN();
        float derivative = 0.0f;
        if (inside) {
            float logit[Simd::kWidth], derivatives[Simd::kWidth];
            typename Simd::Vec d;
            Simd::store(logit, row.logits_tail(target, 1, d));
            Simd::store(derivatives, d);
            derivative = derivatives[0];
            logp = sums.logp(logit[0]);
        }
        static_cast<float*>(a.logp)[i] = static_cast<float>(logp);
        static_cast<float*>(a.lse)[i] = static_cast<float>(sums.lse());
        if (a.entropy != nullptr) static_cast<float*>(a.entropy)[i] = static_cast<float>(sums.entropy());
        if (a.grad == nullptr) continue;

        const float row_scale = a.row_scale == nullptr ? 1.0f : static_cast<const float*>(a.row_scale)[i];
        Out* out = static_cast<Out*>(a.grad) + i * a.grad_stride;
        row_gradient<Simd>(row, sums, row_scale, out);
        if (inside) from_float(static_cast<float>(row_scale * a.scale * derivative * softmax_minus_one(logp)), out[target]);
    }
}

template <class Visitor>
void with_element(Dtype dtype, Visitor visit) {
    switch (dtype) {
        case Dtype::kBFloat16: return visit(BFloat16{});
        case Dtype::kFloat16: return visit(Float16{});
        default: return visit(float{});
    }
}

template <class Simd>
void row_logprob_rows(const RowLogprobArgs& a, int64_t begin, int64_t end) {
    with_element(a.tile_dtype, [&](auto tile) {
        with_element(a.grad_dtype, [&](auto out) {
            using Tile = decltype(tile);
            using Out = decltype(out);
            if (a.softcap != 0.0) return rows_of<Simd, Tile, Out, Transform::kCapped>(a, begin, end);
            if (a.bias != nullptr || a.scale != 1.0) return rows_of<Simd, Tile, Out, Transform::kAffine>(a, begin, end);
            return rows_of<Simd, Tile, Out, Transform::kNone>(a, begin, end);
        });
    });
}

}  // namespace
}  // namespace robust_dpo
