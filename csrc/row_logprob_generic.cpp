// Plain C++ for every other CPU, and the float64 rows.
#include <algorithm>

#include "row_logprob_kernel.h"

namespace robust_dpo {
namespace {

struct Lanes {
    float lane[8];
};

template <class Function>
inline Lanes each(Function function) {
    Lanes out;
    for (int k = 0; k < 8; ++k) out.lane[k] = function(k);
    return out;
}

// Eight lanes in loops of constant length, which compilers turn into whatever vector unit the target has.
struct Generic {
    using Vec = Lanes;
    static constexpr int kWidth = 8;
    static constexpr int kUnroll = 2;
    static constexpr float kExpLow = -87.0f;  // 2^n must stay normal: it is made from exponent bits

    template <class Element>
    static Vec load(const Element* p) {
        Element copy[kWidth];
        std::memcpy(copy, p, sizeof(copy));
        return each([&](int k) { return to_float(copy[k]); });
    }
    template <class Element>
    static void store(Element* p, Vec x) {
        Element copy[kWidth];
        for (int k = 0; k < kWidth; ++k) from_float(x.lane[k], copy[k]);
        std::memcpy(static_cast<void*>(p), copy, sizeof(copy));
    }

    static Vec set1(float x) { return each([&](int) { return x; }); }
    static Vec add(Vec a, Vec b) { return each([&](int k) { return a.lane[k] + b.lane[k]; }); }
    static Vec sub(Vec a, Vec b) { return each([&](int k) { return a.lane[k] - b.lane[k]; }); }
    static Vec mul(Vec a, Vec b) { return each([&](int k) { return a.lane[k] * b.lane[k]; }); }
    static Vec div(Vec a, Vec b) { return each([&](int k) { return a.lane[k] / b.lane[k]; }); }
    static Vec fma(Vec a, Vec b, Vec c) { return each([&](int k) { return a.lane[k] * b.lane[k] + c.lane[k]; }); }
    static Vec max(Vec a, Vec b) { return each([&](int k) { return a.lane[k] > b.lane[k] ? a.lane[k] : b.lane[k]; }); }
    static Vec min(Vec a, Vec b) { return each([&](int k) { return a.lane[k] < b.lane[k] ? a.lane[k] : b.lane[k]; }); }
    static Vec abs(Vec a) { return each([&](int k) { return std::fabs(a.lane[k]); }); }
    static Vec copysign(Vec a, Vec b) { return each([&](int k) { return std::copysign(a.lane[k], b.lane[k]); }); }
    // Adding 1.5·2^23 leaves no fraction bits: the adder rounds to nearest even.
    static Vec round(Vec a) { return each([&](int k) { return (a.lane[k] + 0x1.8p23f) - 0x1.8p23f; }); }
    static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
        return each([&](int k) { return a.lane[k] < b.lane[k] ? x.lane[k] : y.lane[k]; });
    }
    static bool any_greater(Vec a, Vec b) {
        bool any = false;
        for (int k = 0; k < kWidth; ++k) any |= a.lane[k] > b.lane[k];
        return any;
    }
    static float reduce_max(Vec a) { return *std::max_element(a.lane, a.lane + kWidth); }
    static double reduce_add(Vec a) {
        double sum = 0.0;
        for (int k = 0; k < kWidth; ++k) sum += static_cast<double>(a.lane[k]);
        return sum;
    }
    static Vec keep_first(Vec a, int count) {
        return each([&](int k) { return k < count ? a.lane[k] : -kInfinity; });
    }
    static Vec exp2_scale(Vec p, Vec n, Vec x) {
        return each([&](int k) {
            // A NaN has no integer; its p is NaN already.
            const int32_t exponent = n.lane[k] == n.lane[k] ? static_cast<int32_t>(n.lane[k]) : 0;
            const float value = p.lane[k] * bit_cast<float>((exponent + 127) << 23);
            return x.lane[k] <= kExpLow ? 0.0f : value;
        });
    }
};

// Float64 rows serve gradient checks, not speed: two plain passes with the library's exp and tanh.
void rows_float64(const RowLogprobArgs& a, int64_t begin, int64_t end) {
    const auto* bias = static_cast<const double*>(a.bias);
    for (int64_t i = begin; i < end; ++i) {
        const double* z = static_cast<const double*>(a.tile) + i * a.tile_stride;
        const auto tanh_at = [&](int64_t j) {
            const double affine = a.scale * (bias == nullptr ? z[j] : z[j] + bias[j]);
            return a.softcap == 0.0 ? affine : std::tanh(affine / a.softcap);
        };
        const auto logit = [&](int64_t j) { return a.softcap == 0.0 ? tanh_at(j) : a.softcap * tanh_at(j); };

        double highest = -HUGE_VAL;
        for (int64_t j = 0; j < a.vocab; ++j) highest = std::max(highest, logit(j));
        const double shift = highest == -HUGE_VAL ? 0.0 : highest;
        double sum = 0.0, moment = 0.0;
        for (int64_t j = 0; j < a.vocab; ++j) {
            const double distance = logit(j) - shift, e = std::exp(distance);
            sum += e;
            if (e != 0.0) moment += e * distance;
        }
        const double log_sum = std::log(sum);
        const int64_t target = a.targets[i];
        const bool inside = target >= 0 && target < a.vocab;
        const double logp = inside ? logit(target) - shift - log_sum : std::numeric_limits<double>::quiet_NaN();
        static_cast<double*>(a.logp)[i] = logp;
        static_cast<double*>(a.lse)[i] = shift + log_sum;
        if (a.entropy != nullptr) static_cast<double*>(a.entropy)[i] = log_sum - moment / sum;
        if (a.grad == nullptr) continue;

        const double factor = a.scale * (a.row_scale == nullptr ? 1.0 : static_cast<const double*>(a.row_scale)[i]);
        double* out = static_cast<double*>(a.grad) + i * a.grad_stride;
        for (int64_t j = 0; j < a.vocab; ++j) {
            const double t = tanh_at(j);
            const double derivative = a.softcap == 0.0 ? 1.0 : 1.0 - t * t;
            const double softmax = std::exp((a.softcap == 0.0 ? t : a.softcap * t) - shift) / sum;
            out[j] = factor * derivative * (j == target ? std::expm1(logp) : softmax);
        }
    }
}

}  // namespace

void row_logprob_generic(const RowLogprobArgs& args, int64_t begin, int64_t end) {
    if (args.tile_dtype == Dtype::kFloat64) return rows_float64(args, begin, end);
    row_logprob_rows<Generic>(args, begin, end);
}

}  // namespace robust_dpo
