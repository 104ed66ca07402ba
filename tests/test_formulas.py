"""The formulas in C++ that CPU and CUDA kernels share, against PyTorch in float64 and numbers that break naive code."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from epilogue_cases import built_in_losses
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robust_dpo import losses, reference
from robust_dpo.groups import GroupLayout
from robust_dpo.kernels.group_epilogue import HEADROOM, NativeLoss, option_values

pytest.importorskip("robust_dpo._cpu", reason="the native extension is not built")

from robust_dpo import _cpu
from robust_dpo.kernels.group_epilogue_cpu import LOSSES

DOUBLE, SINGLE = _cpu.formulas.float64, _cpu.formulas.float32
# Formulas and their rounding unit.
PRECISIONS = [pytest.param(DOUBLE, 2**-53, id="float64"), pytest.param(SINGLE, 2**-24, id="float32")]
TINY, LARGEST = 5e-324, torch.finfo(torch.float64).max
HOSTILE = [0.0, -0.0, TINY, -TINY, 2.3e-308, 1e-20, -1e-8, 0.3, -0.7, 1.0, -5.0, 17.0, -36.7, 40.0, 88.8, -103.0]
HOSTILE += [709.0, -745.2, 1e4, -1e4, 1e30, -1e30, math.inf, -math.inf]
INFINITY = math.inf

pytestmark = pytest.mark.usefixtures("one_thread")


def as_held(formulas: Any, value: float) -> float:
    """The number that arrives: rounded to fp32 for the formulas in single precision."""
    return value if formulas is DOUBLE else torch.tensor(value, dtype=torch.float32).item()


def assert_near(got: float, exact: float, unit: float, units: float = 4) -> None:
    """Within a few roundings, and the smallest number of the precision; infinities and NaN alike."""
    if math.isnan(exact) or math.isinf(exact):
        assert got == exact or (math.isnan(got) and math.isnan(exact)), f"{got} for {exact}"
        return
    smallest = 2**-1074 if unit == 2**-53 else 2**-149
    assert abs(got - exact) <= units * (unit * abs(exact) + smallest), f"{got!r} for {exact!r}"


@pytest.mark.parametrize(("formulas", "unit"), PRECISIONS)
@pytest.mark.parametrize("u", HOSTILE, ids=str)
def test_negative_log_sigmoid(formulas: Any, unit: float, u: float) -> None:
    value, slope = formulas.negative_log_sigmoid(u)
    x = as_held(formulas, u)
    small = math.exp(-abs(x))
    assert_near(value, max(-x, 0.0) + math.log1p(small), unit)
    assert_near(slope, -(small if x > 0 else 1.0) / (1 + small), unit)


def test_negative_log_sigmoid_is_that_of_torch() -> None:
    u = torch.cat([torch.linspace(-800, 800, 1601), torch.randn(200)]).double().requires_grad_()
    expected = -torch.nn.functional.logsigmoid(u)
    (slope,) = torch.autograd.grad(expected.sum(), u)
    got = torch.tensor([DOUBLE.negative_log_sigmoid(x) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got[:, 0], expected.detach(), rtol=1e-14, atol=1e-322)
    torch.testing.assert_close(got[:, 1], slope, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("formulas", [DOUBLE, SINGLE], ids=["float64", "float32"])
def test_a_nan_stays_a_nan(formulas: Any) -> None:
    assert all(map(math.isnan, formulas.negative_log_sigmoid(math.nan)))
    assert all(map(math.isnan, formulas.capped(math.nan, 30.0)))
    assert math.isnan(formulas.softmax_minus_one(math.nan))
    assert math.isnan(formulas.tilted_score(math.nan, 1.0, 1.0))
    assert all(map(math.isnan, formulas.merged([[1.0, math.nan], [2.0]], 1.0)))
    assert all(map(math.isnan, formulas.merged([[math.nan], [2.0]], 1.0)))
    assert all(map(math.isnan, formulas.merged([[-INFINITY], [-INFINITY, math.nan]], 1.0)))


@pytest.mark.parametrize(("formulas", "unit"), PRECISIONS)
@pytest.mark.parametrize("softcap", [0.0, 1e-3, 30.0])
@pytest.mark.parametrize("z", HOSTILE, ids=str)
def test_capped(formulas: Any, unit: float, z: float, softcap: float) -> None:
    held, cap = as_held(formulas, z), as_held(formulas, softcap)
    leaf = torch.tensor(held, dtype=torch.float64, requires_grad=True)
    expected = reference.cap(leaf, cap or None)
    (slope,) = torch.autograd.grad(expected, leaf)
    got = formulas.capped(z, softcap)
    assert_near(got[0], expected.item(), unit)
    # 1 − tanh² is a difference from 1.
    assert abs(got[1] - slope.item()) <= 4 * unit


@pytest.mark.parametrize(("formulas", "unit"), PRECISIONS)
@pytest.mark.parametrize("logp", [-0.0, -TINY, -1e-20, -1e-8, -0.1, -1.0, -50.0, -1e4, -math.inf], ids=str)
def test_softmax_minus_one_keeps_its_digits(formulas: Any, unit: float, logp: float) -> None:
    assert_near(formulas.softmax_minus_one(logp), math.expm1(as_held(formulas, logp)), unit)


@pytest.mark.parametrize(("formulas", "unit"), PRECISIONS)
@given(a=st.floats(-1e6, 1e6), b=st.floats(-1e6, 1e6))
def test_a_difference_and_its_error_lose_nothing(formulas: Any, unit: float, a: float, b: float) -> None:
    a, b = as_held(formulas, a), as_held(formulas, b)
    total, lost = formulas.exact_difference(a, b)
    assert Fraction(total) + Fraction(lost) == Fraction(a) - Fraction(b)
    assert abs(lost) <= unit * abs(total)


def whole_row(parts: list[list[float]]) -> Tensor:
    return torch.tensor([x for part in parts for x in part], dtype=torch.float64)


LOGITS = st.one_of(st.floats(-1e4, 1e4), st.floats(-3, 3), st.sampled_from([0.0, -0.0, TINY, -INFINITY, -1e30]))


@given(parts=st.lists(st.lists(LOGITS, max_size=6), min_size=1, max_size=5))
def test_a_row_in_parts_is_the_row(parts: list[list[float]]) -> None:
    row = whole_row(parts)
    if not row.isfinite().any():
        assert DOUBLE.merged(parts, -INFINITY)[0] == -INFINITY
        return
    position = int(row.argmax())
    target = torch.tensor([position], dtype=torch.int64)
    lse = reference.row_logprob(row[None], target)[1].item()
    # Less its largest logit: beside a huge one, the reference's own difference logit − log-sum-exp has lost all digits.
    logp, _, entropy = (x.item() for x in reference.row_logprob(row[None] - row[position], target))
    got = DOUBLE.merged(parts, row[position].item())
    assert got[0] == pytest.approx(lse, rel=1e-14, abs=1e-13)
    # Relative to the largest logit: what is lost beside a huge one is not lost here.
    exact = -math.log(sum(math.exp(x - row[position].item()) for x in row.tolist()))
    assert got[1] == pytest.approx(exact, rel=1e-13, abs=1e-15)
    assert got[1] == pytest.approx(logp, abs=1e-11)
    assert got[2] == pytest.approx(entropy, abs=1e-10)


@given(parts=st.lists(st.lists(st.floats(-50, 50, width=32), max_size=9), min_size=1, max_size=4))
def test_a_row_in_parts_in_single_precision(parts: list[list[float]]) -> None:
    row = whole_row(parts)
    if len(row) == 0:
        assert SINGLE.merged(parts, 0.0)[0] == -INFINITY
        return
    lse, logp, _ = SINGLE.merged(parts, row[0].item())
    assert lse == pytest.approx(row.logsumexp(0).item(), rel=1e-6, abs=1e-6)
    assert logp == pytest.approx(row.log_softmax(0)[0].item(), rel=1e-6, abs=2e-6)


def test_rows_of_infinities() -> None:
    for formulas in (DOUBLE, SINGLE):
        assert formulas.merged([[-INFINITY, -INFINITY], []], -INFINITY)[0] == -INFINITY
        lse, logp, entropy = formulas.merged([[-INFINITY], [], [-7.0], [-INFINITY]], -7.0)
        assert (lse, logp, entropy) == (-7.0, 0.0, 0.0)
        assert not math.isfinite(formulas.merged([[1.0, INFINITY], [2.0]], 1.0)[0])


@pytest.mark.parametrize(("formulas", "unit"), PRECISIONS)
@pytest.mark.parametrize("temperature", [1.0, -1.0, 0.02, 5e-324, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("loss", [0.0, 0.7, -3.0, 1e4, 1e300], ids=str)
def test_tilted_score_is_finite(formulas: Any, unit: float, loss: float, temperature: float) -> None:
    held, t = as_held(formulas, loss), as_held(formulas, temperature)
    got = formulas.tilted_score(loss, 1.5, temperature)
    largest = torch.finfo(torch.float64 if formulas is DOUBLE else torch.float32).max
    if t == 0:
        assert formulas is SINGLE, "5e-324 is 0 in fp32, which no temperature is"
    elif math.isinf(held):
        assert math.isnan(got) if math.isinf(t) else got == math.copysign(largest, held * t)
    else:
        assert_near(got, max(-largest, min(largest, 1.5 * held / t)), unit)


def test_the_shift_follows_beyond_the_headroom_only() -> None:
    assert DOUBLE.advanced(-INFINITY, 0.0, 5.0, HEADROOM) == [5.0, 0.0, 1.0, 1.0]
    assert DOUBLE.advanced(5.0, 2.0, 35.0, HEADROOM) == [5.0, 2.0, 1.0, pytest.approx(math.exp(30))]
    assert DOUBLE.advanced(5.0, 2.0, 36.0, HEADROOM) == [36.0, 2 * math.exp(-31), math.exp(-31), 1.0]
    assert DOUBLE.advanced(5.0, 2.0, -900.0, HEADROOM) == [5.0, 2.0, 1.0, 0.0]
    assert DOUBLE.advanced(-LARGEST, 1.0, LARGEST, HEADROOM) == [LARGEST, 0.0, 0.0, 1.0]
    # A chunk of NaN alone has no highest score: the next chunk begins anew.
    assert DOUBLE.advanced(-INFINITY, 0.0, -INFINITY, HEADROOM)[:3] == [-INFINITY, 0.0, 1.0]


def test_the_losses_are_those_of_the_registry() -> None:
    assert sorted(LOSSES) == sorted(built_in_losses())
    for name, options in LOSSES.items():
        assert {option for option, _ in losses.resolve(name).arguments} == set(options)


Group = tuple[list[float], list[float], list[float], list[float]]


@st.composite
def groups(draw: st.DrawFn, logps: st.SearchStrategy[float]) -> Group:
    """(logps, ref_logps, lengths, scores); ties of the scores are common."""
    size = draw(st.integers(1, 7))

    def column(values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=size, max_size=size))

    lengths = st.integers(1, 50).map(float)
    return column(logps), column(logps), column(lengths), column(st.sampled_from([-1.0, 0.0, 0.25, 2.0]))


def by_autograd(loss: losses.BoundLoss, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The specification's ℓ [] and its derivative [K]."""
    logps, ref_logps, lengths, scores = (torch.tensor(column, dtype=dtype) for column in group)
    logps.requires_grad_()
    layout = GroupLayout.build(len(logps), len(logps), None, logps.device)
    value = reference.group_epilogue(logps, ref_logps, lengths, layout, loss, scores)[0]
    return value.detach(), torch.autograd.grad(value, logps)[0]


def native(formulas: Any, loss: losses.BoundLoss, group: Group) -> tuple[float, Tensor]:
    first, second = option_values(LOSSES, NativeLoss(loss.name, dict(loss.arguments)))
    value, derivative = formulas.group_loss(list(LOSSES).index(loss.name), first, second, *group)
    return value, torch.tensor(derivative, dtype=torch.float64)


VARIED: dict[str, list[dict[str, Any]]] = {
    "ipo": [{}, {"length_normalize": False}],
    "rrhf": [{}, {"length_penalty": 0.7, "sft_weight": 0.4}],
    "cdpo": [{}, {"label_smoothing": 0.5}, {"label_smoothing": 0.0}],
    "robust": [{}, {"label_smoothing": 0.4}],
    "simpo": [{}, {"gamma_beta_ratio": 0.9}],
    "lire": [{}, {"temperature": 0.5}],
}
BOUND = [losses.resolve(name, options=options) for name in built_in_losses() for options in VARIED.get(name, [{}])]


@pytest.mark.parametrize("loss", BOUND, ids=lambda loss: loss.key)
@given(group=groups(st.floats(-30, 0) | st.floats(-1e4, 0)))
def test_losses_in_double(loss: losses.BoundLoss, group: Group) -> None:
    exact, slope = by_autograd(loss, group, torch.float64)
    value, derivative = native(DOUBLE, loss, group)
    size = 1 + max(map(abs, group[0] + group[1]))
    assert value == pytest.approx(exact.item(), rel=1e-12, abs=1e-14 * size)
    torch.testing.assert_close(derivative, slope, rtol=1e-11, atol=1e-14 * size)


@pytest.mark.parametrize("loss", BOUND, ids=lambda loss: loss.key)
# Eighths: far enough from each other that no rounding decides on which side of a kink a margin is.
@given(group=groups(st.integers(-240, 0).map(lambda eighths: eighths / 8)))
def test_losses_in_single(loss: losses.BoundLoss, group: Group) -> None:
    """No further from double than a few roundings of the largest number on the way."""
    exact, slope = by_autograd(loss, group, torch.float64)
    value, derivative = native(SINGLE, loss, group)
    size = 1 + max(map(abs, group[0] + group[1]))
    assert abs(value - exact.item()) <= 2e-6 * (1 + abs(exact.item())) * size
    assert float((derivative - slope).abs().max()) <= 2e-6 * (1 + float(slope.abs().max())) * size


@pytest.mark.parametrize("loss", BOUND, ids=lambda loss: loss.key)
def test_extreme_margins_are_finite(loss: losses.BoundLoss) -> None:
    for logps in ([0.0, -1e4], [-1e4, 0.0], [0.0, -1e4, -1e4, 0.0, -5.0]):
        size = len(logps)
        group = logps, [0.0] * size, [1.0] * size, [float(-i) for i in range(size)]
        exact, slope = by_autograd(loss, group, torch.float64)
        for formulas, tolerance in ((DOUBLE, 1e-12), (SINGLE, 1e-5)):
            value, derivative = native(formulas, loss, group)
            assert value == pytest.approx(exact.item(), rel=tolerance, abs=tolerance)
            torch.testing.assert_close(derivative, slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", BOUND, ids=lambda loss: loss.key)
def test_a_nan_reaches_loss_and_derivative(loss: losses.BoundLoss) -> None:
    value, derivative = native(DOUBLE, loss, ([math.nan, -1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, 0.0]))
    assert math.isnan(value)
    if loss.name not in ("sft", "rrhf"):  # whose derivatives are numbers of the order alone
        assert derivative.isnan().any()


def test_vectors_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="group_loss: expected vectors of one size"):
        DOUBLE.group_loss(0, 0.1, 0.0, [0.0, 0.0], [0.0], [1.0, 1.0], [1.0, 0.0])
