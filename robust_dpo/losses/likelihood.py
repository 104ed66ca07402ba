"""Losses of one response alone."""

from __future__ import annotations

from torch import Tensor

from robust_dpo.groups import Groups
from robust_dpo.losses.registry import register_loss


@register_loss("sft", needs_reference=False)
def sft(groups: Groups) -> Tensor:
    """Token-mean negative log-likelihood of the best response of each group: −S/|y|."""
    best = groups.order[:, :1]
    return -groups.mean_logps.gather(1, best).squeeze(1)
