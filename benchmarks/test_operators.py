"""pytest-benchmark of the operators by themselves, on the CPU and on a GPU where there is one.

    pytest benchmarks/test_operators.py --benchmark-only -k "cpu or gpu"

Every id holds the device. Results are checked before anything is timed.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from robust_dpo import KLRobust, calibration, preference_loss, sequence_logps
from robust_dpo.bench.cases.base import GRADIENT_LIMIT, KERNEL_LIMIT, dtype_name
from robust_dpo.bench.cases.epilogue import EpilogueCase
from robust_dpo.bench.cases.row_kernel import ExactRows, make_tile
from robust_dpo.bench.problem import Shape, group_loss, make_problem
from robust_dpo.bench.solution import relative_error
from robust_dpo.bench.timing import waiting
from robust_dpo.bench.workbench import Workbench
from robust_dpo.dispatch import CALIBRATION_WEIGHTS, ROW_LOGPROB, choose_backend, get_row_logprob

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A backend says in its own words where it does not run.
BACKENDS = {"torch": "plain", "cpu": "native", "triton": "triton"}


def able(operator: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend, if it runs the operator here and not in an interpreter; otherwise the test is skipped."""
    if backend == "triton" and device.type != "cuda":
        pytest.skip("Triton's kernels run on GPUs")
    try:
        return choose_backend(operator, backend, device, dtype).name
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("gradient", [False, True], ids=["logp", "logp and gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", BACKENDS, ids=BACKENDS.get)
def test_row_logprob(
    benchmark: BenchmarkFixture, device: torch.device, shape: Shape, backend: str, dtype: torch.dtype, gradient: bool
) -> None:
    """One tile as the head makes it. The tile is read once for logp; with the gradient it is read and written again."""
    row_logprob = get_row_logprob(able(ROW_LOGPROB, backend, device, dtype), device, dtype)
    tile, targets = make_tile(shape.response_rows, shape.vocab, dtype, device, seed=0)
    # Not in place: the tile must be the same in every round.
    grad_out = torch.full_like(tile, float("nan")) if gradient else None
    run = waiting(partial(row_logprob, tile, targets, grad_out=grad_out), device)
    exact = ExactRows.of(tile, targets)
    assert relative_error(run().logp[exact.rows], exact.logp) < KERNEL_LIMIT
    if grad_out is not None:
        assert relative_error(grad_out[exact.rows], exact.gradient) < GRADIENT_LIMIT[dtype]
    what = ", gradient" if gradient else ""
    benchmark.group = f"row_logprob {device.type} {tuple(tile.shape)} {dtype_name(dtype)}{what}"
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    if benchmark.stats:
        traffic = tile.nbytes * (3 if gradient else 1)
        benchmark.extra_info["GB/s"] = traffic / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("who", ["ours", "plain"])
def test_group_epilogue(benchmark: BenchmarkFixture, device: torch.device, who: str) -> None:
    """64 pairs of 1,024 tokens from token log-probs to the coefficients of all rows."""
    case, bench = EpilogueCase(), Workbench(device, ())
    candidates = {candidate.row.role.value: candidate for candidate in case.candidates(bench)}
    candidate = candidates.get("ours" if who == "ours" else "peer")
    if candidate is None:
        pytest.skip("no backend has group_epilogue as a kernel here")
    opened = candidate.open()
    assert opened.errors["gradient"] < candidate.limits["gradient"]
    benchmark.group = f"group_epilogue {device.type}"
    benchmark.pedantic(waiting(opened.run.call, device), setup=opened.run.prepare, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("form", ["mixture", "paper"])
def test_calibration_weights(benchmark: BenchmarkFixture, device: torch.device, form: str) -> None:
    """Density ratios of a million classifier probabilities, by the backend that `auto` takes, with their checks."""
    probs = torch.rand(1 << 20, generator=torch.Generator(device).manual_seed(0), device=device)
    run = waiting(partial(calibration.density_ratio, probs, form), device)
    c = probs.double()
    # Equal parts and γ = 1: the values that the docstring of density_ratio gives.
    assert relative_error(run(), 2 * c if form == "mixture" else 2 * c / (2 - c)) < KERNEL_LIMIT
    benchmark.group = f"calibration_weights {device.type} {form}"
    benchmark.extra_info["backend"] = choose_backend(CALIBRATION_WEIGHTS, "auto", device, probs.dtype).name
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_sequence_logps(
    benchmark: BenchmarkFixture, device: torch.device, shape: Shape, dtype: torch.dtype, backward: bool
) -> None:
    """Differentiable log-probs of all responses; backward computes the logits again."""
    problem = make_problem(shape, dtype, seed=0, device=device)
    hidden = problem.hidden.requires_grad_(backward)
    weight = problem.weight.requires_grad_(backward)

    def run() -> Tensor:
        hidden.grad = weight.grad = None
        logps = sequence_logps(hidden, weight, problem.targets)
        assert isinstance(logps, Tensor)
        if backward:
            logps.sum().backward()
        return logps

    assert run().shape == (shape.sequences,)
    benchmark.group = f"sequence_logps {device.type} {dtype_name(dtype)}{', backward' if backward else ''}"
    benchmark.pedantic(waiting(run, device), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("robust", ["mean", KLRobust(lam=1.0)], ids=["mean", "kl"])
def test_preference_loss(benchmark: BenchmarkFixture, device: torch.device, robust: str | KLRobust) -> None:
    """DPO of 1,024 pairs of log-probs that are already there, with its backward."""
    generator = torch.Generator(device).manual_seed(0)
    logps = torch.randn(2048, generator=generator, device=device).sub_(50).requires_grad_()
    ref_logps = torch.randn(2048, generator=generator, device=device).sub_(50)

    def run() -> Tensor:
        logps.grad = None
        loss = preference_loss(logps, ref_logps, robust=robust).loss
        loss.backward()
        return loss.detach()

    if robust == "mean":
        exact = group_loss(logps.detach().double(), ref_logps.double(), 0.1, 2)
        assert relative_error(run(), exact) < KERNEL_LIMIT
    benchmark.group = f"preference_loss {device.type}"
    benchmark.pedantic(waiting(run, device), rounds=20, warmup_rounds=2)
