// Plain C++ for every other CPU, and the float64 rows.
#include <algorithm>

#include "row_logprob_kernel.h"

namespace robust_dpo {
namespace {

// Four lanes in the vector extension of GCC and Clang, which is SSE2, NEON or whatever the target has.
struct Generic {
    using Vec = float __attribute__((vector_size(16)));
    using Bits = int32_t __attribute__((vector_size(16)));
    using Halves = uint16_t __attribute__((vector_size(8)));
    static constexpr int kWidth = 4;
    static constexpr int kUnroll = 4;
    static constexpr float kExpLow = -87.0f;  // 2^n must stay normal: it is made from exponent bits

    static Bits bits(Vec x) { return bit_cast<Bits>(x); }
    static Vec floats(Bits x) { return bit_cast<Vec>(x); }
    static Vec select(Bits mask, Vec x, Vec y) { return floats((mask & bits(x)) | (~mask & bits(y))); }
    static Bits halves(const void* p) {
        Halves copy;
        std::memcpy(&copy, p, sizeof(copy));
        return __builtin_convertvector(copy, Bits);
    }

    static Vec load(const float* p) {
        Vec x;
        std::memcpy(&x, p, sizeof(x));
        return x;
    }
    static Vec load(const BFloat16* p) { return floats(halves(p) << 16); }
    static Vec load(const Float16* p) {  // as to_float(Float16)
        const Bits half = halves(p), magnitude = half & 0x7fff;
        const Bits special = magnitude >= 0x7c00;
        const Bits finite = bits(floats(magnitude << 13) * 0x1p112f);
        const Bits infinite = (magnitude << 13) | 0x7f800000;
        return floats(((half & 0x8000) << 16) | (special & infinite) | (~special & finite));
    }
    static void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
    static void store(BFloat16* p, Vec x) {  // as from_float(float, BFloat16&)
        const Bits nan = x != x, b = bits(x);
        const Bits rounded = (nan & (b | 0x400000)) | (~nan & (b + 0x7fff + ((b >> 16) & 1)));
        const Halves out = __builtin_convertvector((rounded >> 16) & 0xffff, Halves);
        std::memcpy(static_cast<void*>(p), &out, sizeof(out));
    }
    static void store(Float16* p, Vec x) {  // as from_float(float, Float16&)
        const Bits magnitude = bits(x) & 0x7fffffff, sign = (bits(x) >> 16) & 0x8000;
        const Bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const Bits subnormal = bits(floats(magnitude) + 0.5f) - 0x3f000000;
        const Bits is_small = magnitude < 0x38800000, is_large = magnitude >= 0x477ff000, nan = x != x;
        Bits half = (is_small & subnormal) | (~is_small & normal);
        half = (is_large & 0x7c00) | (~is_large & half);
        half = (nan & (0x7e00 | ((magnitude >> 13) & 0x3ff))) | (~nan & half);
        const Halves out = __builtin_convertvector(half | sign, Halves);
        std::memcpy(static_cast<void*>(p), &out, sizeof(out));
    }

    static Vec set1(float x) { return Vec{x, x, x, x}; }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec sub(Vec a, Vec b) { return a - b; }
    static Vec mul(Vec a, Vec b) { return a * b; }
    static Vec div(Vec a, Vec b) { return a / b; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
    static Vec max(Vec a, Vec b) { return select(a > b, a, b); }
    static Vec min(Vec a, Vec b) { return select(a < b, a, b); }
    static Vec abs(Vec a) { return floats(bits(a) & 0x7fffffff); }
    static Vec copysign(Vec a, Vec b) { return floats(bits(abs(a)) | (bits(b) & INT32_MIN)); }
    // Adding 1.5·2^23 leaves no fraction bits: the adder rounds to nearest even.
    static Vec round(Vec a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
    static Vec select_less(Vec a, Vec b, Vec x, Vec y) { return select(a < b, x, y); }
    static bool any_greater(Vec a, Vec b) {
        const Bits greater = a > b;
        return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
    }
    static float reduce_max(Vec a) { return std::max(std::max(a[0], a[1]), std::max(a[2], a[3])); }
    static double reduce_add(Vec a) { return (double{a[0]} + a[1]) + (double{a[2]} + a[3]); }
    static Vec keep_first(Vec a, int count) { return select(Bits{0, 1, 2, 3} < Bits{} + count, a, set1(-kInfinity)); }
    static Vec exp2_scale(Vec p, Vec n, Vec x) {
        // n + 1.5·2^23 holds the integer n in its low bits; for NaN they are arbitrary and p is NaN already.
        const Bits exponent = bits(n + 0x1.8p23f) << 23;
        return select(x <= set1(kExpLow), set1(0.0f), p * floats(exponent + 0x3f800000));
    }
};

// Float64 rows serve gradient checks, not speed: the library's exp and tanh, element by element.
void rows_float64(const RowLogprobArgs& a, int64_t begin, int64_t end) {
    const auto* bias = static_cast<const double*>(a.bias);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t target = a.targets[i];
        if (target == kIgnoreIndex) {
            ignore_row<double, double>(a, i);
            continue;
        }
        const double* z = static_cast<const double*>(a.tile) + i * a.tile_stride;
        const auto logit = [&](int64_t j) {
            return capped(a.scale * (bias == nullptr ? z[j] : z[j] + bias[j]), a.softcap);
        };
        ExpSums<double> sums;
        for (int64_t j = 0; j < a.vocab; ++j) sums.add(logit(j).value);

        const bool inside = target >= 0 && target < a.vocab;
        const double logp = inside ? sums.logp(logit(target).value) : std::numeric_limits<double>::quiet_NaN();
        static_cast<double*>(a.logp)[i] = logp;
        static_cast<double*>(a.lse)[i] = sums.lse();
        if (a.entropy != nullptr) static_cast<double*>(a.entropy)[i] = sums.entropy();
        if (a.grad == nullptr) continue;

        const double factor = a.scale * (a.row_scale == nullptr ? 1.0 : static_cast<const double*>(a.row_scale)[i]);
        double* out = static_cast<double*>(a.grad) + i * a.grad_stride;
        for (int64_t j = 0; j < a.vocab; ++j) {
            const ValueSlope<double> v = logit(j);
            const double softmax = std::exp(v.value - sums.shift) / sums.sum;
            out[j] = factor * v.slope * (j == target ? softmax_minus_one(logp) : softmax);
        }
    }
}

}  // namespace

void row_logprob_generic(const RowLogprobArgs& args, int64_t begin, int64_t end) {
    if (args.tile_dtype == Dtype::kFloat64) return rows_float64(args, begin, end);
    row_logprob_rows<Generic>(args, begin, end);
}

}  // namespace robust_dpo
