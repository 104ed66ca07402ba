"""The built-in losses of one group and their derivatives, as functions that the group_epilogue kernel calls.

All have one signature, `loss(group, first, second) -> ℓ [], ∂ℓ/∂logp [K]`, so that the kernel knows none of them by
name; `first` and `second` are the options in the order of `LossKernel.options`. K is the padded size of a group.
Everything is fp64: the blocks are small, and robust weights are exponentials of what comes out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class GroupBlock(NamedTuple):
    """One group, as losses see it.

    Args:
        logp: [K] log-probs S under the policy, 0 where there is no response.
        ref_logp: [K] log-probs under the reference, 0 where there is none.
        length: [K] tokens |y|, at least 1.
        quality: [K] scores, or minus the position.
        m_response: [K] where there is a response.
        m_better: [K, K] both are responses, and the first is strictly better.
        m_before: [K, K] both are responses, and the first comes earlier in the order: best first, ties by position.
        size: [] number of responses.
    """

    logp: tl.tensor
    ref_logp: tl.tensor
    length: tl.tensor
    quality: tl.tensor
    m_response: tl.tensor
    m_better: tl.tensor
    m_before: tl.tensor
    size: tl.tensor


class LossKernel(NamedTuple):
    """A loss in Triton.

    Args:
        function: `@triton.jit`, of the signature above.
        options: names of what it takes as `first` and `second`.
    """

    function: Any
    options: tuple[str, ...]


@triton.jit
def _negative_log_sigmoid(b_u: tl.tensor) -> tl.tuple:
    """−logσ(u) and its derivative −σ(−u): one exponential, no overflow, no lost digits at any u."""
    b_small = tl.exp(-tl.abs(b_u))
    b_sum = 1.0 + b_small
    # log1p, which Triton has not: log(1 + z) is off by the rounding of 1 + z, and so is (1 + z) − 1 in the quotient.
    b_kept = b_sum - 1.0
    m_lost = b_kept == 0.0
    b_log = tl.where(m_lost, b_small, tl.log(b_sum) * (b_small / tl.where(m_lost, 1.0, b_kept)))
    return tl.maximum(-b_u, 0.0) + b_log, -tl.where(b_u > 0.0, b_small, 1.0) / b_sum


@triton.jit
def _differences(b_x: tl.tensor) -> tl.tensor:
    """[K] → [K, K], x_i − x_j."""
    return b_x[:, None] - b_x[None, :]


@triton.jit
def _over_pairs(
    m_better: tl.tensor, b_value: tl.tensor, b_slope: tl.tensor, b_weight: tl.tensor, count: tl.tensor
) -> tl.tuple:
    """Σ f(x_i − x_j) / count over the pairs whose first response is better, and its derivative by the log-probs.

    Args:
        m_better: [K, K].
        b_value: [K, K] f.
        b_slope: [K, K] f'.
        b_weight: [K] ∂x/∂logp, or 1.0.
        count: what the sum is divided by.
    """
    b_slope = tl.where(m_better, b_slope, 0.0)
    loss = tl.sum(tl.sum(tl.where(m_better, b_value, 0.0), 1), 0) / count
    return loss, b_weight * (tl.sum(b_slope, 1) - tl.sum(b_slope, 0)) / count


@triton.jit
def _mean_over_pairs(m_better: tl.tensor, b_value: tl.tensor, b_slope: tl.tensor, b_weight: tl.tensor) -> tl.tuple:
    """`_over_pairs`, divided by their number; 0 without a pair."""
    pairs = tl.sum(tl.sum(m_better.to(tl.float64), 1), 0)
    return _over_pairs(m_better, b_value, b_slope, b_weight, tl.maximum(pairs, 1.0))


@triton.jit
def _sigmoid(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """−logσ(u), u = βΔ; first: β."""
    b_value, b_slope = _negative_log_sigmoid(first * _differences(group.logp - group.ref_logp))
    return _mean_over_pairs(group.m_better, b_value, first * b_slope, 1.0)


@triton.jit
def _tilted_sigmoid(group: GroupBlock, beta: tl.tensor, slope: tl.tensor) -> tl.tuple:
    """−logσ(u) + slope · u."""
    b_u = beta * _differences(group.logp - group.ref_logp)
    b_value, b_slope = _negative_log_sigmoid(b_u)
    return _mean_over_pairs(group.m_better, b_value + slope * b_u, beta * (b_slope + slope), 1.0)


@triton.jit
def _cdpo(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """−(1−ε)logσ(u) − ε logσ(−u) = −logσ(u) + εu, as logσ(u) − logσ(−u) = u; first: β, second: ε."""
    return _tilted_sigmoid(group, first, second)


@triton.jit
def _robust(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """[−(1−ε)logσ(u) + ε logσ(−u)]/(1−2ε) = −logσ(u) − εu/(1−2ε); first: β, second: ε."""
    return _tilted_sigmoid(group, first, -second / (1.0 - 2.0 * second))


@triton.jit
def _ipo(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """(d̄_w − d̄_l − 1/(2β))²; first: β, second: whether d̄ is d/|y| (1) or d (0)."""
    b_weight = 1.0 / tl.where(second != 0.0, group.length, 1.0)
    b_gap = _differences((group.logp - group.ref_logp) * b_weight) - 1.0 / (2.0 * first)
    return _mean_over_pairs(group.m_better, b_gap * b_gap, 2.0 * b_gap, b_weight)


@triton.jit
def _simpo(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """−logσ(β(S_w/|y_w| − S_l/|y_l| − γ/β)); first: β, second: γ/β."""
    b_value, b_slope = _negative_log_sigmoid(first * (_differences(group.logp / group.length) - second))
    return _mean_over_pairs(group.m_better, b_value, first * b_slope, 1.0 / group.length)


@triton.jit
def _plackett_luce(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """−(1/K) Σ_i log[ e^{t_i} / Σ_{j in the race of i} e^{t_j} ], t = βd; first: β."""
    b_t = first * (group.logp - group.ref_logp)
    o_slot = tl.arange(0, b_t.shape[0])
    # The race of i holds i and all that come later. No sort is needed to know who they are.
    m_race = group.m_before | (o_slot[:, None] == o_slot[None, :])
    b_others = tl.where(m_race, tl.broadcast_to(b_t[None, :], m_race.shape), float("-inf"))
    b_top = tl.max(b_others, 1)
    b_power = tl.exp(b_others - b_top[:, None])
    b_sum = tl.sum(b_power, 1)
    b_value = tl.where(group.m_response, b_top + tl.log(b_sum) - b_t, 0.0)
    b_share = tl.where(group.m_response[:, None], b_power / b_sum[:, None], 0.0)
    return tl.sum(b_value, 0) / group.size, first * (tl.sum(b_share, 0) - group.m_response.to(tl.float64)) / group.size


@triton.jit
def _sft(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """−S/|y| of the best response, which none comes before."""
    m_best = group.m_response & (tl.sum(group.m_before.to(tl.int32), 0) == 0)
    b_weight = tl.where(m_best, -1.0 / group.length, 0.0)
    return tl.sum(tl.where(m_best, group.logp * b_weight, 0.0), 0), b_weight


@triton.jit
def _rrhf(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """(1/K) Σ_{i better than j} max(0, s_j − s_i) + η·sft, s = S/|y|^p; first: p, second: η."""
    b_weight = tl.exp(-first * tl.log(group.length))
    b_margin = _differences(group.logp * b_weight)
    b_slope = -(b_margin < 0.0).to(tl.float64)
    rank, b_rank = _over_pairs(group.m_better, tl.maximum(-b_margin, 0.0), b_slope, b_weight, group.size)
    nll, b_nll = _sft(group, first, second)
    # Without the term, not 0 · ∞ where the best response is impossible.
    return rank + tl.where(second > 0.0, second * nll, 0.0), b_rank + second * b_nll


@triton.jit
def _masked_softmax(b_x: tl.tensor, m_x: tl.tensor) -> tl.tensor:
    b_x = tl.where(m_x, b_x, float("-inf"))
    b_power = tl.exp(b_x - tl.max(b_x, 0))
    return b_power / tl.sum(b_power, 0)


@triton.jit
def _lire(group: GroupBlock, first: tl.tensor, second: tl.tensor) -> tl.tuple:
    """−(1/K) Σ_i softmax(S/T)_i · softmax(scores)_i; first: T."""
    b_policy = _masked_softmax(group.logp / first, group.m_response)
    b_reward = _masked_softmax(group.quality, group.m_response)
    expected = tl.sum(b_policy * b_reward, 0)
    return -expected / group.size, -b_policy * (b_reward - expected) / (first * group.size)


LOSS_KERNELS = {
    "sigmoid": LossKernel(_sigmoid, ("beta",)),
    "cdpo": LossKernel(_cdpo, ("beta", "label_smoothing")),
    "robust": LossKernel(_robust, ("beta", "label_smoothing")),
    "ipo": LossKernel(_ipo, ("beta", "length_normalize")),
    "simpo": LossKernel(_simpo, ("beta", "gamma_beta_ratio")),
    "plackett_luce": LossKernel(_plackett_luce, ("beta",)),
    "rrhf": LossKernel(_rrhf, ("length_penalty", "sft_weight")),
    "lire": LossKernel(_lire, ("temperature",)),
    "sft": LossKernel(_sft, ()),
}
