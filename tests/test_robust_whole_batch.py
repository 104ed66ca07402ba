"""Aggregations that need the whole batch: solved cases, the specification, limits, ties and hostile numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from robust_dpo import reference, robust
from robust_dpo.robust import Chi2, CVaR, RobustObjective

OBJECTIVES: list[RobustObjective] = [CVaR(), CVaR(0.3), CVaR(1.0), Chi2(), Chi2(lam=0.1), Chi2(radius=0.2)]
groups = st.lists(st.tuples(st.floats(-50, 50, width=32), st.floats(0, 8, width=32)), min_size=1, max_size=12)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("name", ["chi2_half", "chi2_pen_lam0p7", "cvar_alpha0p3"])
def test_oracle(shared_dir: Path, name: str, row: int) -> None:
    case = json.loads((shared_dir / "oracles" / "dro_cases.json").read_text())[row]
    objectives = {"chi2_half": Chi2(radius=case["rho"]), "chi2_pen_lam0p7": Chi2(lam=0.7), "cvar_alpha0p3": CVaR(0.3)}
    solution = objectives[name].solve(tensor(case["losses"]))
    close(solution.weights, tensor(case[name]["q"]), 1e-6)
    close(solution.value, case[name]["value"], 1e-6)


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("size", [1, 5, 17])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.key)
def test_matches_autograd_of_the_specification(objective: RobustObjective, size: int, calibrated: bool) -> None:
    losses = torch.randn(size, dtype=torch.float64, requires_grad=True)
    calibration = 0.1 + 2 * torch.rand(size, dtype=torch.float64) if calibrated else None
    h = torch.ones(size, dtype=torch.float64) if calibration is None else calibration
    value = reference.aggregate(objective, losses, h)
    solution = objective.solve(losses, calibration)
    close(solution.value, value.detach(), 1e-7)
    close(solution.weights.sum(), 1.0)
    if size > 1:  # one group: the dual has its least where it has no derivative
        close(solution.coefficients, torch.autograd.grad(value, losses)[0], 1e-5)


@given(values=groups, objective=st.sampled_from(OBJECTIVES), data=st.data())
def test_permuting_the_groups_permutes_the_weights(
    values: list[tuple[float, float]], objective: RobustObjective, data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    losses, calibration = tensor([v for v, _ in values]), tensor([h for _, h in values])
    one, other = objective.solve(losses, calibration), objective.solve(losses[order], calibration[order])
    close(other.value, one.value)
    close(other.weights, one.weights[order])
    close(other.coefficients, one.coefficients[order])
    assert 1 - 1e-9 <= float(one.ess) <= len(values) + 1e-9
    assert (one.weights >= 0).all()
    product = losses * calibration
    assert product.mean() - 1e-9 <= one.value <= product.max() + 1e-9


@given(values=groups)
def test_limits(values: list[tuple[float, float]]) -> None:
    losses, calibration = tensor([v for v, _ in values]), tensor([h for _, h in values])
    product = losses * calibration
    for mean in (CVaR(1.0), Chi2(lam=1e13), Chi2(radius=0.0)):
        close(mean.solve(losses, calibration).value, product.mean())
    for worst in (CVaR(1e-9), Chi2(lam=1e-13), Chi2(radius=1e9)):
        close(worst.solve(losses, calibration).value, product.max())


@given(values=groups, radius=st.floats(1e-4, 3.0))
# The best differ by less than any rounding of the others.
@example(values=[(0.0, 0.0), (0.0, 0.0), (3e-40, 0.0), (-1.0, 0.0)], radius=1.0)
def test_radius_is_attained(values: list[tuple[float, float]], radius: float) -> None:
    losses = tensor([v for v, _ in values])
    q, size = Chi2(radius=radius).solve(losses).weights, len(values)
    ties = int((losses == losses.max()).sum())
    divergence = (size * float(q.square().sum()) - 1) / 2
    assert divergence == pytest.approx(min(radius, (size / ties - 1) / 2), rel=1e-6, abs=1e-9)


def test_groups_that_tie_at_the_quantile_share_what_is_left() -> None:
    solution = CVaR(0.5).solve(tensor([1.0, 3.0, 1.0, 1.0]))
    close(solution.weights, tensor([1 / 6, 0.5, 1 / 6, 1 / 6]))
    close(solution.value, 2.0)
    close(CVaR(0.5).solve(tensor([2.0, 2.0, 2.0])).weights, tensor([1 / 3] * 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.key)
def test_extreme_losses_are_finite(objective: RobustObjective, dtype: torch.dtype) -> None:
    solution = objective.solve(torch.tensor([-1e4, 0.0, 1e4, 1e4, 3.5], dtype=dtype))
    for value in (solution.value, solution.weights, solution.coefficients, solution.log_partition):
        assert value.isfinite().all()
    torch.testing.assert_close(solution.weights.sum(), torch.ones((), dtype=dtype))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.key)
@pytest.mark.parametrize("hostile", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so(objective: RobustObjective, hostile: float) -> None:
    solution = objective.solve(tensor([1.0, hostile, 2.0]))
    assert not (solution.value.isfinite() and solution.coefficients.isfinite().all())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "share-0": (lambda: CVaR(0.0), r"share: expected a number in \(0, 1\], got 0.0"),
    "share-2": (lambda: CVaR(2.0), r"share: expected a number in \(0, 1\], got 2.0"),
    "lam-and-radius": (lambda: Chi2(lam=1.0, radius=0.1), r"radius: expected no radius beside lam"),
    "negative-radius": (lambda: Chi2(radius=-1.0), r"radius: expected a number in \[0, inf\)"),
    "zero-lam": (lambda: Chi2(lam=0.0), r"lam: expected a number in \(0, inf\), got 0.0"),
    "part": (lambda: CVaR().solve(torch.zeros(3), None, 0.0), r"log_normalizer: expected None: CVaR.*whole batch"),
    "empty": (lambda: Chi2().solve(torch.zeros(0)), r"losses: expected at least one group, got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_names() -> None:
    assert robust.resolve("cvar") == CVaR(0.5)
    assert robust.resolve("chi2") == Chi2(lam=1.0)
    assert robust.resolve("chi2_radius") == Chi2(radius=0.1)
    assert not any(objective.single_pass for objective in OBJECTIVES)
    assert math.isclose(float(CVaR(0.3).solve(torch.zeros(2)).parameter), 0.3, rel_tol=1e-6)
