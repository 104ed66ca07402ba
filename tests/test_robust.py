"""Aggregations: oracles, limits, exactness under splitting, and hostile numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from robust_dpo import robust
from robust_dpo.robust import DrDPO, ExponentialTilt, KLRobust, Mean, RobustObjective

TILTS: list[ExponentialTilt] = [Mean(), KLRobust(), KLRobust(lam=0.05), KLRobust(lam=30.0), DrDPO(), DrDPO(beta=0.2)]
WHOLE_BATCH: list[RobustObjective] = [
    KLRobust(radius=0.1),
    KLRobust(radius=0.0),
    KLRobust(lam=0.5, calibration="outside"),
    KLRobust(radius=0.2, calibration="outside"),
]
ALL = [*TILTS, *WHOLE_BATCH]

numbers = st.floats(-50, 50, width=32)
batches = st.lists(numbers, min_size=1, max_size=12)
calibrated_batches = st.lists(st.tuples(numbers, st.floats(0, 8, width=32)), min_size=1, max_size=12)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Values and gradients


def literal(objective: RobustObjective, losses: Tensor, h: Tensor) -> Tensor:
    """The objective as a plain differentiable formula."""
    if isinstance(objective, Mean):
        return (h * losses).mean()
    if isinstance(objective, DrDPO):
        return -objective.beta * torch.log(torch.mean(torch.exp(-h * losses / objective.beta)))
    assert isinstance(objective, KLRobust) and objective.lam is not None
    inside, outside = (h, 1.0) if objective.calibration == "inside" else (1.0, h.mean())
    return outside * objective.lam * torch.log(torch.mean(torch.exp(inside * losses / objective.lam)))


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("size", [1, 2, 17])
@pytest.mark.parametrize("objective", [o for o in ALL if "radius=0" not in o.key], ids=lambda o: o.key)
def test_matches_autograd_of_the_formula(objective: RobustObjective, size: int, calibrated: bool):
    losses = torch.randn(size, dtype=torch.float64, requires_grad=True)
    calibration = 2 * torch.rand(size, dtype=torch.float64) if calibrated else None
    value = literal(objective, losses, torch.ones_like(losses) if calibration is None else calibration)
    (gradient,) = torch.autograd.grad(value, losses)
    solution = objective.solve(losses, calibration)
    close(solution.value, value.detach(), 1e-11)
    close(solution.coefficients, gradient, 1e-11)
    close(solution.weights.sum(), 1.0)
    attached = solution.attach(losses)
    close(attached.detach(), value.detach(), 1e-11)
    close(torch.autograd.grad(attached, losses)[0], gradient, 1e-11)
    for result in (solution.value, solution.weights, solution.coefficients, solution.parameter, solution.log_partition):
        assert not result.requires_grad


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("name", ["kl", "kl_pen_lam1", "drdpo_bp1"])
def test_oracle(shared_dir: Path, name: str, row: int):
    case: dict[str, Any] = json.loads((shared_dir / "oracles" / "dro_cases.json").read_text())[row]
    objectives = {"kl": KLRobust(radius=case["rho"]), "kl_pen_lam1": KLRobust(lam=1.0), "drdpo_bp1": DrDPO(beta=1.0)}
    solution = objectives[name].solve(tensor(case["losses"]))
    close(solution.weights, tensor(case[name]["q"]), 1e-6)
    close(solution.value, case[name]["value"], 1e-6)
    if name == "kl":
        close(solution.parameter, case["kl"]["lam"], 1e-6)
        close(solution.ess, case["kl"]["ess"], 1e-6)


# Properties


@given(values=calibrated_batches, objective=st.sampled_from(ALL), data=st.data())
def test_permuting_the_groups_permutes_the_weights(
    values: list[tuple[float, float]], objective: RobustObjective, data: st.DataObject
):
    order = torch.tensor(data.draw(st.permutations(range(len(values)))))
    losses, calibration = tensor([v for v, _ in values]), tensor([h for _, h in values])
    one, other = objective.solve(losses, calibration), objective.solve(losses[order], calibration[order])
    close(other.value, one.value)
    close(other.weights, one.weights[order])
    close(other.coefficients, one.coefficients[order])


@given(values=batches, objective=st.sampled_from(ALL))
def test_effective_sample_size_lies_between_1_and_the_number_of_groups(values: list[float], objective: RobustObjective):
    solution = objective.solve(tensor(values))
    assert 1 - 1e-9 <= float(solution.ess) <= len(values) + 1e-9
    assert (solution.weights >= 0).all()
    close(solution.weights.sum(), 1.0)


@given(values=calibrated_batches)
def test_limits_of_lambda(values: list[tuple[float, float]]):
    losses, calibration = tensor([v for v, _ in values]), tensor([h for _, h in values])
    product = losses * calibration
    # The next term is the variance over 2λ, up to 8e4 / 1e14 here.
    close(KLRobust(lam=1e14).solve(losses, calibration).value, product.mean())
    close(DrDPO(beta=1e14).solve(losses, calibration).value, product.mean())
    close(KLRobust(lam=1e-13).solve(losses, calibration).value, product.max())
    close(DrDPO(beta=1e-13).solve(losses, calibration).value, product.min())


@given(values=batches, lam=st.floats(0.01, 100))
def test_value_lies_between_mean_and_extreme(values: list[float], lam: float):
    losses = tensor(values)
    worst, best = KLRobust(lam).solve(losses).value, DrDPO(lam).solve(losses).value
    slack = 1e-9
    assert losses.mean() - slack <= worst <= losses.max() + slack
    assert losses.min() - slack <= best <= losses.mean() + slack


@given(values=st.lists(numbers, min_size=2, max_size=12), radius=st.floats(1e-6, 3.0))
def test_radius_is_attained(values: list[float], radius: float):
    losses = tensor(values)
    solution = KLRobust(radius=radius).solve(losses)
    q, size = solution.weights, len(values)
    divergence = float((q * (q * size).clamp(min=1e-300).log()).sum())
    argmax = losses == losses.max()
    if radius >= math.log(size / int(argmax.sum())):
        close(q, argmax.double() / argmax.sum())
        assert float(solution.parameter) == 0
    else:
        assert divergence == pytest.approx(radius, abs=1e-9, rel=1e-7)
        close(q, (losses / solution.parameter).softmax(0), 1e-6)
    close(solution.value, (q * losses).sum())


@given(values=st.lists(numbers, min_size=2, max_size=12), radius=st.floats(0.001, 0.6), scale=st.floats(1e-6, 1e6))
def test_radius_does_not_depend_on_the_scale_of_the_losses(values: list[float], radius: float, scale: float):
    assume(max(values) - min(values) > 1e-3)
    one, other = (KLRobust(radius=radius).solve(tensor(values) * factor) for factor in (1.0, scale))
    close(other.weights, one.weights, 1e-6)


@pytest.mark.parametrize(
    ("values", "radius", "weights"),
    [
        pytest.param([1.0, 3.0, 2.0], 0.0, [1 / 3] * 3, id="radius-0-is-the-mean"),
        pytest.param([1.0, 3.0, 2.0], 1.2, [0.0, 1.0, 0.0], id="radius-beyond-log-G-is-the-max"),
        pytest.param([1.0, 3.0, 3.0, 2.0], math.log(2), [0.0, 0.5, 0.5, 0.0], id="two-tied-maxima"),
        pytest.param([2.0, 2.0, 2.0], 0.3, [1 / 3] * 3, id="all-equal"),
        pytest.param([5.0], 0.3, [1.0], id="one-group"),
        pytest.param([5.0], 0.0, [1.0], id="one-group-radius-0"),
        pytest.param([0.0, 0.0], 0.1, [0.5, 0.5], id="all-zero"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_radius_at_the_edges(values: list[float], radius: float, weights: list[float], dtype: torch.dtype):
    losses = torch.tensor(values, dtype=dtype)
    solution = KLRobust(radius=radius).solve(losses)
    torch.testing.assert_close(solution.weights, torch.tensor(weights, dtype=dtype))
    torch.testing.assert_close(solution.value, (solution.weights * losses).sum())
    assert solution.log_partition.isfinite()


# Exactness: the batch in one piece or in parts


@given(values=calibrated_batches, objective=st.sampled_from(TILTS), data=st.data())
def test_parts_with_a_shared_normaliser_add_up_to_the_whole(
    values: list[tuple[float, float]], objective: ExponentialTilt, data: st.DataObject
):
    losses, calibration = tensor([v for v, _ in values]), tensor([h for _, h in values])
    whole = objective.solve(losses, calibration)
    cut = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    bounds = list(zip([0, *cut], [*cut, len(values)], strict=True))
    normaliser = torch.stack([objective.tilt(losses[a:b], calibration[a:b]).logsumexp(0) for a, b in bounds])
    close(normaliser.logsumexp(0), whole.log_partition)
    parts = [objective.solve(losses[a:b], calibration[a:b], whole.log_partition) for a, b in bounds]
    close(torch.cat([part.coefficients for part in parts]), whole.coefficients)
    close(torch.cat([part.weights for part in parts]), whole.weights)
    close(torch.stack([part.log_partition for part in parts]).logsumexp(0), whole.log_partition)


@pytest.mark.parametrize("objective", TILTS, ids=lambda o: o.key)
def test_the_surrogate_of_a_part_has_the_gradient_of_its_share(objective: ExponentialTilt):
    losses = torch.randn(7, dtype=torch.float64)
    calibration = 2 * torch.rand(7, dtype=torch.float64)
    whole = objective.solve(losses, calibration)
    part = losses[2:5].clone().requires_grad_()

    def surrogate(x: Tensor) -> Tensor:
        if isinstance(objective, Mean):
            return (calibration[2:5] * x).sum() / 7
        return objective.temperature * (objective.tilt(x, calibration[2:5]) - whole.log_partition).exp().sum()

    value = surrogate(part)
    solution = objective.solve(part, calibration[2:5], whole.log_partition)
    close(solution.value, value.detach())
    close(torch.autograd.grad(value, part)[0], whole.coefficients[2:5])
    close(solution.coefficients, whole.coefficients[2:5])
    close(solution.coefficients, solution.weights * objective.factor(calibration[2:5], part))


def test_a_part_of_the_mean_takes_the_log_of_the_number_of_groups():
    solution = Mean().solve(tensor([1.0, 2.0]), log_normalizer=math.log(6))
    close(solution.value, 0.5)
    close(solution.coefficients, tensor([1 / 6, 1 / 6]))


def test_single_pass_is_told():
    assert all(objective.single_pass for objective in TILTS)
    assert not any(objective.single_pass for objective in WHOLE_BATCH)
    assert isinstance(KLRobust(lam=1.0), KLRobust) and isinstance(KLRobust(radius=0.1), KLRobust)


# Hostile numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strength", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("objective", [KLRobust, DrDPO])
def test_any_strength_is_finite(objective: Callable[[float], ExponentialTilt], strength: float, dtype: torch.dtype):
    losses = torch.tensor([-1e4, 0.0, 1e4, 1e4, 3.5], dtype=dtype)
    calibration = torch.tensor([1.0, 0.0, 5.0, 5.0, 2.0], dtype=dtype)
    tilt = objective(strength)
    solution = tilt.solve(losses, calibration)
    part = tilt.solve(losses, calibration, solution.log_partition)
    for result in (solution, part):
        for value in (result.value, result.weights, result.coefficients, result.log_partition):
            assert value.isfinite().all()
    torch.testing.assert_close(solution.weights.sum(), torch.ones((), dtype=dtype))
    product = losses * calibration
    assert product.min() <= solution.value <= product.max()


def test_large_lambda_keeps_its_digits_in_fp32():
    losses = torch.rand(1000) + 3
    solution = KLRobust(lam=1e7).solve(losses)
    torch.testing.assert_close(solution.value, losses.double().mean().float(), rtol=1e-6, atol=0)


def test_half_precision_losses_are_solved_in_fp32():
    solution = KLRobust().solve(torch.rand(5).bfloat16(), torch.rand(5))
    assert solution.weights.dtype == solution.value.dtype == torch.float32


# The calibrated form and the modes


def test_calibration_outside_is_a_common_factor():
    losses, calibration = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    for strength in ({"lam": 0.3}, {"radius": 0.3}):
        outside = KLRobust(**strength, calibration="outside").solve(losses, calibration)
        plain = KLRobust(**strength).solve(losses)
        close(outside.weights, plain.weights)
        close(outside.value, calibration.mean() * plain.value)
        close(outside.coefficients, calibration.mean() * plain.coefficients)


def test_a_constant_added_to_negative_losses_turns_the_effect_of_calibration_around():
    losses, calibration = torch.full((2,), -1.0), torch.tensor([2.0, 0.5])
    negative, positive = KLRobust().solve(losses, calibration), KLRobust().solve(losses + 3, calibration)
    assert negative.weights[0] < negative.weights[1]
    assert positive.weights[0] > positive.weights[1]


MODES = {
    "erm": lambda x, h: x.mean(),
    "reweight": lambda x, h: (h * x).mean(),
    "dro": lambda x, h: 0.5 * torch.log(torch.mean(torch.exp(x / 0.5))),
    "dora": lambda x, h: 0.5 * torch.log(torch.mean(torch.exp(h * x / 0.5))),
    "dora_outside": lambda x, h: h.mean() * 0.5 * torch.log(torch.mean(torch.exp(x / 0.5))),
}


@pytest.mark.parametrize("mode", robust.MODES)
def test_mode(mode: str):
    losses, calibration = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    objective, calibrated = robust.from_mode(mode, lam=0.5)
    solution = objective.solve(losses, calibration if calibrated else None)
    close(solution.value, MODES[mode](losses, calibration))
    assert robust.from_mode(mode, radius=0.2)[1] == calibrated


def test_names():
    assert {"mean", "kl", "kl_radius", "dr_dpo"} <= set(robust.available_objectives())
    assert robust.resolve("kl") == KLRobust(lam=1.0) == KLRobust(1.0) == KLRobust()
    assert robust.resolve("kl_radius") == KLRobust(radius=0.1)
    assert robust.resolve("mean").key == "Mean()"
    assert robust.resolve(objective := DrDPO(0.5)) is objective
    assert len({o.key for o in ALL}) == len({hash(o) for o in ALL}) == len(ALL)


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "unknown-name": (lambda: robust.resolve("max"), ValueError, r"robust: expected one of chi2, .*, got 'max'"),
    "not-an-objective": (lambda: robust.resolve(KLRobust), TypeError, r"robust: expected a name or a RobustObjective"),
    "lam-and-radius": (lambda: KLRobust(lam=1.0, radius=0.1), ValueError, r"radius: expected no radius beside lam"),
    "zero-lam": (lambda: KLRobust(lam=0.0), ValueError, r"lam: expected a number in \(0, inf\), got 0.0"),
    "negative-radius": (
        lambda: KLRobust(radius=-0.1),
        ValueError,
        r"radius: expected a number in \[0, inf\), got -0.1",
    ),
    "infinite-lam": (lambda: KLRobust(lam=math.inf), ValueError, r"lam: expected .*, got inf"),
    "text-lam": (lambda: KLRobust(lam="1"), TypeError, r"lam: expected .*, got str"),
    "position": (lambda: KLRobust(calibration="both"), ValueError, r"calibration: expected 'inside' or 'outside', got"),
    "dr-dpo-beta": (lambda: DrDPO(beta=-1.0), ValueError, r"beta: expected a number in \(0, inf\), got -1.0"),
    "mode": (lambda: robust.from_mode("dpo"), ValueError, r"mode: expected one of erm, .*, got 'dpo'"),
    "mode-lam": (lambda: robust.from_mode("dro", lam=-1.0), ValueError, r"lam: expected .*, got -1.0"),
    "integer-losses": (lambda: Mean().solve(torch.arange(3)), TypeError, r"losses: expected a floating tensor \[G\]"),
    "list-losses": (lambda: Mean().solve([1.0]), TypeError, r"losses: expected a floating tensor \[G\], got list"),
    "matrix": (lambda: Mean().solve(torch.zeros(2, 2)), ValueError, r"losses: expected shape \[G\], got \[2, 2\]"),
    "empty": (lambda: KLRobust().solve(torch.zeros(0)), ValueError, r"losses: expected at least one group, got none"),
    "empty-radius": (lambda: KLRobust(radius=0.1).solve(torch.zeros(0)), ValueError, r"losses: expected at least one"),
    "calibration-shape": (
        lambda: Mean().solve(torch.zeros(3), torch.zeros(2)),
        ValueError,
        r"calibration: expected shape \[3\], one value per group, got \[2\]",
    ),
    "calibration-type": (
        lambda: Mean().solve(torch.zeros(3), [1.0, 1.0, 1.0]),
        TypeError,
        r"calibration: expected a floating tensor \[G\], got list",
    ),
    "normaliser-for-a-radius": (
        lambda: KLRobust(radius=0.1).solve(torch.zeros(3), None, 0.0),
        ValueError,
        r"log_normalizer: expected None: KLRobust\(.*radius=0.1.*solve the whole batch, got 0.0",
    ),
    "normaliser-for-outside": (
        lambda: KLRobust(calibration="outside").solve(torch.zeros(3), torch.ones(3), 0.0),
        ValueError,
        r"log_normalizer: expected None: .*outside.* got 0.0",
    ),
    "tilt-of-a-radius": (
        lambda: KLRobust(radius=0.1).tilt(torch.zeros(3)),
        ValueError,
        r"robust: expected an objective of softmax form \(single_pass\), got KLRobust",
    ),
    "taken-name": (
        lambda: robust.register_objective("kl"),
        ValueError,
        r"name: expected a name that is not registered",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
