"""pytest-benchmark of every implementation of the head in one process.

`head_cpu.py` and `gpu_suite.py` are the fair and complete comparisons.

    pytest benchmarks/test_head.py --benchmark-only -k cpu
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from robust_dpo.bench.cases.base import dtype_name
from robust_dpo.bench.compare import wrong_results
from robust_dpo.bench.implementation import Bound
from robust_dpo.bench.problem import Problem, Shape, make_problem
from robust_dpo.bench.registry import IMPLEMENTATIONS
from robust_dpo.bench.rounding import Rounding, head_limits, rounding_of_logits
from robust_dpo.bench.solution import Solution, solve, token_logps
from robust_dpo.bench.timing import waiting

# Those with the cross-entropy for a loss have no live reference.
NAMES = [name for name, each in IMPLEMENTATIONS.items() if each.objective == "preference"]


@pytest.fixture(scope="module", params=(torch.float32, torch.bfloat16), ids=dtype_name)
def case(request: pytest.FixtureRequest, device: torch.device, shape: Shape) -> tuple[Problem, Solution, Rounding]:
    problem = make_problem(shape, request.param, seed=0, device=device)
    tokens = token_logps(problem)
    return problem, solve(problem, tokens), rounding_of_logits(problem, tokens, problem.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_head(benchmark: BenchmarkFixture, case: tuple[Problem, Solution, Rounding], name: str) -> None:
    problem, exact, rounding = case
    implementation = IMPLEMENTATIONS[name]
    if not implementation.available:
        pytest.skip(f"{implementation.package} is not installed")
    if obstacle := implementation.obstacle(problem):
        pytest.skip(f"{name}: {obstacle}")
    bound = Bound.to(implementation, problem)
    errors = exact.errors(bound.step(), *bound.gradients())
    assert wrong_results(errors, head_limits(implementation, problem.dtype, rounding)) is None
    benchmark.group = f"head forward + backward, {problem.weight.device.type} {dtype_name(problem.dtype)}"
    benchmark.extra_info.update(errors)
    benchmark.pedantic(waiting(bound.step, problem.weight.device), rounds=5, warmup_rounds=1)
