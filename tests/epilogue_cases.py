"""Random batches for group_epilogue, and what comes out of them in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from robust_dpo import losses, reference
from robust_dpo.groups import GroupLayout
from robust_dpo.kernels.group_epilogue import EpilogueVectors, NativeLoss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def poison(count: int) -> Tensor:
    """[count] fp32 NaN: what is not written shows."""
    return torch.full((count,), float("nan"), device=DEVICE)


def fresh_state() -> Tensor:
    """The state before the first chunk."""
    return torch.tensor([float("-inf"), 0.0, 1.0], dtype=torch.float64, device=DEVICE)


def make_vectors(
    sizes: Sequence[int],
    *,
    lengths: Sequence[int] | None = None,
    longest: int = 40,
    reference: str = "live",
    scores: str | None = None,
    calibration: bool = False,
    counted: bool = False,
) -> EpilogueVectors:
    """A batch of groups of these sizes, outputs filled with NaN.

    Args:
        sizes: [G] responses of each group.
        lengths: [S] rows of each response; random up to `longest`, 0 included, where not given.
        longest: of random responses.
        reference: "live", "cached" or "none".
        scores: None, "distinct" or "tied" (of three values, so that ties are common).
        calibration: whether there is one.
        counted: whether a third of the rows, whose log-probs are NaN then, belongs to nobody.
    """
    responses = sum(sizes)
    rows = torch.randint(0, longest + 1, (responses,)) if lengths is None else torch.tensor(lengths)
    total = int(rows.sum())
    kept = torch.rand(total) > 1 / 3 if counted else torch.ones(total, dtype=torch.bool)
    offsets = [0, *accumulate(rows.tolist())]
    tokens = torch.tensor([int(kept[first:last].sum()) for first, last in pairwise(offsets)], dtype=torch.float32)

    def token_logps() -> Tensor:
        return (-2 * torch.rand(total)).where(kept, torch.nan).to(DEVICE)

    cached = -tokens * torch.rand(responses)
    given = {"distinct": torch.randn(responses), "tied": torch.randint(0, 3, (responses,)).float()}
    return EpilogueVectors(
        token_logps=token_logps(),
        ref_token_logps=token_logps() if reference == "live" else None,
        counted=kept.to(DEVICE) if counted else None,
        seq_offsets=torch.tensor(offsets, device=DEVICE),
        group_offsets=torch.tensor([0, *accumulate(sizes)], device=DEVICE),
        lengths=tokens.clamp(min=1).to(DEVICE),
        scores=None if scores is None else given[scores].to(DEVICE),
        calibration=2 * torch.rand(len(sizes), device=DEVICE) if calibration else None,
        logps=poison(responses),
        ref_logps={"live": poison(responses), "cached": cached.to(DEVICE), "none": None}[reference],
        losses=poison(len(sizes)),
        derivative=poison(responses),
        coefficients=poison(total),
        state=fresh_state(),
        widest=max(sizes),
    )


def poisoned(vectors: EpilogueVectors) -> EpilogueVectors:
    """The same inputs with outputs of its own."""
    cached = vectors.ref_token_logps is None
    return replace(
        vectors,
        logps=poison(len(vectors.logps)),
        ref_logps=vectors.ref_logps if cached else poison(len(vectors.logps)),
        losses=poison(len(vectors.losses)),
        derivative=poison(len(vectors.logps)),
        coefficients=poison(len(vectors.token_logps)),
        state=fresh_state(),
    )


def native(loss: losses.BoundLoss) -> NativeLoss:
    return NativeLoss(loss.name, dict(loss.arguments))


class Solved(NamedTuple):
    """Of every group and response, by the specification."""

    logps: Tensor
    ref_logps: Tensor | None
    losses: Tensor
    derivative: Tensor
    layout: GroupLayout
    kept: Tensor
    response_of_row: Tensor


def solve(vectors: EpilogueVectors, loss: losses.BoundLoss, dtype: torch.dtype = torch.float64) -> Solved:
    """Sums, losses and derivatives in PyTorch: sums in `dtype`, loss by reference.py, derivative by autograd."""
    v = vectors
    rows = v.seq_offsets.diff()
    response_of_row = torch.arange(len(rows), device=DEVICE).repeat_interleave(rows)
    kept = torch.ones(len(v.token_logps), dtype=torch.bool, device=DEVICE) if v.counted is None else v.counted

    def sums(values: Tensor) -> Tensor:
        zeros = torch.zeros(len(rows), dtype=dtype, device=DEVICE)
        return zeros.index_add(0, response_of_row[kept], values[kept].to(dtype))

    logps = sums(v.token_logps).requires_grad_()
    ref_logps = v.ref_logps if v.ref_token_logps is None else sums(v.ref_token_logps)
    ref_logps = None if ref_logps is None else ref_logps.to(dtype)
    layout = GroupLayout.build(len(rows), 0, v.group_offsets.diff(), DEVICE)
    scores = None if v.scores is None else v.scores.to(dtype)
    values = reference.group_epilogue(logps, ref_logps, v.lengths.to(dtype), layout, loss, scores)
    (derivative,) = torch.autograd.grad(values.sum(), logps)
    return Solved(logps.detach(), ref_logps, values.detach(), derivative, layout, kept, response_of_row)
