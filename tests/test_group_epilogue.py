"""group_epilogue on every backend that has one, against the specification in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from epilogue_cases import DEVICES, Implementation, built_in_losses, fresh_state, implementation, poisoned, solve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robust_dpo import losses
from robust_dpo.kernels.group_epilogue import HEADROOM, EpilogueVectors, NativeLoss
from robust_dpo.robust import DrDPO, ExponentialTilt, KLRobust, Mean

OPTIONS: dict[str, dict[str, Any]] = {
    "ipo": {"length_normalize": False},
    "rrhf": {"length_penalty": 0.7, "sft_weight": 0.4},
    "cdpo": {"label_smoothing": 0.3},
    "robust": {"label_smoothing": 0.3},
    "simpo": {"gamma_beta_ratio": 0.4},
    "lire": {"temperature": 5.0},
}
pytestmark = pytest.mark.usefixtures("one_thread")

RAGGED = (3, 1, 4, 2, 7, 1, 4)
LOSSES = built_in_losses()


@pytest.fixture(params=DEVICES)
def epilogue(request: pytest.FixtureRequest) -> Implementation:
    return implementation(request.param)


def bound(name: str, *, options: bool = False) -> losses.BoundLoss:
    return losses.resolve(name, options=OPTIONS.get(name) if options else None)


def scores_for(name: str, scores: str | None) -> str | None:
    """LIRE reads the values, so it always has some."""
    return scores or ("distinct" if name == "lire" else None)


def assert_close(what: str, got: Tensor, exact: Tensor, fp32: Tensor) -> None:
    """No further from float64 than twice what PyTorch is in fp32, and a rounding of fp32."""
    assert got.dtype == torch.float32
    tiny = 2e-7 * (1 + float(exact.abs().max())) if exact.numel() else 0.0
    budget = 2 * (fp32.double() - exact).abs() + tiny
    worst = (got.double() - exact).abs() - budget
    assert not worst.isnan().any(), f"{what}: not written, or not a number"
    assert (worst <= 0).all(), f"{what}: off by {float(worst.max()):g} more than allowed"


def assert_solved(vectors: EpilogueVectors, loss: losses.BoundLoss) -> None:
    """Sums, losses and derivatives of all groups."""
    exact, fp32 = solve(vectors, loss), solve(vectors, loss, torch.float32)
    assert_close("logps", vectors.logps, exact.logps, fp32.logps)
    if vectors.ref_logps is not None:
        assert exact.ref_logps is not None and fp32.ref_logps is not None
        assert_close("ref_logps", vectors.ref_logps, exact.ref_logps, fp32.ref_logps)
    assert_close("losses", vectors.losses, exact.losses, fp32.losses)
    assert_close("derivative", vectors.derivative, exact.derivative, fp32.derivative)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), RAGGED], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_derivatives_by_size(epilogue: Implementation, name: str, sizes: tuple[int, ...]) -> None:
    vectors = epilogue.vectors(sizes, scores=scores_for(name, None))
    epilogue(vectors, bound(name), None, 0, len(sizes))
    assert_solved(vectors, bound(name))
    assert vectors.coefficients is not None and vectors.coefficients.isnan().all(), "nothing was asked of them"


@pytest.mark.parametrize("reference", ["live", "cached", "none"])
@pytest.mark.parametrize("scores", [None, "distinct", "tied"], ids=["by-position", "scored", "tied"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_derivatives_by_what_is_given(
    epilogue: Implementation, name: str, scores: str | None, reference: str
) -> None:
    loss = bound(name, options=True)
    if loss.needs_reference and reference == "none":
        reference = "live"
    vectors = epilogue.vectors(RAGGED, scores=scores_for(name, scores), reference=reference, counted=True)
    epilogue(vectors, loss, None, 0, len(RAGGED))
    assert_solved(vectors, loss)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins(epilogue: Implementation, name: str) -> None:
    # One token each: log-ratios of ±1e4, where e^{−u} overflows even in float64, and a margin of exactly 0.
    values = epilogue.tensor([-1e4, 0.0, 0.0, -1e4, -7.0, -7.0, 0.0, -1e4, -1e4, -1.0])
    vectors = epilogue.vectors((2, 2, 2, 4), lengths=[1] * 10, scores=scores_for(name, None))
    vectors = replace(vectors, token_logps=values, ref_token_logps=torch.zeros_like(values))
    epilogue(vectors, bound(name), 0.5, 0, 4)
    assert_solved(vectors, bound(name))
    assert vectors.state is not None and vectors.state.isfinite().all()
    assert vectors.coefficients is not None and vectors.coefficients.isfinite().all()


def test_a_certain_preference_keeps_its_digits(epilogue: Implementation) -> None:
    """−logσ(u) at u = 40 is 4e-18, which 1 + e^{−u} cannot hold."""
    vectors = epilogue.vectors((2,), lengths=[1, 1])
    vectors = replace(
        vectors, token_logps=epilogue.tensor([0.0, -40.0]), ref_token_logps=torch.zeros(2).to(epilogue.device)
    )
    epilogue(vectors, NativeLoss("sigmoid", {"beta": 1.0}), None, 0, 1)
    torch.testing.assert_close(vectors.losses.cpu(), torch.tensor([math.exp(-40)]), rtol=1e-6, atol=0.0)
    expected = torch.tensor([-math.exp(-40), math.exp(-40)])
    torch.testing.assert_close(vectors.derivative.cpu(), expected, rtol=1e-6, atol=0.0)


def test_long_responses_take_several_blocks(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((2, 1, 2), lengths=[700, 3, 0, 1100, 513], counted=True)
    epilogue(vectors, bound("sigmoid"), 1.0, 0, 3)
    assert_solved(vectors, bound("sigmoid"))
    assert_weighted(vectors, bound("sigmoid"), 1.0, accumulate_chunks(epilogue, vectors, bound("sigmoid"), 1.0, (0, 3)))


def test_sixty_four_responses(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((64, 33), longest=5, scores="tied")
    for name in ("plackett_luce", "sigmoid", "rrhf"):
        epilogue(vectors, bound(name), None, 0, 2)
        assert_solved(vectors, bound(name))


def objective(temperature: float) -> ExponentialTilt:
    if math.isinf(temperature):
        return Mean()
    return KLRobust(lam=temperature) if temperature > 0 else DrDPO(beta=-temperature)


def accumulate_chunks(
    epilogue: Implementation,
    vectors: EpilogueVectors,
    loss: losses.BoundLoss,
    temperature: float,
    cuts: tuple[int, ...],
) -> Tensor:
    """[N] fp64 coefficients of all rows as the head accumulates them, normalised at the end."""
    v = vectors
    assert v.state is not None and v.coefficients is not None
    v.state.copy_(fresh_state(v.logps.device))
    v.coefficients.fill_(torch.nan)
    total = torch.zeros(len(v.token_logps), dtype=torch.float64, device=epilogue.device)
    for first, last in pairwise(cuts):
        epilogue(v, loss, temperature, first, last)
        rows = slice(*(int(v.seq_offsets[v.group_offsets[group]]) for group in (first, last)))
        total *= v.state[2]
        total[rows] = v.coefficients[rows].double()
    return total / v.state[1]


def assert_weighted(vectors: EpilogueVectors, loss: losses.BoundLoss, temperature: float, got: Tensor) -> None:
    """Rows carry −q·h·∂ℓ/∂logp with the objective's own weights, and 0 where they belong to nobody."""
    exact, fp32 = solve(vectors, loss), solve(vectors, loss, torch.float32)
    robust = objective(temperature)
    calibration = None if vectors.calibration is None else vectors.calibration.double()

    def coefficients(solved: Any) -> Tensor:
        weights = robust.solve(solved.losses.double(), calibration).coefficients
        of_response = -weights[solved.layout.group_of] * solved.derivative.double()
        return of_response[solved.response_of_row] * solved.kept

    assert_close("coefficients", got.float(), coefficients(exact), coefficients(fp32))
    assert (got[~exact.kept] == 0).all()


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 1, 2, 3, 4, 5, 6, 7)], ids=["one", "two", "each"])
@pytest.mark.parametrize("temperature", [math.inf, -math.inf, 1.0, -1.0, 0.02, -0.02, 1e-9], ids=str)
@pytest.mark.parametrize("calibration", [False, True], ids=["plain", "calibrated"])
def test_coefficients_of_chunks_add_up_to_the_objective(
    epilogue: Implementation, calibration: bool, temperature: float, cuts: tuple[int, ...]
) -> None:
    loss = bound("simpo")  # its losses differ by several units, so that small temperatures move the shift
    vectors = epilogue.vectors(RAGGED, calibration=calibration, counted=True, reference="none")
    assert_weighted(vectors, loss, temperature, accumulate_chunks(epilogue, vectors, loss, temperature, cuts))


@pytest.mark.parametrize("name", LOSSES)
def test_coefficients_of_every_loss(epilogue: Implementation, name: str) -> None:
    loss = bound(name)
    vectors = epilogue.vectors(RAGGED, calibration=True, scores="distinct")
    assert_weighted(vectors, loss, 0.3, accumulate_chunks(epilogue, vectors, loss, 0.3, (0, 4, 7)))


def test_state_follows_the_largest_score(epilogue: Implementation) -> None:
    """The shift stays within the headroom of the largest score, and says by how much it moved."""
    groups, temperature = 6, 1.0
    # sft on one token each: the losses are what is written here.
    wanted = torch.tensor([1.0, 30.5, 31.5, 20.0, 1000.0, 5.0])
    vectors = epilogue.vectors((1,) * groups, lengths=[1] * groups, reference="none")
    vectors = replace(vectors, token_logps=-wanted.to(epilogue.device))
    assert vectors.state is not None
    # 30.5 is within the headroom of 1; 31.5 is not, and is where 20 stays; 1000 makes the past vanish.
    expected_shift = [1.0, 1.0, 31.5, 31.5, 1000.0, 1000.0]
    shift, total = -math.inf, 0.0
    for group in range(groups):
        epilogue(vectors, bound("sft"), temperature, group, group + 1)
        moved = expected_shift[group]
        rescale = 1.0 if group == 0 else math.exp(shift - moved)
        total = total * rescale + math.exp(float(wanted[group]) - moved)
        expected = torch.tensor([moved, total, rescale], dtype=torch.float64)
        torch.testing.assert_close(vectors.state.cpu(), expected, rtol=1e-12, atol=0.0)
        if shift == moved:
            assert float(vectors.state[2]) == 1.0
        shift = moved
    assert HEADROOM == 30.0


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in the interpreter
def test_scores_beyond_the_largest_number_stay_finite(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((1, 1), lengths=[1, 1], reference="none")
    vectors = replace(vectors, token_logps=epilogue.tensor([-3.0, -4.0]))
    epilogue(vectors, bound("sft"), 5e-324, 0, 2)
    assert vectors.state is not None and vectors.coefficients is not None
    largest = torch.finfo(torch.float64).max
    assert vectors.state.tolist() == [largest, 2.0, 1.0]
    assert vectors.coefficients.tolist() == [1.0, 1.0]


def test_many_groups_are_summed_in_blocks(epilogue: Implementation) -> None:
    groups = 515  # the last program takes 512 at a time
    vectors = epilogue.vectors((1,) * groups, lengths=[1] * groups, reference="none", calibration=True)
    assert_weighted(vectors, bound("sft"), 0.5, accumulate_chunks(epilogue, vectors, bound("sft"), 0.5, (0, groups)))


def test_same_bits_in_every_run(epilogue: Implementation) -> None:
    loss, first = bound("plackett_luce"), epilogue.vectors(RAGGED, calibration=True, counted=True, scores="tied")
    second = poisoned(first)
    for vectors in (first, second):
        for chunk in ((0, 3), (3, 7)):
            epilogue(vectors, loss, 0.1, *chunk)
    for name in ("logps", "ref_logps", "losses", "derivative", "coefficients", "state"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_only_the_chunk_is_written(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((2, 3, 2, 1), lengths=[3, 2, 0, 4, 5, 1, 2, 6])
    epilogue(vectors, bound("sigmoid"), 1.0, 1, 3)
    assert vectors.coefficients is not None and vectors.ref_logps is not None
    assert vectors.losses.isnan().tolist() == [True, False, False, True]
    inside = [False, False, True, True, True, True, True, False]
    for each in (vectors.logps, vectors.ref_logps, vectors.derivative):
        assert each.isnan().tolist() == [not written for written in inside]
    assert vectors.coefficients.isnan().tolist() == [True] * 5 + [False] * 12 + [True] * 6


def test_nothing_happens_without_a_group(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((2, 2))
    assert vectors.state is not None
    vectors.state.copy_(torch.tensor([3.0, 4.0, 0.5], dtype=torch.float64))
    epilogue(vectors, bound("sigmoid"), 1.0, 1, 1)
    assert vectors.state.tolist() == [3.0, 4.0, 1.0], "nothing more is to be rescaled"
    assert vectors.losses.isnan().all()


def test_a_nan_reaches_the_normaliser_and_its_own_group_only(epilogue: Implementation) -> None:
    vectors = epilogue.vectors((2, 2, 2), lengths=[2] * 6)
    vectors.token_logps[5] = torch.nan  # in the second group
    epilogue(vectors, bound("sigmoid"), 0.5, 0, 3)
    assert vectors.state is not None and vectors.coefficients is not None
    assert vectors.losses.isnan().tolist() == [False, True, False]
    assert vectors.state.isnan().tolist() == [False, True, False]
    assert vectors.coefficients.isnan().tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("backend", DEVICES)
@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    name=st.sampled_from(sorted(LOSSES)),
    reference=st.sampled_from(["live", "cached"]),
    scores=st.sampled_from(["distinct", "tied"]),
    temperature=st.sampled_from([math.inf, 2.0, 0.1, -0.5]),
    cut=st.integers(0, 5),
    counted=st.booleans(),
    calibration=st.booleans(),
    longest=st.integers(0, 70),
)
def test_any_layout(
    backend: str,
    sizes: list[int],
    name: str,
    reference: str,
    scores: str,
    temperature: float,
    cut: int,
    counted: bool,
    calibration: bool,
    longest: int,
) -> None:
    epilogue, loss = implementation(backend), bound(name, options=True)
    vectors = epilogue.vectors(
        sizes, longest=longest, reference=reference, scores=scores, calibration=calibration, counted=counted
    )
    cuts = (0, min(cut, len(sizes)), len(sizes))
    total = accumulate_chunks(epilogue, vectors, loss, temperature, cuts)
    assert_solved(vectors, loss)
    assert_weighted(vectors, loss, temperature, total)


def test_scores_in_half_precision(epilogue: Implementation) -> None:
    vectors = epilogue.vectors(RAGGED, scores="tied")
    assert vectors.scores is not None
    vectors = replace(vectors, scores=vectors.scores.bfloat16())
    epilogue(vectors, bound("sigmoid"), None, 0, len(RAGGED))
    assert_solved(vectors, bound("sigmoid"))


def test_supports_every_built_in_loss(epilogue: Implementation) -> None:
    for name in losses.available_losses():
        assert epilogue.supports(losses.resolve(name), 2) == (name in LOSSES)
    assert not epilogue.supports(losses.resolve(losses.likelihood.sft), 2), "a user's function, whatever its name"


GOOD = {"temperature": 1.0, "first_group": 0, "last_group": 2, "loss": NativeLoss("sigmoid", {"beta": 0.1})}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "temperature-0": ({"temperature": 0.0}, {}, r"temperature: expected a number that is not 0, or None, got 0.0"),
    "temperature-nan": ({"temperature": math.nan}, {}, r"temperature: expected .*, got nan"),
    "backwards": (
        {"first_group": 2, "last_group": 1},
        {},
        r"first_group, last_group: expected 0 ≤ .* ≤ 2, got \(2, 1\)",
    ),
    "beyond": ({"last_group": 3}, {}, r"first_group, last_group: expected .*, got \(0, 3\)"),
    "loss": ({"loss": NativeLoss("hinge", {})}, {}, r"loss: expected one of sigmoid, .*, got 'hinge'"),
    "option": (
        {"loss": NativeLoss("cdpo", {"beta": 0.1})},
        {},
        r"loss: expected a value for label_smoothing of 'cdpo'",
    ),
    "shape": ({}, {"lengths": torch.ones(3)}, r"vectors.lengths: expected shape \[4\], got \[3\]"),
    "dtype": ({}, {"logps": torch.ones(4).double()}, r"vectors.logps: expected dtype torch.float32, got torch.float64"),
    "scores": ({}, {"scores": torch.ones(4).double()}, r"vectors.scores: expected dtype .*, got torch.float64"),
    "layout": ({}, {"logps": torch.ones(8)[::2]}, r"vectors.logps: expected a contiguous vector, got strides \(2,\)"),
    "device": ({}, {"lengths": torch.ones(4, device="meta")}, r"vectors.lengths: expected a tensor on .*, got meta"),
    "no-ref": ({}, {"ref_logps": None}, r"vectors.ref_logps: expected a vector to fill .*, got None"),
    "no-state": ({}, {"state": None}, r"vectors.state: expected a vector to fill, with a temperature, got None"),
    "no-rows": ({}, {"coefficients": None}, r"vectors.coefficients: expected a vector to fill.*, got None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(epilogue: Implementation, case: str) -> None:
    changes, vectors, message = REFUSED[case]
    given = {
        name: value.to(epilogue.device) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in vectors.items()
    }
    if isinstance(given.get("logps"), Tensor) and case == "layout":
        given["logps"] = torch.ones(8, device=epilogue.device)[::2]
    with pytest.raises(ValueError, match=message):
        epilogue.launcher(replace(epilogue.vectors((2, 2)), **given), **{**GOOD, **changes})


def test_state_and_coefficients_may_be_missing_without_tilt(epilogue: Implementation) -> None:
    vectors = replace(epilogue.vectors((2, 2)), state=None, coefficients=None)
    epilogue(vectors, bound("sigmoid"), None, 0, 2)
    assert_solved(vectors, bound("sigmoid"))
