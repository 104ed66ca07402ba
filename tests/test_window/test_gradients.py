"""The gradient of a window is that of its groups in one batch, however they are cut and however far they differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_window.toy import FEATURES, Policy, cut, lengths_of, make_batch, make_window, train_step, whole

from robust_dpo.robust import DrDPO, ExponentialTilt, KLRobust, Mean, RobustObjective
from robust_dpo.window.gradients import room_to_grow, scale, scale_where_needed

TILTS: list[ExponentialTilt] = [Mean(), KLRobust(), KLRobust(lam=1e-3), KLRobust(lam=1e6), DrDPO(beta=0.01)]
OTHERS: list[RobustObjective] = [KLRobust(radius=0.2), KLRobust(lam=0.3, calibration="outside")]

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=9)


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of groups, and how many of them each micro-batch has."""
    groups = draw(sizes)
    bounds = sorted(draw(st.sets(st.integers(1, len(groups)), max_size=4)) | {len(groups)})
    return groups, [stop - start for start, stop in zip([0, *bounds], bounds, strict=False)]


def check(objective: RobustObjective, route: str, groups: list[int], counts: list[int], spread: float) -> None:
    batch, model = make_batch(groups, spread), Policy(torch.randn(FEATURES, dtype=torch.float64))
    solution, gradient = whole(objective, model, batch)
    weighed = train_step(make_window(objective, route), model, cut(batch, counts))
    scale_of_gradient = gradient.abs().max().clamp(min=1e-30)
    torch.testing.assert_close(model.weights.grad / scale_of_gradient, gradient / scale_of_gradient, rtol=0, atol=1e-9)
    found = weighed.solution
    torch.testing.assert_close(found.weights, solution.weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, solution.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.ess, solution.ess, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.max_weight, solution.weights.amax(), rtol=1e-9, atol=0)


@settings(max_examples=25)
@given(
    window=windows(), spread=st.sampled_from([0.1, 1.0, 30.0, 1000.0]), route=st.sampled_from(["one_pass", "two_pass"])
)
@pytest.mark.parametrize("objective", TILTS, ids=lambda objective: objective.key)
def test_both_routes_give_the_gradient_of_the_whole(
    objective: ExponentialTilt, window: tuple[list[int], list[int]], spread: float, route: str
) -> None:
    check(objective, route, *window, spread)


@settings(max_examples=25)
@given(window=windows(), spread=st.sampled_from([0.1, 1.0, 30.0]))
@pytest.mark.parametrize("objective", OTHERS, ids=lambda objective: objective.key)
def test_two_passes_give_the_gradient_of_what_has_no_normaliser(
    objective: RobustObjective, window: tuple[list[int], list[int]], spread: float
) -> None:
    check(objective, "two_pass", *window, spread)


@settings(max_examples=25)
@given(window=windows(), sft_weight=st.sampled_from([0.01, 1.0, 100.0]))
@pytest.mark.parametrize("objective", [KLRobust(lam=0.3), KLRobust(radius=0.2), Mean()], ids=lambda each: each.key)
def test_a_likelihood_term_is_a_mean_over_the_tokens_of_the_whole(
    objective: RobustObjective, window: tuple[list[int], list[int]], sft_weight: float
) -> None:
    groups, counts = window
    batch, model = make_batch(groups), Policy(torch.randn(FEATURES, dtype=torch.float64))
    solution, gradient = whole(objective, model, batch, sft_weight=sft_weight)
    weighed = train_step(make_window(objective, "two_pass", sft_weight=sft_weight), model, cut(batch, counts))
    torch.testing.assert_close(model.weights.grad, gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
    torch.testing.assert_close(weighed.solution.weights, solution.weights)
    first = [sum(groups[:index]) for index in range(len(groups))]
    logps, tokens = batch["input_ids"][first] @ model.weights.detach(), lengths_of(batch)[first]
    nll = -logps.sum() / tokens.sum()
    torch.testing.assert_close(weighed.solution.terms["nll_loss"], nll)
    torch.testing.assert_close(weighed.solution.value, solution.value + sft_weight * nll)


def test_each_micro_batch_alone_has_a_likelihood_term_of_its_own() -> None:
    objective, batch = KLRobust(lam=0.1), make_batch([2, 3, 2, 1, 2])
    model = Policy(torch.randn(FEATURES, dtype=torch.float64))
    parts = cut(batch, [3, 2])
    train_step(make_window(objective, "micro_batch", sft_weight=0.5), model, parts)
    alone = [whole(objective, model, part, sft_weight=0.5)[1] for part in parts]
    torch.testing.assert_close(model.weights.grad, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 0, 3], [2, 2, 2, 2]], ids=str)
def test_scores_that_differ_by_thousands_neither_overflow_nor_vanish(steps: list[int], dtype: torch.dtype) -> None:
    """The log Z of the micro-batches differ by up to 3,000, more than any dtype has exponents for."""
    objective, batch = KLRobust(lam=1e-3), make_batch([2] * 4, dtype=torch.float64)
    direction = torch.zeros(FEATURES, dtype=torch.float64)
    direction[0] = 1.0
    batch["calibration"] = torch.ones(4, dtype=torch.float64)
    # Losses of 1, 2, 3 and 4, and gradients that tell the groups apart.
    margins = [-math.log(math.expm1(1.0 + step)) / 0.1 for step in steps]
    batch["input_ids"][1::2] = 0
    batch["input_ids"][::2, 0] = torch.tensor(margins, dtype=torch.float64)
    model = Policy(direction.to(dtype))
    _, gradient = whole(objective, model, batch)
    ends = [{**part, "input_ids": part["input_ids"].to(dtype)} for part in cut(batch, [1] * 4)]
    train_step(make_window(objective, "one_pass"), model, ends)
    torch.testing.assert_close(model.weights.grad.double(), gradient, rtol=20 * torch.finfo(dtype).eps, atol=1e-3)


def test_one_micro_batch_is_not_scaled() -> None:
    batch, model = make_batch([2, 3, 2]), Policy(torch.randn(FEATURES, dtype=torch.float64))
    window = make_window(KLRobust(), "one_pass")
    (only,) = window.open(model, [batch], 1)
    weighed = window.run(model, only)
    assert torch.equal(weighed.loss, weighed.output.loss)
    assert torch.equal(weighed.solution.weights, weighed.output.weights)


def test_a_window_forgets_the_one_before() -> None:
    objective, model = KLRobust(lam=0.1), Policy(torch.randn(FEATURES, dtype=torch.float64))
    for route in ("one_pass", "two_pass"):
        window = make_window(objective, route)
        for spread in (50.0, 1.0):
            batch = make_batch([2, 2, 3], spread)
            model.zero_grad()
            train_step(window, model, cut(batch, [2, 1]))
            torch.testing.assert_close(model.weights.grad, whole(objective, model, batch)[1])


def test_each_micro_batch_alone_is_the_mean_of_their_objectives() -> None:
    objective, batch = KLRobust(lam=0.1), make_batch([2, 2, 2, 2, 2])
    model = Policy(torch.randn(FEATURES, dtype=torch.float64))
    parts = cut(batch, [3, 2])
    weighed = train_step(make_window(objective, "micro_batch"), model, parts)
    alone = [whole(objective, model, part) for part in parts]
    torch.testing.assert_close(model.weights.grad, (alone[0][1] + alone[1][1]) / 2)
    torch.testing.assert_close(weighed.solution.value, (alone[0][0].value + alone[1][0].value) / 2)
    torch.testing.assert_close(weighed.solution.weights, torch.cat([solution.weights for solution, _ in alone]))


@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_reaches_the_loss_or_the_gradient(route: str, hostile: float) -> None:
    """So that the step is left out: weights that are not known must not be replaced by some others."""
    batch, model = make_batch([2, 2, 2]), Policy(torch.ones(FEATURES, dtype=torch.float64))
    batch["input_ids"][3] = hostile
    window, losses = make_window(KLRobust(), route), []
    for part in window.open(model, cut(batch, [1, 1, 1]), 3):
        losses.append(window.run(model, part).loss)
        losses[-1].backward()
    # A rejected response of log-prob −inf has a loss of 0, but no gradient.
    assert not (torch.stack(losses).isfinite().all() and model.weights.grad.isfinite().all())


@pytest.mark.parametrize("objective", [*TILTS, *OTHERS], ids=lambda objective: objective.key)
def test_calibration_of_0_for_all_groups(objective: Any) -> None:
    """Nothing looks like the target: every group has the same score, and no gradient."""
    batch, model = make_batch([2, 2, 2, 2]), Policy(torch.randn(FEATURES, dtype=torch.float64))
    batch["calibration"] = torch.zeros(4, dtype=torch.float64)
    route = "one_pass" if objective.single_pass else "two_pass"
    weighed = train_step(make_window(objective, route), model, cut(batch, [3, 1]))
    assert torch.equal(model.weights.grad, torch.zeros(FEATURES, dtype=torch.float64))
    assert float(weighed.solution.value) == pytest.approx(0.0, abs=1e-12)
    if objective.key != "KLRobust(lam=0.3, radius=None, calibration='outside')":
        torch.testing.assert_close(weighed.solution.weights, torch.full((4,), 0.25, dtype=torch.float64))


def test_scaling_reaches_every_gradient_and_passes_over_what_is_not_scaled() -> None:
    gradients = [
        torch.randn(3, 4),
        torch.randn(4, 3).T,
        torch.randn(2, dtype=torch.float64),
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(2, 0),
    ]
    for apply in (scale, scale_where_needed):
        mine = [gradient.clone() for gradient in gradients]
        apply(mine, torch.tensor(0.25, dtype=torch.float64))
        for ours, theirs in zip(mine, gradients, strict=True):
            assert torch.equal(ours, theirs * 0.25)
            assert ours.dtype == theirs.dtype
    contiguous = [gradients[0], gradients[2]]
    before = [gradient._version for gradient in contiguous]
    scale_where_needed(contiguous, torch.tensor(1.0, dtype=torch.float64))
    assert [gradient._version for gradient in contiguous] == before


def test_room_to_grow_is_that_of_the_narrowest_gradient() -> None:
    wide, narrow = torch.zeros(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float16)
    assert room_to_grow([wide]) == pytest.approx(59.1, abs=0.1)
    assert room_to_grow([wide, narrow]) == pytest.approx(7.4, abs=0.1)
    assert room_to_grow([]) == 0
