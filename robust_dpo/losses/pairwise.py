"""Losses of a pair: the chosen against the rejected response.

d: log-ratio of a response, Δ = d_w − d_l, u = βΔ, S: log-prob, |y|: tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from robust_dpo.checks import Interval
from robust_dpo.losses.pairs import Pair, pairwise_loss
from robust_dpo.losses.registry import register_loss


@register_loss("sigmoid")
@pairwise_loss
def sigmoid(pair: Pair, *, beta: float = 0.1) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7): −logσ(u)."""
    return -logsigmoid(beta * pair.margin)


@register_loss("cdpo", label_smoothing=Interval(0.0, 0.5))
@pairwise_loss
def cdpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"): −(1−ε)logσ(u) − ε logσ(−u)."""
    return smoothed(beta * pair.margin, label_smoothing)


def smoothed(u: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε)logσ(u) − ε logσ(−u), the cross-entropy of labels that are wrong with probability ε."""
    return -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)


@register_loss("robust", label_smoothing=Interval(0.0, 0.5, high_open=True))
@pairwise_loss
def robust(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO, rDPO (Chowdhury et al., arXiv 2403.00409): [−(1−ε)logσ(u) + ε logσ(−u)] / (1−2ε), ε < ½.

    Unbiased under labels flipped with probability ε; not bounded below: it falls like −εu/(1−2ε).
    """
    u = beta * pair.margin
    flipped = -(1 - label_smoothing) * logsigmoid(u) + label_smoothing * logsigmoid(-u)
    return flipped / (1 - 2 * label_smoothing)


@register_loss("ipo")
@pairwise_loss
def ipo(pair: Pair, *, beta: float = 0.1, length_normalize: bool = True) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, eq. 17): (d̄_w − d̄_l − 1/(2β))², d̄ = d/|y|, or d itself as in the paper."""
    chosen, rejected = pair.chosen.log_ratios, pair.rejected.log_ratios
    if length_normalize:
        chosen, rejected = chosen / pair.chosen.lengths, rejected / pair.rejected.lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@register_loss("simpo", needs_reference=False)
@pairwise_loss
def simpo(pair: Pair, *, beta: float = 2.0, gamma_beta_ratio: float = 0.25) -> Tensor:
    """SimPO (Meng et al., arXiv 2405.14734, eq. 6): −logσ(β(S_w/|y_w| − S_l/|y_l|) − γ), γ = β·gamma_beta_ratio."""
    margin = pair.chosen.mean_logps - pair.rejected.mean_logps
    return -logsigmoid(beta * (margin - gamma_beta_ratio))
