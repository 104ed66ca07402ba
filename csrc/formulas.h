// The formulas that kernels on CPU and GPU share, each written once, for float and double.
//
// Everything is in an unnamed namespace: the header is compiled once for each instruction set, and the linker must never
// merge an AVX-512 copy into code that older CPUs run. Mathematics comes from std::, where device code finds it as well.
#pragma once

#include <cfloat>
#include <cmath>

#if defined(__CUDACC__)
#define RDPO_HOST_DEVICE __host__ __device__
#else
#define RDPO_HOST_DEVICE
#endif

namespace robust_dpo {
namespace {

template <class T>
struct ValueSlope {
    T value, slope;  // f(x) and f'(x)
};

// The running pair of an online softmax, with what the entropy needs. A T of more digits than the x is what makes long
// rows exact; relative to the shift both terms of a log-prob are small, so rows of huge logits lose nothing.
//
// A NaN among the x reaches the sum and everything made of it; rows of −inf alone have the log-sum-exp −inf. With +inf
// among them the log-sum-exp is +inf or NaN.
template <class T>
struct ExpSums {
    T shift = -static_cast<T>(INFINITY);  // −inf: nothing above −inf was met
    T sum = 0;                            // Σ e^{x − shift}
    T moment = 0;                         // Σ e^{x − shift}(x − shift)

    // The same sums relative to another shift, which must not be −inf unless this one is.
    RDPO_HOST_DEVICE void move(T to) {
        if (shift != -static_cast<T>(INFINITY)) {
            const T delta = shift - to, factor = std::exp(delta);
            moment = factor * (moment + delta * sum);
            sum *= factor;
        }
        shift = to;
    }

    // Adds one x: one exponential.
    RDPO_HOST_DEVICE void add(T x) {
        if (x > shift) {
            move(x);
            sum += T(1);
            return;
        }
        // Until something above −inf is met, −inf adds 0 and not e^{−inf + inf}.
        const T distance = shift == -static_cast<T>(INFINITY) ? x : x - shift, e = std::exp(distance);
        sum += e;
        if (e != T(0)) moment += e * distance;
    }

    // Adds what another part of the row has met.
    RDPO_HOST_DEVICE void merge(ExpSums other) {
        const T to = shift > other.shift ? shift : other.shift;
        move(to);
        other.move(to);
        sum += other.sum;
        moment += other.moment;
    }

    RDPO_HOST_DEVICE T lse() const { return shift + std::log(sum); }
    RDPO_HOST_DEVICE T logp(T logit) const { return (logit - shift) - std::log(sum); }
    RDPO_HOST_DEVICE T entropy() const { return std::log(sum) - moment / sum; }
};

template <class T>
struct SumError {
    T sum, error;  // a rounded sum, and what the rounding has lost
};

// a − b to twice the digits. A log-sum-exp taken as logit − logp of the target: in rows of logits around 10⁴ its last digit
// alone would put all probabilities off by 10⁻³.
template <class T>
RDPO_HOST_DEVICE SumError<T> exact_difference(T a, T b) {
    const T sum = a - b, back = sum - a;
    return {sum, (a - (sum - back)) - (b + back)};
}

// softmax − 1, from the log-prob: exact where the model is nearly certain.
template <class T>
RDPO_HOST_DEVICE T softmax_minus_one(T logp) {
    return std::expm1(logp);
}

// softcap·tanh(z/softcap); without the tanh where softcap is 0.
template <class T>
RDPO_HOST_DEVICE ValueSlope<T> capped(T z, T softcap) {
    if (softcap == T(0)) return {z, T(1)};
    const T t = std::tanh(z / softcap);
    return {softcap * t, T(1) - t * t};
}

// −logσ(u) and −σ(−u): one exponential, no overflow, no lost digits at any u.
template <class T>
RDPO_HOST_DEVICE ValueSlope<T> negative_log_sigmoid(T u) {
    const T small = std::exp(-std::fabs(u));
    const T value = (u < T(0) ? -u : T(0)) + std::log1p(small);
    return {value, -(u > T(0) ? small : T(1)) / (T(1) + small)};
}

// The score s = hℓ/t of a group, held to finite numbers, so that differences of scores are numbers. A NaN stays.
template <class T>
RDPO_HOST_DEVICE T tilted_score(T loss, T calibration, T temperature) {
    constexpr T largest = sizeof(T) == sizeof(double) ? static_cast<T>(DBL_MAX) : static_cast<T>(FLT_MAX);
    const T score = calibration * loss / temperature;
    return score > largest ? largest : score < -largest ? -largest : score;
}

// Unnormalised weights e^{s − shift} accumulate over chunks; see kernels/group_epilogue.py.
template <class T>
struct TiltState {
    T shift;    // −inf before the first chunk
    T total;    // Σ e^{s − shift}
    T rescale;  // what everything accumulated before the last chunk has to be multiplied by

    // Makes room for scores of up to `highest` (NaN left out): the shift stays until one exceeds it by `headroom`.
    RDPO_HOST_DEVICE void make_room(T highest, T headroom) {
        const bool begins = shift == -static_cast<T>(INFINITY);
        const T to = begins || highest > shift + headroom ? highest : shift;
        rescale = begins || to == shift ? T(1) : std::exp(shift - to);
        total *= rescale;
        shift = to;
    }

    RDPO_HOST_DEVICE T weight(T score) const { return std::exp(score - shift); }
};

}  // namespace
}  // namespace robust_dpo
