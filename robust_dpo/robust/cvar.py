"""The mean over the worst share of the groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.checks import Interval, check_number
from robust_dpo.robust.base import RobustObjective, Solution, calibrated, whole_batch
from robust_dpo.robust.registry import register_objective

_SHARE = Interval(low=0.0, high=1.0, low_open=True)


@register_objective("cvar")
@dataclass(frozen=True)
class CVaR(RobustObjective):
    """min_η η + mean(hℓ − η)₊/a: the mean over the worst share a, conditional value at risk.

    Rockafellar & Uryasev 2000. Weights are 1/(aG) on the worst aG groups, the last of them with what is left; groups
    that tie there share it. The whole batch decides who they are, so gradients cannot be accumulated first.

    Args:
        share: a in (0, 1]; 1 is the mean, 1/G and less the maximum.

    Raises:
        ValueError, TypeError: share is not such a number.
    """

    share: float = 0.5

    @property
    def has_parameter(self) -> bool:
        return False

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_number("share", self.share, _SHARE))

    @torch.no_grad()
    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        losses, calibration = whole_batch(self, losses, calibration, log_normalizer)
        values = calibrated(losses, calibration)
        weights = self._weights(values)
        return Solution(
            value=(weights * values).sum(),
            weights=weights,
            coefficients=weights if calibration is None else weights * calibration,
            parameter=values.new_tensor(self.share),
            log_partition=values.new_zeros(()),
        )

    def _weights(self, values: Tensor) -> Tensor:
        most = 1 / (self.share * len(values))
        ordered, order = values.sort(descending=True)
        # Weight that the worse groups leave to each.
        left = (1 - most * torch.arange(len(values), device=values.device, dtype=values.dtype)).clamp(min=0)
        weights = torch.empty_like(values).scatter(0, order, left.clamp(max=most))
        weights = weights / weights.sum()
        # The group whose weight is a fraction, and all that tie with it, share alike.
        # Not an index, which a device would have to wait for.
        quantile = ordered.gather(0, (left > 0).sum(0, keepdim=True) - 1)
        tied = (values == quantile).to(values.dtype)
        return torch.where(tied > 0, (weights * tied).sum() / tied.sum(), weights)
