// The built-in losses of one group and their derivatives, for CPU and GPU kernels.
//
// A loss is a struct of two functions, which responses of a group can run side by side:
//
//   memo(group, i, options)         what others need to know of response i
//   part(group, memos, i, options)  its part of the loss, and of the derivative by its log-prob
//
// ℓ = Σ value / d and ∂ℓ/∂S_i = slope_i / d with d = max(1, Σ divisor). What a kernel needs of the order of the responses is
// whether one goes before another, so nothing is sorted. A loss is added by its struct and its place in `GroupLosses`.
//
// Semantics are those of robust_dpo/losses. S: log-prob, R: under the reference, d = S − R, |y|: tokens.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace robust_dpo {
namespace {

template <class T>
struct Group {
    const T* logp;     // [size] S
    const T* ref;      // [size] R, 0 without a reference
    const T* length;   // [size] |y|, at least 1
    const T* quality;  // [size] scores, or minus the position
    int64_t size;      // K

    RDPO_HOST_DEVICE T log_ratio(int64_t i) const { return logp[i] - ref[i]; }
    RDPO_HOST_DEVICE bool better(int64_t i, int64_t j) const { return quality[i] > quality[j]; }
    // Best first, ties by position.
    RDPO_HOST_DEVICE bool before(int64_t i, int64_t j) const {
        return better(i, j) || (quality[i] == quality[j] && i < j);
    }
    RDPO_HOST_DEVICE bool best(int64_t i) const {
        for (int64_t j = 0; j < size; ++j)
            if (before(j, i)) return false;
        return true;
    }
};

template <class T>
struct LossOptions {
    T first, second;  // in the order of the loss's kOptions
};

template <class T>
struct Memo {
    T value, weight;  // for pairwise losses x and ∂x/∂S
};

template <class T>
struct LossPart {
    T value, slope, divisor;
};

// The mean of Loss::pair(x_i − x_j) over the pairs whose first response is strictly better; 0 without one.
template <class Loss>
struct Pairwise {
    template <class T>
    RDPO_HOST_DEVICE static LossPart<T> part(const Group<T>& group, const Memo<T>* memos, int64_t i,
                                             const LossOptions<T>& options) {
        LossPart<T> sum{0, 0, 0};
        for (int64_t j = 0; j < group.size; ++j) {
            if (group.better(i, j)) {
                const ValueSlope<T> won = Loss::pair(memos[i].value - memos[j].value, options);
                sum.value += won.value;
                sum.slope += won.slope;
                sum.divisor += T(1);
            } else if (group.better(j, i)) {
                sum.slope -= Loss::pair(memos[j].value - memos[i].value, options).slope;
            }
        }
        sum.slope *= memos[i].weight;
        return sum;
    }
};

// Pairwise losses of log-ratios.
template <class Loss>
struct PairwiseLogRatio : Pairwise<Loss> {
    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>& group, int64_t i, const LossOptions<T>&) {
        return {group.log_ratio(i), T(1)};
    }
};

// −logσ(u) + tilt·u, u = βΔ.
template <class T>
RDPO_HOST_DEVICE ValueSlope<T> tilted_sigmoid(T margin, T beta, T tilt) {
    const ValueSlope<T> plain = negative_log_sigmoid(beta * margin);
    return {plain.value + tilt * (beta * margin), beta * (plain.slope + tilt)};
}

// DPO: −logσ(u), u = βΔ.
struct Sigmoid : PairwiseLogRatio<Sigmoid> {
    static constexpr const char* kName = "sigmoid";
    static constexpr const char* kOptions[2] = {"beta", nullptr};

    template <class T>
    RDPO_HOST_DEVICE static ValueSlope<T> pair(T margin, const LossOptions<T>& options) {
        const ValueSlope<T> plain = negative_log_sigmoid(options.first * margin);
        return {plain.value, options.first * plain.slope};
    }
};

// −(1−ε)logσ(u) − ε logσ(−u) = −logσ(u) + εu, as logσ(u) − logσ(−u) = u.
struct Cdpo : PairwiseLogRatio<Cdpo> {
    static constexpr const char* kName = "cdpo";
    static constexpr const char* kOptions[2] = {"beta", "label_smoothing"};

    template <class T>
    RDPO_HOST_DEVICE static ValueSlope<T> pair(T margin, const LossOptions<T>& options) {
        return tilted_sigmoid(margin, options.first, options.second);
    }
};

// [−(1−ε)logσ(u) + ε logσ(−u)]/(1−2ε) = −logσ(u) − εu/(1−2ε).
struct Robust : PairwiseLogRatio<Robust> {
    static constexpr const char* kName = "robust";
    static constexpr const char* kOptions[2] = {"beta", "label_smoothing"};

    template <class T>
    RDPO_HOST_DEVICE static ValueSlope<T> pair(T margin, const LossOptions<T>& options) {
        return tilted_sigmoid(margin, options.first, -options.second / (T(1) - T(2) * options.second));
    }
};

// (d̄_w − d̄_l − 1/(2β))², d̄ = d/|y| or d.
struct Ipo : Pairwise<Ipo> {
    static constexpr const char* kName = "ipo";
    static constexpr const char* kOptions[2] = {"beta", "length_normalize"};

    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>& group, int64_t i, const LossOptions<T>& options) {
        const T length = options.second == T(0) ? T(1) : group.length[i];
        return {group.log_ratio(i) / length, T(1) / length};
    }

    template <class T>
    RDPO_HOST_DEVICE static ValueSlope<T> pair(T margin, const LossOptions<T>& options) {
        const T gap = margin - T(1) / (T(2) * options.first);
        return {gap * gap, T(2) * gap};
    }
};

// −logσ(β(S_w/|y_w| − S_l/|y_l| − γ/β)).
struct SimPo : Pairwise<SimPo> {
    static constexpr const char* kName = "simpo";
    static constexpr const char* kOptions[2] = {"beta", "gamma_beta_ratio"};

    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>& group, int64_t i, const LossOptions<T>&) {
        return {group.logp[i] / group.length[i], T(1) / group.length[i]};
    }

    template <class T>
    RDPO_HOST_DEVICE static ValueSlope<T> pair(T margin, const LossOptions<T>& options) {
        return Sigmoid::pair(margin - options.second, options);
    }
};

// −(1/K) Σ_i log[ e^{t_i} / Σ_{j in the race of i} e^{t_j} ], t = βd; the race of i holds i and all that come later.
struct PlackettLuce {
    static constexpr const char* kName = "plackett_luce";
    static constexpr const char* kOptions[2] = {"beta", nullptr};

    // t and the log-sum-exp of the race.
    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>& group, int64_t i, const LossOptions<T>& options) {
        const T own = options.first * group.log_ratio(i);
        T top = own;
        for (int64_t j = 0; j < group.size; ++j) {
            const T other = options.first * group.log_ratio(j);
            if (group.before(i, j) && other > top) top = other;
        }
        T sum = std::exp(own - top);
        for (int64_t j = 0; j < group.size; ++j)
            if (group.before(i, j)) sum += std::exp(options.first * group.log_ratio(j) - top);
        return {own, top + std::log(sum)};
    }

    template <class T>
    RDPO_HOST_DEVICE static LossPart<T> part(const Group<T>& group, const Memo<T>* memos, int64_t i,
                                             const LossOptions<T>& options) {
        // The probability of i in every race that it runs in.
        T share = 0;
        for (int64_t j = 0; j < group.size; ++j)
            if (j == i || group.before(j, i)) share += std::exp(memos[i].value - memos[j].weight);
        return {memos[i].weight - memos[i].value, options.first * (share - T(1)), T(1)};
    }
};

// −S/|y| of the best response.
struct Sft {
    static constexpr const char* kName = "sft";
    static constexpr const char* kOptions[2] = {nullptr, nullptr};

    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>&, int64_t, const LossOptions<T>&) {
        return {0, 0};
    }

    template <class T>
    RDPO_HOST_DEVICE static LossPart<T> part(const Group<T>& group, const Memo<T>*, int64_t i, const LossOptions<T>&) {
        if (!group.best(i)) return {0, 0, 0};
        return {-group.logp[i] / group.length[i], T(-1) / group.length[i], T(1)};
    }
};

// (1/K) Σ_{i better than j} max(0, s_j − s_i) + η·sft, s = S/|y|^p.
struct Rrhf : Pairwise<Rrhf> {
    static constexpr const char* kName = "rrhf";
    static constexpr const char* kOptions[2] = {"length_penalty", "sft_weight"};

    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>& group, int64_t i, const LossOptions<T>& options) {
        // Divided by, not multiplied with the inverse: equal quotients stay equal, and max(0, ·) has its kink there.
        const T length = std::pow(group.length[i], options.first);
        return {group.logp[i] / length, T(1) / length};
    }

    template <class T>
    RDPO_HOST_DEVICE static ValueSlope<T> pair(T margin, const LossOptions<T>&) {
        if (margin >= T(0)) return {0, 0};
        return {-margin, T(-1)};
    }

    template <class T>
    RDPO_HOST_DEVICE static LossPart<T> part(const Group<T>& group, const Memo<T>* memos, int64_t i,
                                             const LossOptions<T>& options) {
        LossPart<T> sum = Pairwise<Rrhf>::part(group, memos, i, options);
        sum.divisor = T(1);
        // Without the term, not 0·∞ where the best response is impossible.
        if (options.second > T(0)) {
            const T factor = options.second * static_cast<T>(group.size);
            const LossPart<T> nll = Sft::part(group, memos, i, options);
            sum.value += factor * nll.value;
            sum.slope += factor * nll.slope;
        }
        return sum;
    }
};

// −(1/K) Σ_i softmax(S/T)_i · softmax(scores)_i.
struct Lire {
    static constexpr const char* kName = "lire";
    static constexpr const char* kOptions[2] = {"temperature", nullptr};

    // Numerators of both softmaxes.
    template <class T>
    RDPO_HOST_DEVICE static Memo<T> memo(const Group<T>& group, int64_t i, const LossOptions<T>& options) {
        T top = group.logp[0], best = group.quality[0];
        for (int64_t j = 1; j < group.size; ++j) {
            top = group.logp[j] > top ? group.logp[j] : top;
            best = group.quality[j] > best ? group.quality[j] : best;
        }
        return {std::exp((group.logp[i] - top) / options.first), std::exp(group.quality[i] - best)};
    }

    template <class T>
    RDPO_HOST_DEVICE static LossPart<T> part(const Group<T>& group, const Memo<T>* memos, int64_t i,
                                             const LossOptions<T>& options) {
        T policy = 0, reward = 0, both = 0;
        for (int64_t j = 0; j < group.size; ++j) {
            policy += memos[j].value;
            reward += memos[j].weight;
            both += memos[j].value * memos[j].weight;
        }
        const T mine = memos[i].value / policy, wanted = memos[i].weight / reward, expected = both / policy / reward;
        return {-mine * wanted, -mine * (wanted - expected) / options.first, T(1)};
    }
};

template <class... Losses>
struct LossList {};

// A loss's code is its place in the list.
using GroupLosses = LossList<Sigmoid, Cdpo, Robust, Ipo, SimPo, PlackettLuce, Rrhf, Lire, Sft>;

// visit(Loss{}) for every loss, in the order of their codes.
template <class Visitor, class... Losses>
void for_each_loss(LossList<Losses...>, Visitor&& visit) {
    (visit(Losses{}), ...);
}

// visit(Loss{}) for the loss of that code.
template <class Visitor>
void with_loss(int code, Visitor&& visit) {
    int at = 0;
    for_each_loss(GroupLosses{}, [&](auto loss) {
        if (at++ == code) visit(loss);
    });
}

// One thread, all responses in turn: the loss, with its derivative by each log-prob.
template <class Loss, class T>
RDPO_HOST_DEVICE T solve_group(const Group<T>& group, const LossOptions<T>& options, Memo<T>* memos, T* derivative) {
    for (int64_t i = 0; i < group.size; ++i) memos[i] = Loss::memo(group, i, options);
    T value = 0, divisor = 0;
    for (int64_t i = 0; i < group.size; ++i) {
        const LossPart<T> part = Loss::part(group, memos, i, options);
        value += part.value;
        divisor += part.divisor;
        derivative[i] = part.slope;
    }
    divisor = divisor > T(1) ? divisor : T(1);
    for (int64_t i = 0; i < group.size; ++i) derivative[i] /= divisor;
    return value / divisor;
}

}  // namespace
}  // namespace robust_dpo
