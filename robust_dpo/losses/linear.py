"""A linear function of log-probs, for gradients whose coefficients are known beforehand."""

from __future__ import annotations

from torch import Tensor

from robust_dpo.groups import Groups
from robust_dpo.losses.registry import BoundLoss


def _linear(groups: Groups) -> Tensor:
    assert groups.scores is not None
    return (groups.scores.to(groups.logps.dtype) * groups.logps).sum(1)


LINEAR = BoundLoss("linear", _linear, (), needs_reference=False, needs_scores=True, built_in=True)
"""Σ_k c_k S_k of each group, [G]; the coefficients c come in place of the scores."""
