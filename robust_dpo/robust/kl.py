"""Worst (and best) cases in a Kullback-Leibler ball around the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robust_dpo.checks import NON_NEGATIVE, POSITIVE, check_number
from robust_dpo.errors import argument_error
from robust_dpo.robust.base import ExponentialTilt, Solution, calibrated, whole_batch
from robust_dpo.robust.registry import register_objective

CalibrationPosition = Literal["inside", "outside"]


@register_objective("kl")
@dataclass(frozen=True)
class KLRobust(ExponentialTilt):
    """λ log mean e^{hℓ/λ}, the worst case with a KL penalty λ, or within a KL ball of `radius`.

    DoRA, arXiv 2504.05831; duality: Hu & Hong 2013. `KLRobust(lam=1.0)` accumulates in one pass.
    `KLRobust(radius=0.1)` is min_{λ≥0} λρ + λ log mean e^{hℓ/λ} = max Σ q hℓ over KL(q‖1/G) ≤ ρ: λ depends on the
    whole batch, so it does not.

    Args:
        lam: λ > 0, default 1; → ∞ is the mean, → 0 the maximum.
        radius: ρ ≥ 0, in place of `lam`; 0 is the mean, log G and more the maximum.
        calibration: `inside` the exponential, or `outside`: mean(h) · λ log mean e^{ℓ/λ}, with
            coefficients mean(h)·q. Its mean(h) is over the global batch, a second quantity that couples the
            groups, so `outside` takes no `log_normalizer` and is not single-pass.

    Raises:
        ValueError: both `lam` and `radius` are given, or a value is out of its range.
        TypeError: a value is not a number.
    """

    lam: float | None = None
    radius: float | None = None
    calibration: CalibrationPosition = "inside"

    def __post_init__(self) -> None:
        if self.lam is not None and self.radius is not None:
            raise argument_error("radius", "no radius beside lam: they exclude one another", self.radius)
        if self.calibration not in get_args(CalibrationPosition):
            raise argument_error("calibration", "'inside' or 'outside'", repr(self.calibration))
        if self.radius is not None:
            object.__setattr__(self, "radius", check_number("radius", self.radius, NON_NEGATIVE))
        else:
            lam = 1.0 if self.lam is None else self.lam
            object.__setattr__(self, "lam", check_number("lam", lam, POSITIVE))

    @property
    def single_pass(self) -> bool:
        return self.radius is None and self.calibration == "inside"

    @property
    def temperature(self) -> float:
        if self.lam is None or not self.single_pass:
            raise argument_error("robust", "an objective of softmax form (single_pass)", self.key)
        return self.lam

    @torch.no_grad()
    def solve(
        self, losses: Tensor, calibration: Tensor | None = None, log_normalizer: Tensor | float | None = None
    ) -> Solution:
        if self.single_pass:
            return super().solve(losses, calibration, log_normalizer)
        losses, calibration = whole_batch(self, losses, calibration, log_normalizer)
        if self.calibration == "outside":
            plain = replace(self, calibration="inside").solve(losses)
            scale = losses.new_ones(()) if calibration is None else calibration.mean()
            return replace(plain, value=scale * plain.value, coefficients=scale * plain.coefficients)
        assert self.radius is not None
        return _solve_ball(calibrated(losses, calibration), self.factor(calibration, losses), self.radius)


@register_objective("kl_radius")
def kl_radius() -> KLRobust:
    """`KLRobust(radius=0.1)`."""
    return KLRobust(radius=0.1)


@register_objective("dr_dpo")
@dataclass(frozen=True)
class DrDPO(ExponentialTilt):
    """−β′ log mean e^{−hℓ/β′} (Dr. DPO, Wu et al., arXiv 2407.07880): optimistic, trusts pairs of low loss.

    Args:
        beta: β′ > 0; → ∞ is the mean, → 0 the minimum.

    Raises:
        ValueError, TypeError: beta is not a positive number.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", check_number("beta", self.beta, POSITIVE))

    @property
    def temperature(self) -> float:
        return -self.beta


# The inverse temperature a = spread/λ is searched for on a logarithmic grid between these ends. KL ≈ a² Var/2 near 0,
# and losses that differ by 1e-290 of their spread are still told apart at the other end.
_INVERSE_LOW, _INVERSE_HIGH = 1e-12, 1e300
# 64 sections a round: log(1e312)/64⁹ = 4e-14 is the relative width of the last bracket, for 9 rounds of small
# launches where halving would take 54.
_SECTIONS, _ROUNDS = 64, 9


def _solve_ball(values: Tensor, factor: Tensor, radius: float) -> Solution:
    """Maximum of Σ q·values over KL(q‖1/G) ≤ radius, at q ∝ e^{values/λ}; nothing is read back from the device."""
    # The divergence is a small difference of larger numbers; only fp64 resolves a small radius.
    exact = values if values.device.type == "mps" else values.double()
    top = exact.amax()
    spread = (top - exact.amin()).clamp(min=torch.finfo(exact.dtype).tiny)
    below = (exact - top) / spread
    ends = (math.log(_INVERSE_LOW), min(math.log(_INVERSE_HIGH), math.log(torch.finfo(exact.dtype).max) - 1))
    low, high = exact.new_full((), ends[0]), exact.new_full((), ends[1])
    steps = torch.linspace(0, 1, _SECTIONS + 1, dtype=exact.dtype, device=exact.device)
    for _ in range(_ROUNDS):
        grid = low + (high - low) * steps
        inside = _divergence(grid.exp()[:, None] * below) <= radius
        low, high = torch.where(inside, grid, low).amax(), torch.where(inside, high, grid).amin()
    inverse = low.exp()
    at_top = (exact == top).to(exact.dtype)
    concentrated = radius >= math.log(values.numel()) - at_top.sum().log()
    weights = torch.where(concentrated, at_top / at_top.sum(), (inverse * below).softmax(0))
    parameter = torch.where(concentrated, torch.zeros_like(inverse), spread / inverse)
    if radius == 0:
        weights, parameter = torch.full_like(weights, 1 / values.numel()), torch.full_like(parameter, math.inf)
    dtype = values.dtype
    limit = torch.finfo(dtype).max
    tilted = (exact / parameter.clamp(min=torch.finfo(exact.dtype).tiny)).clamp(-limit, limit)
    return Solution(
        value=(weights * exact).sum().to(dtype),
        weights=weights.to(dtype),
        coefficients=weights.to(dtype) * factor,
        parameter=parameter.to(dtype),
        log_partition=tilted.logsumexp(0).to(dtype),
    )


def _divergence(scores: Tensor) -> Tensor:
    """[..., G] → [...], KL(softmax(scores) ‖ 1/G)."""
    log_weights = scores.log_softmax(-1)
    return math.log(scores.shape[-1]) + (log_weights.exp() * log_weights.clamp(min=-1e4)).sum(-1)
