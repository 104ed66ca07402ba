"""Losses of a whole batch: optimal transport on a line, which matches two samples by their ranks.

AOT (Melnyk et al., arXiv 2406.05882) asks that the distribution of one quantity dominates that of another: that every
quantile does. The sample is all strictly ranked pairs of all groups. S, R: log-prob of a response under policy and
reference, d = S − R. Pairs that tie have the ranks of their order in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.checks import Interval
from robust_dpo.losses.pairs import Pair, pairwise_loss
from robust_dpo.losses.pairwise import smoothed
from robust_dpo.losses.registry import register_loss

_SMOOTHING = Interval(0.0, 0.5)


@register_loss("aot", couples_groups=True, label_smoothing=_SMOOTHING)
@pairwise_loss
def aot(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Paired AOT: −(1−ε)logσ(βδ) − ε logσ(−βδ), δ_i the i-th smallest S_w − S_l minus the i-th smallest R_w − R_l.

    A pair has the rank of its S_w − S_l, and its loss is that of its rank.
    """
    assert pair.chosen.ref_logps is not None and pair.rejected.ref_logps is not None
    policy = pair.chosen.logps - pair.rejected.logps
    reference = pair.chosen.ref_logps - pair.rejected.ref_logps
    return smoothed(beta * (policy - _of_equal_rank(reference, policy, pair.ranked)), label_smoothing)


@register_loss("aot_unpaired", couples_groups=True, label_smoothing=_SMOOTHING)
@pairwise_loss
def aot_unpaired(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Unpaired AOT: the same of δ_i = the i-th smallest d_w minus the i-th smallest d_l.

    A pair has the rank of its d_w: the loss of a rank belongs to the group of the chosen response, whoever the rejected
    one belongs to. So a robust weight scales the gradients of rejected responses of other groups too.
    """
    chosen, rejected = pair.chosen.log_ratios, pair.rejected.log_ratios
    return smoothed(beta * (chosen - _of_equal_rank(rejected, chosen, pair.ranked)), label_smoothing)


def _of_equal_rank(values: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    """[G, P] for each of `others` the one of `values` that has its rank, among those that count.

    A pair with a number that is not finite is left out and keeps its own: no other group's loss is to show it.
    """
    left_out = ~(counts & values.isfinite() & others.isfinite())

    def ascending(sample: Tensor) -> Tensor:
        """[G·P] int64 places of a sample from its smallest number on, then of all that is left out, in their order."""
        return sample.detach().masked_fill(left_out, float("inf")).flatten().argsort(stable=True)

    flat = values.flatten()
    return torch.zeros_like(flat).scatter(0, ascending(others), flat[ascending(values)]).view_as(values)
