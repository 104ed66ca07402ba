"""Random batches for group_epilogue, and what comes out of them in PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import cuda_emulated
import torch
from problems import require_backend
from torch import Tensor

from robust_dpo import losses, reference
from robust_dpo.dispatch import backends
from robust_dpo.groups import GroupLayout
from robust_dpo.kernels.group_epilogue import EpilogueVectors, GroupEpilogueLauncher, NativeLoss

# Backends with a group_epilogue, and where it takes its vectors.
DEVICES = {
    "cpu": torch.device("cpu"),
    "triton": torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    "cuda": torch.device("cuda" if backends()["cuda"].usable else "cpu"),
}


class Implementation(NamedTuple):
    """group_epilogue on one backend."""

    launcher: GroupEpilogueLauncher
    supports: Callable[[losses.BoundLoss, int], bool]
    device: torch.device

    def __call__(self, vectors: EpilogueVectors, loss: losses.BoundLoss | NativeLoss, *where: Any) -> None:
        """Run it; `where` are temperature, first and last group."""
        self.launcher(vectors, loss if isinstance(loss, NativeLoss) else native(loss), *where)

    def vectors(self, sizes: Sequence[int], **options: Any) -> EpilogueVectors:
        """`make_vectors` on its device."""
        return make_vectors(sizes, device=self.device, **options)

    def tensor(self, values: Sequence[float]) -> Tensor:
        """[n] fp32 on its device."""
        return torch.tensor(values, device=self.device)


def implementation(backend: str) -> Implementation:
    """That of a backend; without it the test is skipped."""
    if backend == "cuda":
        module = cuda_emulated.implementation("group_epilogue")
    else:
        require_backend(backend)
        module = importlib.import_module(f"robust_dpo.kernels.group_epilogue_{backend}")
    return Implementation(module.group_epilogue, module.supports, DEVICES[backend])


def built_in_losses() -> list[str]:
    """Names of the losses of one group that come with the package, which kernels have; tests register others."""
    bound = [losses.resolve(name) for name in losses.available_losses()]
    return [
        loss.name for loss in bound if loss.function.__module__.startswith("robust_dpo.") and not loss.couples_groups
    ]


def poison(count: int, device: torch.device) -> Tensor:
    """[count] fp32 NaN: what is not written shows."""
    return torch.full((count,), float("nan"), device=device)


def fresh_state(device: torch.device) -> Tensor:
    """The state before the first chunk."""
    return torch.tensor([float("-inf"), 0.0, 1.0], dtype=torch.float64, device=device)


def make_vectors(
    sizes: Sequence[int],
    *,
    device: torch.device,
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
        device: of all vectors.
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
        return (-2 * torch.rand(total)).where(kept, torch.nan).to(device)

    cached = -tokens * torch.rand(responses)
    given = {"distinct": torch.randn(responses), "tied": torch.randint(0, 3, (responses,)).float()}
    return EpilogueVectors(
        token_logps=token_logps(),
        ref_token_logps=token_logps() if reference == "live" else None,
        counted=kept.to(device) if counted else None,
        seq_offsets=torch.tensor(offsets, device=device),
        group_offsets=torch.tensor([0, *accumulate(sizes)], device=device),
        lengths=tokens.clamp(min=1).to(device),
        scores=None if scores is None else given[scores].to(device),
        calibration=2 * torch.rand(len(sizes), device=device) if calibration else None,
        logps=poison(responses, device),
        ref_logps={"live": poison(responses, device), "cached": cached.to(device), "none": None}[reference],
        losses=poison(len(sizes), device),
        derivative=poison(responses, device),
        coefficients=poison(total, device),
        state=fresh_state(device),
        widest=max(sizes),
    )


def poisoned(vectors: EpilogueVectors) -> EpilogueVectors:
    """The same inputs with outputs of its own."""
    device = vectors.logps.device
    cached = vectors.ref_token_logps is None
    return replace(
        vectors,
        logps=poison(len(vectors.logps), device),
        ref_logps=vectors.ref_logps if cached else poison(len(vectors.logps), device),
        losses=poison(len(vectors.losses), device),
        derivative=poison(len(vectors.logps), device),
        coefficients=poison(len(vectors.token_logps), device),
        state=fresh_state(device),
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
    v, device = vectors, vectors.logps.device
    rows = v.seq_offsets.diff()
    response_of_row = torch.arange(len(rows), device=device).repeat_interleave(rows)
    kept = torch.ones(len(v.token_logps), dtype=torch.bool, device=device) if v.counted is None else v.counted

    def sums(values: Tensor) -> Tensor:
        zeros = torch.zeros(len(rows), dtype=dtype, device=device)
        return zeros.index_add(0, response_of_row[kept], values[kept].to(dtype))

    logps = sums(v.token_logps).requires_grad_()
    ref_logps = v.ref_logps if v.ref_token_logps is None else sums(v.ref_token_logps)
    ref_logps = None if ref_logps is None else ref_logps.to(dtype)
    layout = GroupLayout.build(len(rows), 0, v.group_offsets.diff(), device)
    scores = None if v.scores is None else v.scores.to(dtype)
    values = reference.group_epilogue(logps, ref_logps, v.lengths.to(dtype), layout, loss, scores)
    (derivative,) = torch.autograd.grad(values.sum(), logps)
    return Solved(logps.detach(), ref_logps, values.detach(), derivative, layout, kept, response_of_row)
