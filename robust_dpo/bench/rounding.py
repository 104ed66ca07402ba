"""What rounding the logits does to loss and gradients: the error that every implementation with a narrow tile makes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robust_dpo.bench.implementation import Implementation
from robust_dpo.bench.problem import Problem
from robust_dpo.bench.solution import TokenLogps

# Of the loss, and of the gradients, which are rounded to bf16 at the end (2e-3) whatever the tile.
_OF_WIDE_INPUTS = (1e-3, 1e-3)
_OF_WIDE_TILE = (1e-3, 5e-3)
# What every narrow tile may be off by, and how many times the expected error, where that is more. The loss is a random
# sum, about as far off as expected on average, so hardly ever 3 times; the gradients' estimate is an upper bound.
_OF_NARROW_TILE = (1.5e-2, 3e-2)
_TIMES_EXPECTED = (3.0, 1.5)


class Rounding(NamedTuple):
    """Expected (root mean square) relative errors of loss and gradients."""

    loss: float
    gradient: float


def rounding_of_logits(problem: Problem, tokens: TokenLogps, dtype: torch.dtype) -> Rounding:
    """Errors of the problem's loss where its logits are rounded to `dtype` before the softmax.

    Rounding moves a logit z by a random part of a unit u = eps · 2^⌊log2 |z|⌋, of variance u² / 12. A log-prob
    z_t − lse then moves by δ_t − Σ_v p_v δ_v, whose variance is at most 2 (1 − p_t)² u² / 12, with u of the lse, which
    no logit exceeds. Log-probs of sequences add these up, those of a live reference as many again, and loss and
    gradient follow by their derivatives. The gradient has the error of each probability besides.

    Args:
        problem: only its loss and its reference count.
        tokens: its exact log-probs.
        dtype: of the logits tile.
    """
    unit = torch.finfo(dtype).eps * torch.exp2(torch.log2(tokens.lse.abs().clamp_min(1e-6)).floor())
    each = 2 * torch.expm1(tokens.logp).square() * unit.square() / 12
    variance = tokens.per_sequence(each) * (2 if problem.live_reference else 1)
    logps = tokens.per_sequence(tokens.logp)
    known = tokens.per_sequence(tokens.ref_logp) if problem.ref_logps is None else problem.ref_logps.to(logps.dtype)

    def loss(values: Tensor) -> Tensor:
        return problem.loss(values, known)

    slope = torch.autograd.functional.jacobian(loss, logps)
    curvature = torch.autograd.functional.hessian(loss, logps)
    of_loss = (slope.square() @ variance).sqrt() / loss(logps).abs()
    of_weights = (curvature.square() @ variance).sum() / slope.square().sum()
    of_probabilities = unit.square().mean() / 12
    return Rounding(of_loss.item(), math.sqrt((of_weights + of_probabilities).item()))


def head_limits(implementation: Implementation, dtype: torch.dtype, expected: Rounding) -> dict[str, float]:
    """The largest error of each result of a head that is right, for the logits tile that the implementation has.

    Args:
        implementation: of the head.
        dtype: of the inputs.
        expected: for logits of that dtype.
    """
    if dtype == torch.float32:
        loss, gradient = _OF_WIDE_INPUTS
    elif implementation.tile_dtype == torch.float32:
        loss, gradient = _OF_WIDE_TILE
    else:
        loss, gradient = (
            max(least, times * error)
            for least, times, error in zip(_OF_NARROW_TILE, _TIMES_EXPECTED, expected, strict=True)
        )
    return {"loss": loss, "dhidden": gradient, "dweight": gradient}
