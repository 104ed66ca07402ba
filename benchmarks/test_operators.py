"""pytest-benchmark of the operators by themselves.

pytest benchmarks/test_operators.py --benchmark-only
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from headbench.problem import IGNORE, Shape, make_problem
from headbench.session import dtype_name
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from robust_dpo import sequence_logps
from robust_dpo.dispatch import get_row_logprob

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("torch", "cpu")


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> Shape:
    options = request.config.option
    return Shape(options.vocab, options.width, options.sequences, options.tokens)


@pytest.mark.parametrize("gradient", [False, True], ids=["logp", "logp and gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_logprob(
    benchmark: BenchmarkFixture, shape: Shape, backend: str, dtype: torch.dtype, gradient: bool
) -> None:
    """One tile as the head makes it. The tile is read once for logp; with the gradient it is read and written again."""
    try:
        row_logprob = get_row_logprob(backend, "cpu", dtype)
    except RuntimeError as error:
        pytest.skip(str(error))
    problem = make_problem(shape, torch.float32, seed=0)
    mask = problem.targets != IGNORE
    targets = problem.targets[mask]
    tile = (problem.hidden[mask] @ problem.weight.t()).to(dtype)
    # Not in place: the tile must be the same in every round.
    grad_out = torch.empty_like(tile) if gradient else None
    run = partial(row_logprob, tile, targets, grad_out=grad_out)
    exact = tile.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(run().logp.double(), exact, rtol=1e-4, atol=1e-4)
    benchmark.group = f"row_logprob {tuple(tile.shape)} {dtype_name(dtype)}{', gradient' if gradient else ''}"
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = tile.nbytes * (3 if gradient else 1) / seconds / 1e9


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_sequence_logps(benchmark: BenchmarkFixture, shape: Shape, dtype: torch.dtype, backward: bool) -> None:
    problem = make_problem(shape, dtype, seed=0)
    hidden = problem.hidden.requires_grad_(backward)
    weight = problem.weight.requires_grad_(backward)

    def run() -> Tensor:
        hidden.grad = weight.grad = None
        logps = sequence_logps(hidden, weight, problem.targets)
        if backward:
            logps.sum().backward()
        return logps

    assert run().shape == (shape.sequences,)
    benchmark.group = f"sequence_logps {dtype_name(dtype)}{', backward' if backward else ''}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
