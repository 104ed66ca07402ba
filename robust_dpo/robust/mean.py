"""The plain mean over groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from robust_dpo.robust.base import ExponentialTilt
from robust_dpo.robust.registry import register_objective


@register_objective("mean")
@dataclass(frozen=True)
class Mean(ExponentialTilt):
    """mean(hℓ), the limit of no robustness: weights 1/G, coefficients h/G.

    Without calibration this is empirical risk minimisation, with it importance reweighting. As a part of a
    batch it takes log_normalizer = log(number of groups of the whole batch), and its value is the part's
    share of the mean itself.
    """

    @property
    def has_parameter(self) -> bool:
        return False

    @property
    def temperature(self) -> float:
        return math.inf

    def _value(self, values: Tensor) -> Tensor:
        return values.mean(0)

    def value_of_parts(self, values: Tensor, counts: Tensor) -> Tensor:
        return (values * counts / counts.sum()).sum(0)

    def _surrogate(self, values: Tensor, weights: Tensor) -> Tensor:
        return (weights * values).sum(0)
