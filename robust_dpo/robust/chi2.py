"""Worst cases in a χ² ball around the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.checks import NON_NEGATIVE, POSITIVE, check_number
from robust_dpo.errors import argument_error
from robust_dpo.robust.base import RobustObjective, Solution, calibrated, whole_batch
from robust_dpo.robust.registry import register_objective

# Halvings of a bracket: after 100 its ends are neighbours in float64.
_HALVINGS = 100


@register_objective("chi2")
@dataclass(frozen=True)
class Chi2(RobustObjective):
    """Max over q of Σ q hℓ − λ·D or within D ≤ ρ, with D = χ²(q‖1/G)/2 = (G Σ q² − 1)/2.

    With a penalty λ: η + mean(hℓ − η + λ)₊²/(2λ) − λ/2, q = (1/G)(1 + (hℓ − η)/λ)₊ (Namkoong & Duchi 2017). Within a
    radius ρ: min_η √(1+2ρ) √mean(hℓ − η)₊² + η, q ∝ (hℓ − η)₊, so the effective sample size is at least G/(1+2ρ).
    η depends on the whole batch, so gradients cannot be accumulated first.

    Args:
        lam: λ > 0, default 1; → ∞ is the mean, → 0 the maximum.
        radius: ρ ≥ 0, in place of `lam`; 0 is the mean, (G − 1)/2 and more the maximum.

    Raises:
        ValueError: both are given, or a value is out of its range.
        TypeError: a value is not a number.
    """

    lam: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.lam is not None and self.radius is not None:
            raise argument_error("radius", "no radius beside lam: they exclude one another", self.radius)
        if self.radius is not None:
            object.__setattr__(self, "radius", check_number("radius", self.radius, NON_NEGATIVE))
        else:
            object.__setattr__(self, "lam", check_number("lam", 1.0 if self.lam is None else self.lam, POSITIVE))

    @property
    def has_parameter(self) -> bool:
        return self.radius is None

    @torch.no_grad()
    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        losses, calibration = whole_batch(self, losses, calibration, log_normalizer)
        values = calibrated(losses, calibration)
        exact = values if values.device.type == "mps" else values.double()
        if self.radius is None:
            assert self.lam is not None
            weights, penalty = _of_penalty(exact, self.lam), self.lam
        else:
            weights, penalty = _of_radius(exact, self.radius), 0.0
        # GΣq² − 1 as a sum of squares: it is a small difference where λ is large.
        divergence = (len(exact) * weights - 1).square().mean() / 2
        value = (weights * exact).sum() - penalty * divergence
        weights = weights.to(values.dtype)
        return Solution(
            value=value.to(values.dtype),
            weights=weights,
            coefficients=weights if calibration is None else weights * calibration,
            parameter=values.new_tensor(self.lam if self.radius is None else self.radius),
            log_partition=values.new_zeros(()),
        )


@register_objective("chi2_radius")
def chi2_radius() -> Chi2:
    """`Chi2(radius=0.1)`."""
    return Chi2(radius=0.1)


def _of_penalty(values: Tensor, lam: float) -> Tensor:
    """[G] (1/G)(1 + (v − η)/λ)₊ with Σ = 1; the sum falls with η, from 1 or more at min v to 0 at max v + λ."""
    scaled = (values - values.amax()) / lam
    low, high = scaled.amin(), torch.ones_like(scaled[0])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = (1 + scaled - middle).clamp(min=0).mean() >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    weights = (1 + scaled - low).clamp(min=0)
    return weights / weights.sum()


def _of_radius(values: Tensor, radius: float) -> Tensor:
    """[G] ∝ (v − η)₊ with (G Σq² − 1)/2 = ρ, which rises with η, from 0 at −∞ to that of the argmax alone."""
    size = len(values)
    top = values.amax()
    at_top = (values == top).to(values.dtype)
    spread = (top - values.amin()).clamp(min=torch.finfo(values.dtype).tiny)
    below = (values - top) / spread

    def weights_at(depth: Tensor) -> Tensor:
        """For η = −depth, in units of the spread."""
        raised = (below + depth).clamp(min=0)
        return raised / raised.sum()

    # On a logarithmic scale: a small radius needs a depth of √(Var/2ρ), a large one less than the best differ by.
    low, high = values.new_tensor(math.log(torch.finfo(values.dtype).tiny)), values.new_tensor(34.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        inside = (size * weights_at(middle.exp()).square().sum() - 1) / 2 <= radius
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    weights = weights_at(high.exp())
    concentrated = radius >= (size / at_top.sum() - 1) / 2
    weights = torch.where(concentrated, at_top / at_top.sum(), weights)
    return torch.full_like(weights, 1 / size) if radius == 0 else weights
