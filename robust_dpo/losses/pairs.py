"""Pairwise losses on groups of any size: written once for a pair, lifted to all ranked pairs of a group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.groups import Groups


@dataclass(frozen=True)
class Pair:
    """The P = K(K−1)/2 pairs of every group, sorted into the better and the worse response.

    Args:
        chosen: the better response of each pair, with values [G, P].
        rejected: the worse one, with values [G, P].
        ranked: [G, P] bool, True where both responses exist and one is strictly better. Elsewhere
            both sides hold logps 0 and length 1, so that every loss and gradient is finite there.
    """

    chosen: Groups
    rejected: Groups
    ranked: Tensor

    @property
    def margin(self) -> Tensor:
        """[G, P] Δ, log-ratio of the chosen minus that of the rejected response."""
        return self.chosen.log_ratios - self.rejected.log_ratios


def ranked_pairs(groups: Groups) -> Pair:
    """All pairs of every group, the winner decided by `groups.quality`."""
    width = groups.logps.shape[1]
    first, second = torch.triu_indices(width, width, offset=1, device=groups.logps.device)
    quality = groups.quality
    first_wins = quality[:, first] > quality[:, second]
    second_wins = quality[:, first] < quality[:, second]
    ranked = groups.mask[:, first] & groups.mask[:, second] & (first_wins | second_wins)

    def side(is_first: Tensor) -> Groups:
        def pick(values: Tensor, fill: float) -> Tensor:
            return torch.where(is_first, values[:, first], values[:, second]).masked_fill(~ranked, fill)

        ref_logps = None if groups.ref_logps is None else pick(groups.ref_logps, 0.0)
        return Groups(pick(groups.logps, 0.0), pick(groups.lengths, 1.0), ranked, ref_logps)

    return Pair(side(first_wins), side(~first_wins), ranked)


def pairwise_loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lift `fn(pair, **options) -> [G, P]` to a loss of groups.

    The loss of a group is the mean over its strictly ranked pairs (for K = 2, the pair's own loss). A group
    without one, because of ties or because it has a single response, has loss 0 and no gradient.
    """

    @functools.wraps(function)
    def loss(groups: Groups, **options: float | bool) -> Tensor:
        pair = ranked_pairs(groups)
        losses = function(pair, **options).masked_fill(~pair.ranked, 0.0)
        return losses.sum(1) / pair.ranked.sum(1).clamp(min=1)

    return loss
