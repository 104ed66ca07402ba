"""pytest-benchmark of every implementation of the head in one process; head_cpu.py is the fair and complete comparison.

pytest benchmarks/test_head.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
from headbench.peers import IMPLEMENTATIONS, Bound
from headbench.problem import Problem, Shape, Solution, make_problem, relative_error, solve
from headbench.session import dtype_name
from pytest_benchmark.fixture import BenchmarkFixture

# Wide enough for the bf16 rounding of logits, far too narrow for a wrong gradient.
SANITY = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.fixture(scope="module", params=SANITY, ids=dtype_name)
def case(request: pytest.FixtureRequest) -> tuple[Problem, Solution]:
    options = request.config.option
    shape = Shape(options.vocab, options.width, options.sequences, options.tokens)
    problem = make_problem(shape, request.param, seed=0)
    return problem, solve(problem)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_head(benchmark: BenchmarkFixture, case: tuple[Problem, Solution], name: str) -> None:
    problem, exact = case
    implementation, dtype = IMPLEMENTATIONS[name], problem.weight.dtype
    if not implementation.available:
        pytest.skip(f"{implementation.package} is not installed")
    if dtype not in implementation.dtypes:
        pytest.skip(f"{name} is not a choice for {dtype_name(dtype)} inputs")
    bound = Bound.to(implementation, problem)
    loss = bound.step()
    dhidden, dweight = bound.gradients()
    errors = {
        "loss": relative_error(loss, exact.loss),
        "dhidden": relative_error(dhidden.flatten(0, 1), exact.dhidden.flatten(0, 1)),
        "dweight": relative_error(dweight, exact.dweight),
    }
    assert max(errors.values()) < SANITY[dtype], errors
    benchmark.group = f"head forward + backward, {dtype_name(dtype)}"
    benchmark.extra_info.update(errors)
    benchmark.pedantic(bound.step, rounds=5, warmup_rounds=1)
