"""The operators on a GPU against float64 on the CPU, by every backend; CUDA itself is in test_gpu_runtime.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    KL,
    TOLERANCE,
    assert_close,
    exact,
    on_the_device,
    solve,
    there,
    tokens,
)
from problems import relative_error, require_backend
from row_cases import dtype_id
from torch import Tensor

from robust_dpo import (
    linear_preference_loss,
    preference_loss,
    reference,
    sequence_logps,
    sequence_logps_from_logits,
)

pytestmark = on_the_device


@pytest.mark.parametrize("source", ["cached", "live"])
@pytest.mark.parametrize("sizes", [[2] * 6, [4] * 3, [2, 1, 5, 3]], ids=["pairs", "lists", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_preference_loss(backend: str, dtype: torch.dtype, sizes: list[int], source: str) -> None:
    require_backend(backend)
    problem = tokens(sizes, dtype, reference=source, calibration=True)
    found = solve(there(problem), backend=backend, chunk_bytes=64 * 1009)
    assert_close(found, exact(problem), dtype)


@pytest.mark.parametrize("tile_dtype", [torch.bfloat16, torch.float32], ids=["bf16-tile", "fp32-tile"])
@pytest.mark.parametrize(
    "options",
    [{"softcap": 6.0}, {"logit_scale": 0.5}, {"loss": "plackett_luce"}, {"loss": "ipo", "beta": 0.3}],
    ids=["softcap", "scale", "plackett_luce", "ipo"],
)
def test_variants_of_the_head(options: dict[str, Any], tile_dtype: torch.dtype) -> None:
    problem = tokens([2, 3, 2, 4], torch.bfloat16, reference="cached", scores=True, bias=True, packed=True)
    found = solve(there(problem), tile_dtype=tile_dtype, chunk_bytes=64 * 1009, **options)
    assert_close(found, exact(problem, **options), torch.bfloat16)


def test_frozen_head_gets_no_gradient() -> None:
    problem = tokens([2] * 4, torch.bfloat16)
    ours = there(problem)
    ours.weight.requires_grad_(False)
    output = linear_preference_loss(*ours.args, **ours.kwargs, robust=KL)
    output.loss.backward()
    assert ours.weight.grad is None
    assert ours.hidden.grad is not None
    assert_close((output.loss, ours.hidden.grad), exact(problem)[:2], torch.bfloat16)


def test_tied_head_gets_both_gradients() -> None:
    problem = tokens([2] * 4, torch.float32)
    ids = torch.randint(1009, problem.targets.shape)

    def gradient(device: torch.device, dtype: torch.dtype) -> Tensor:
        weight = problem.weight.detach().to(device, dtype).requires_grad_()
        kwargs = {
            name: value.detach().to(device, dtype) if value.is_floating_point() else value
            for name, value in problem.kwargs.items()
        }
        hidden, targets = weight[ids.to(device)], problem.targets.to(device)
        if dtype == torch.float64:
            loss = reference.linear_preference_loss(hidden, weight, targets, robust=KL, **kwargs)
        else:
            loss = linear_preference_loss(hidden, weight, targets, robust=KL, **kwargs).loss
        return torch.autograd.grad(loss, weight)[0]

    right = gradient(torch.device("cpu"), torch.float64)
    assert relative_error(gradient(DEVICE, torch.float32).cpu(), right) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_logps(backend: str, dtype: torch.dtype) -> None:
    require_backend(backend)
    problem = tokens([2, 3], dtype, reference="none")
    ours, wide = there(problem), problem.to(torch.float64)
    logps = sequence_logps(*ours.args, backend=backend, chunk_bytes=64 * 1009)
    assert isinstance(logps, Tensor)
    right = reference.sequence_logps(reference.transformed_logits(wide.hidden, wide.weight), wide.targets)[0]
    found = (logps, *torch.autograd.grad(logps.square().sum(), [ours.hidden, ours.weight]))
    assert_close(found, (right, *torch.autograd.grad(right.square().sum(), [wide.hidden, wide.weight])), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_logits_route(dtype: torch.dtype) -> None:
    problem = tokens([2, 2, 2], dtype, reference="none")
    logits = reference.transformed_logits(problem.hidden, problem.weight).detach()
    ours, wide = logits.to(DEVICE, copy=True).requires_grad_(), logits.double().requires_grad_()
    ref_logps = -30 * torch.rand(6)
    logps = sequence_logps_from_logits(ours, problem.targets.to(DEVICE))
    assert isinstance(logps, Tensor)
    loss = preference_loss(logps, ref_logps.to(DEVICE), robust=KL).loss
    right_logps = reference.sequence_logps(wide, problem.targets)[0]
    right = preference_loss(right_logps, ref_logps.double(), robust=KL).loss
    found = (loss, *torch.autograd.grad(loss, ours))
    assert_close(found, (right, *torch.autograd.grad(right, wide)), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    require_backend(backend)
    problem = there(tokens([2] * 8, torch.bfloat16, calibration=True))
    first = solve(problem, backend=backend, chunk_bytes=64 * 1009)
    for _ in range(3):
        assert all(map(torch.equal, first, solve(problem, backend=backend, chunk_bytes=64 * 1009)))
