"""Calibration from probabilities: the three forms, their defaults, edges and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_dpo import reference
from robust_dpo.calibration import density_ratio

FORMS = ("paper", "mixture", "official")


def test_defaults_for_one_probability_per_response():
    c = torch.rand(5, 2, dtype=torch.float64)
    torch.testing.assert_close(density_ratio(c), 2 * c / (2 - c))
    torch.testing.assert_close(density_ratio(c, "mixture"), 2 * c)
    torch.testing.assert_close(density_ratio(c, "official"), 2 * c)


@pytest.mark.parametrize("form", FORMS)
def test_matches_the_specification(form: str):
    c, alpha = torch.rand(5, 2, dtype=torch.float64), 0.3
    torch.testing.assert_close(
        density_ratio(c, form, alpha=alpha, betas=[0.7] if form != "official" else [0.7, 0.7]),
        reference.calibration_weights(c, form, alpha, 0.7),
    )


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 5), (0,)], ids=str)
@pytest.mark.parametrize("form", ["paper", "mixture"])
def test_one_classifier_keeps_any_shape(form: str, shape: tuple[int, ...]):
    c = torch.rand(shape, dtype=torch.float64)
    h = density_ratio(c, form, alpha=0.3, gammas=2.5)
    expected = {
        "mixture": 1 / (0.3 + 0.7 * (1 - c) / (2.5 * c)),
        "paper": (2.5 * c / (0.3 * (1 - c) + 0.5) + 2.5 * c / (0.7 * (1 - c) + 0.5)) / 2,
    }
    torch.testing.assert_close(h, expected[form])
    assert h.shape == c.shape


def test_one_classifier_and_many_sources():
    c = torch.rand(6, dtype=torch.float64)
    betas = [0.1, 0.2, 0.3]
    expected = sum(c / (b * (1 - c) + 1 / 4) for b in [0.4, *betas]) / 4
    torch.testing.assert_close(density_ratio(c, betas=betas), expected)
    torch.testing.assert_close(density_ratio(c, "mixture", betas=betas), 1 / (0.4 + 0.6 * (1 - c) / c))


def test_a_classifier_for_each_source():
    c = torch.rand(6, 3, dtype=torch.float64)
    betas, gammas = [0.1, 0.2, 0.3], [1.0, 2.0, 0.5]
    options: dict[str, Any] = {"betas": torch.tensor(betas), "gammas": gammas, "per_source": True}
    terms = [b * (1 - c[:, i]) / (g * c[:, i]) for i, (b, g) in enumerate(zip(betas, gammas, strict=True))]
    torch.testing.assert_close(density_ratio(c, "mixture", **options), 1 / (0.4 + sum(terms)), rtol=1e-6, atol=1e-6)
    terms = [g * c[:, i] / (b * (1 - c[:, i]) + 1 / 4) for i, (b, g) in enumerate(zip(betas, gammas, strict=True))]
    torch.testing.assert_close(density_ratio(c, "paper", **options), sum(terms) / 3, rtol=1e-6, atol=1e-6)
    equal = density_ratio(c, "mixture", per_source=True)
    torch.testing.assert_close(equal, 4 / (1 + ((1 - c) / c).sum(1)))


@given(data=st.data(), sources=st.integers(1, 4))
def test_mixture_recovers_the_density_ratio(data: st.DataObject, sources: int):
    """With the Bayes-optimal classifier of two discrete distributions and any class imbalance, h is exactly Q₀/P."""
    positive = st.floats(0.01, 1.0)
    outcomes = 5
    density = torch.tensor(
        data.draw(st.lists(positive, min_size=outcomes * (sources + 1), max_size=outcomes * (sources + 1))),
        dtype=torch.float64,
    ).view(sources + 1, outcomes)
    density = density / density.sum(1, keepdim=True)
    shares = torch.tensor(
        data.draw(st.lists(positive, min_size=sources + 1, max_size=sources + 1)), dtype=torch.float64
    )
    shares = shares / shares.sum()
    gammas = torch.tensor(
        data.draw(st.lists(st.floats(0.1, 9), min_size=sources, max_size=sources)), dtype=torch.float64
    )
    target, others = density[0], density[1:]
    c = target / (target + gammas[:, None] * others)
    h = density_ratio(c.T, "mixture", alpha=float(shares[0]), betas=shares[1:], gammas=gammas, per_source=True)
    torch.testing.assert_close(h, target / (shares[:, None] * density).sum(0))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 8])
def test_official_by_position(width: int):
    p = torch.rand(4, width, dtype=torch.float64)
    betas = [1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 3, 1 / 6] if width == 6 else [1 / width] * width
    expected = 1 / (1 / width + torch.tensor(betas, dtype=torch.float64) * (1 - p) / p)
    torch.testing.assert_close(density_ratio(p, "official"), expected)
    torch.testing.assert_close(density_ratio(p.flatten(), "official", group_size=width), expected.flatten())
    if width in (2, 4):
        torch.testing.assert_close(density_ratio(p, "official"), width * p)


def test_official_with_other_shares():
    p = torch.rand(4, 3, dtype=torch.float64)
    betas = [0.5, 0.25, 0.125]
    expected = p / (0.2 * p + torch.tensor(betas, dtype=torch.float64) * (1 - p))
    torch.testing.assert_close(density_ratio(p, "official", alpha=0.2, betas=betas), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_certain_and_tiny_probabilities_are_finite_and_ordered(form: str, dtype: torch.dtype):
    p = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-30, 1e-3, 0.5, 1 - 1e-6, 1.0], dtype=dtype)
    h = density_ratio(torch.stack([p, p], 1) if form == "official" else p, form)
    h = h[:, 0] if form == "official" else h
    assert h.isfinite().all() and h.dtype == dtype
    assert (h.diff() >= 0).all()
    assert h[0] == 0
    torch.testing.assert_close(h[-1], torch.tensor(2.0, dtype=dtype))


def test_clip_bounds_h():
    p = torch.rand(50)
    h = density_ratio(p, "mixture", clip=1.25)
    torch.testing.assert_close(h, (2 * p).clamp(max=1.25))


def test_half_precision_is_computed_in_fp32_and_detached():
    h = density_ratio(torch.rand(3, requires_grad=True).bfloat16())
    assert h.dtype == torch.float32 and not h.requires_grad


HALF = torch.full((2, 2), 0.5)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "form": ({"form": "bayes"}, ValueError, r"form: expected one of paper, mixture, official, got 'bayes'"),
    "list": ({"probs": [0.5]}, TypeError, r"probs: expected a floating tensor .*, got list"),
    "integers": ({"probs": torch.ones(2, dtype=torch.int64)}, TypeError, r"probs: expected a floating tensor"),
    "above-1": (
        {"probs": torch.tensor([[0.5, 0.5], [0.5, 1.5]])},
        ValueError,
        r"probs: expected probabilities in \[0, 1\] at position \[1, 1\], got 1.5",
    ),
    "negative": ({"probs": torch.tensor([0.5, -0.25])}, ValueError, r"at position \[1\], got -0.25"),
    "nan": ({"probs": torch.tensor([math.nan])}, ValueError, r"at position \[0\], got nan"),
    "alpha-0": ({"alpha": 0.0}, ValueError, r"alpha: expected a number in \(0, 1\), got 0.0"),
    "alpha-text": ({"alpha": "half"}, TypeError, r"alpha: expected .*, got str"),
    "shares-above-1": ({"alpha": 0.5, "betas": 0.7}, ValueError, r"betas: expected a sum of 1 − alpha = 0.5, got 0.7"),
    "betas-fill-all": ({"betas": [0.5, 0.5]}, ValueError, r"betas: expected a sum below 1.*, got 1.0"),
    "betas-text": ({"betas": "0.5"}, TypeError, r"betas: expected a number .*, got str"),
    "no-betas": ({"betas": []}, ValueError, r"betas: expected at least one number, got none"),
    "gamma-0": ({"gammas": 0.0}, ValueError, r"gammas: expected a number in \(0, inf\), got 0.0"),
    "gammas-count": (
        {"betas": [0.2, 0.2], "gammas": [1.0, 1.0, 1.0]},
        ValueError,
        r"gammas: expected 1 or 2 numbers, as betas, got 3",
    ),
    "gammas-of-one-classifier": (
        {"betas": [0.2, 0.2], "gammas": [1.0, 2.0]},
        ValueError,
        r"gammas: expected one number: a single classifier .*, got 2",
    ),
    "betas-per-source": (
        {"betas": [0.2, 0.2, 0.2], "per_source": True},
        ValueError,
        r"betas: expected 2 numbers, one for each source in probs, got 3",
    ),
    "scalar-per-source": (
        {"probs": torch.tensor(0.5), "per_source": True},
        ValueError,
        r"probs: expected shape \[..., m\] with per_source.*, got \[\]",
    ),
    "per-source-flag": ({"per_source": 1}, TypeError, r"per_source: expected True or False, got int"),
    "clip": ({"clip": 0.0}, ValueError, r"clip: expected a number in \(0, inf\), got 0.0"),
    "group-size-of-paper": ({"group_size": 2}, ValueError, r"group_size: expected None with form 'paper'.*, got 2"),
    "official-gammas": ({"form": "official", "gammas": 1.0}, ValueError, r"gammas: expected None .*, got 1.0"),
    "official-per-source": ({"form": "official", "per_source": True}, ValueError, r"per_source: expected False"),
    "official-flat": (
        {"form": "official", "probs": torch.rand(4)},
        ValueError,
        r"probs: expected shape \[..., K\], or \[S\] with group_size, got \[4\]",
    ),
    "official-divisor": (
        {"form": "official", "probs": torch.rand(4), "group_size": 3},
        ValueError,
        r"group_size: expected a divisor of the 4 responses, got 3",
    ),
    "official-group-size-type": (
        {"form": "official", "probs": torch.rand(4), "group_size": 2.0},
        TypeError,
        r"group_size: expected an integer, got float",
    ),
    "official-both": ({"form": "official", "group_size": 2}, ValueError, r"group_size: expected None with probs of"),
    "official-betas": (
        {"form": "official", "betas": [0.5]},
        ValueError,
        r"betas: expected 2 numbers, one for each response of a group, got 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str):
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        density_ratio(**{"probs": HALF, **changes})
