"""calibration_weights on every backend, against the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import require_backend
from torch import Tensor

from robust_dpo.calibration import density_ratio, mixture_weights, paper_weights
from robust_dpo.dispatch import choose_backend, get_calibration_weights

BACKENDS = ["torch", "cpu", "triton"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require_backend(name)
    return name


def device_of(backend: str) -> torch.device:
    return torch.device("cpu") if backend == "cpu" else DEVICE


def launcher(backend: str, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    return get_calibration_weights(backend, device_of(backend), dtype)


def in_words(probs: Tensor, betas: Tensor, gammas: Tensor, form: str, alpha: float, num_distributions: int) -> Tensor:
    """The formulas, one response and one slot after the other, in float64."""
    result = []
    for row, response in enumerate(probs.double().tolist()):
        shares = betas[row % len(betas)].tolist()
        terms = []
        for slot, (beta, gamma) in enumerate(zip(shares, gammas.tolist(), strict=True)):
            c = response[slot if len(response) > 1 else 0]
            if form == "paper":
                terms.append(gamma * c / (beta * (1 - c) + 1 / num_distributions))
            else:
                terms.append(beta * (1 - c) / (gamma * c) if c > 0 else float("inf"))
        result.append(sum(terms) / len(terms) if form == "paper" else 1 / (alpha + sum(terms)))
    return torch.tensor(result, dtype=torch.float64)


def make_case(
    responses: int, classifiers: int, slots: int, period: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "probs": torch.rand(responses, classifiers).to(device, dtype),
        "betas": (0.05 + torch.rand(period, slots)).to(device, wide),
        "gammas": (0.2 + 3 * torch.rand(slots)).to(device, wide),
        "alpha": 0.3,
        "num_distributions": slots + 1,
    }


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", ["paper", "mixture"])
@pytest.mark.parametrize(
    ("responses", "classifiers", "slots", "period"),
    [(0, 1, 1, 1), (1, 1, 1, 1), (7, 3, 3, 1), (255, 1, 4, 1), (257, 1, 1, 5), (700, 2, 2, 3)],
    ids=["none", "one", "classifiers", "one-classifier", "by-position", "both"],
)
def test_matches_the_formula(
    backend: str, responses: int, classifiers: int, slots: int, period: int, form: str, dtype: torch.dtype
) -> None:
    case = make_case(responses, classifiers, slots, period, dtype, device_of(backend))
    h = launcher(backend, dtype)(**case, form=form)
    assert h.dtype == torch.float32 and h.shape == (responses,)
    torch.testing.assert_close(h.double().cpu(), in_words(**case, form=form), rtol=2e-6, atol=1e-7)


@settings(max_examples=25)
@given(
    responses=st.integers(0, 40),
    slots=st.integers(1, 5),
    shared=st.booleans(),
    period=st.integers(1, 4),
    form=st.sampled_from(["paper", "mixture"]),
    clip=st.sampled_from([None, 0.5, 1.5]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_layout(
    responses: int, slots: int, shared: bool, period: int, form: str, clip: float | None, backend: str
) -> None:
    require_backend(backend)
    case = make_case(responses, 1 if shared else slots, slots, period, torch.float32, device_of(backend))
    h = launcher(backend)(**case, form=form, clip=clip)
    expected = in_words(**case, form=form).clamp(max=float("inf") if clip is None else clip)
    torch.testing.assert_close(h.double().cpu(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:(divide by zero|overflow) encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("form", ["paper", "mixture"])
def test_certain_and_tiny_probabilities(backend: str, form: str) -> None:
    device = device_of(backend)
    probs = torch.tensor([0.0, 1e-45, 1.2e-38, 1e-30, 1e-3, 0.5, 1 - 6e-8, 1.0], device=device)
    one = torch.ones(1, device=device)
    options = {"form": form, "alpha": 0.5, "num_distributions": 2}
    h = launcher(backend)(probs[:, None], one[:, None] / 2, one, **options)
    assert h.isfinite().all() and (h.diff() >= 0).all()
    assert h[0] == 0
    torch.testing.assert_close(h[-1].cpu(), torch.tensor(2.0))
    # One classifier that rules the target out is enough for `mixture`, whatever the other says.
    pair = torch.tensor([[0.0, 1.0]], device=device)
    h = launcher(backend)(pair, torch.full((1, 2), 0.25, device=device), one.expand(2).contiguous(), **options)
    assert h.isfinite().all() and (form == "paper" or h.item() == 0)


@pytest.mark.parametrize("form", ["paper", "mixture"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_float64_keeps_its_digits(backend: str, form: str) -> None:
    require_backend(backend)
    case = make_case(5, 2, 2, 1, torch.float64, device_of(backend))
    h = launcher(backend, torch.float64)(**case, form=form)
    torch.testing.assert_close(h.cpu(), in_words(**case, form=form), rtol=1e-14, atol=0.0)


def test_auto_takes_native_code_and_never_interprets() -> None:
    require_backend("cpu")
    for dtype in (*HALF, torch.float64):
        assert choose_backend("calibration_weights", "auto", "cpu", dtype).name == "cpu"
    if DEVICE.type == "cuda":
        assert choose_backend("calibration_weights", "auto", DEVICE, torch.float32).name == "triton"
        assert choose_backend("calibration_weights", "auto", DEVICE, torch.float64).name == "torch"


def test_many_responses_on_several_threads() -> None:
    """More than one piece of work, on the threads that torch has, and every response of them."""
    require_backend("cpu")
    case = make_case(40_000, 1, 3, 7, torch.float32, torch.device("cpu"))
    h = launcher("cpu")(**case, form="paper")
    torch.testing.assert_close(h.double(), in_words(**case, form="paper"), rtol=2e-7, atol=0.0)


@pytest.mark.parametrize(
    ("probs", "options"),
    [
        (torch.rand(5, 2), {"form": "paper", "alpha": 0.3, "gammas": 2.0}),
        (torch.rand(5, 2), {"form": "mixture", "betas": [0.2, 0.3]}),
        (torch.rand(4, 3, 2), {"form": "paper", "betas": [0.1, 0.2], "gammas": [1.0, 2.0], "per_source": True}),
        (torch.rand(2, 6).T, {"form": "mixture", "per_source": True}),
        (torch.rand(3, 6), {"form": "official"}),
        (torch.rand(12), {"form": "official", "group_size": 4, "clip": 1.1}),
        (torch.rand(()), {"form": "mixture"}),
        (torch.rand(0, 2), {"form": "official"}),
        (torch.rand(7).bfloat16(), {"form": "paper"}),
    ],
    ids=["paper", "many-sources", "per-source", "strided", "official", "flat", "scalar", "empty", "bf16"],
)
def test_density_ratio_is_the_same_on_every_backend(backend: str, probs: Tensor, options: dict[str, Any]) -> None:
    probs = probs.to(device_of(backend))
    h = density_ratio(probs, backend=backend, **options)
    exact = density_ratio(probs.double(), **options)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h.double(), exact, rtol=2e-6, atol=1e-7)


def test_density_ratio_never_falls_back() -> None:
    require_backend("triton")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run calibration_weights .*torch.float64"):
        density_ratio(torch.rand(3, dtype=torch.float64, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .*, got 'numpy'"):
        density_ratio(torch.rand(3, device=DEVICE), backend="numpy")


def test_formulas_broadcast() -> None:
    c = torch.rand(3, 4, 2, dtype=torch.float64)
    betas, gammas = torch.tensor([0.2, 0.3], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    options = {"alpha": 0.5, "num_distributions": 3}
    flat = c.view(12, 2), betas[None], gammas
    torch.testing.assert_close(mixture_weights(c, 0.5, betas, gammas).view(12), in_words(*flat, "mixture", **options))
    torch.testing.assert_close(paper_weights(c, betas, gammas, 3).view(12), in_words(*flat, "paper", **options))


GOOD = {"form": "mixture", "alpha": 0.5, "num_distributions": 3, "clip": None}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "form": ({"form": "official"}, r"form: expected one of paper, mixture, got 'official'"),
    "flat": ({"probs": torch.rand(4)}, r"probs: expected shape \[S, m\] with m ≥ 1, got \[4\]"),
    "no-classifier": ({"probs": torch.rand(4, 0)}, r"probs: expected shape \[S, m\] with m ≥ 1, got \[4, 0\]"),
    "integers": ({"probs": torch.ones(4, 2, dtype=torch.int64)}, r"probs: expected dtype float32, .*, got torch.int64"),
    "betas": ({"betas": torch.rand(1, 3)}, r"betas: expected shape \[P, slots\], .*, got \[1, 3\]"),
    "betas-dtype": ({"betas": torch.rand(1, 2).double()}, r"betas: expected dtype torch.float32, got torch.float64"),
    "gammas": ({"gammas": torch.rand(3)}, r"gammas: expected shape \[2\], as a row of betas, got \[3\]"),
    "strided": ({"probs": torch.rand(2, 4).T}, r"probs: expected a contiguous tensor, got strides \(1, 4\)"),
    "device": ({"gammas": torch.rand(2, device="meta")}, r"gammas: expected a tensor on .*, as probs, got meta"),
    "alpha": ({"alpha": 0.0}, r"alpha: expected a positive number, got 0.0"),
    "distributions": ({"num_distributions": 0}, r"num_distributions: expected a positive number, got 0"),
    "clip": ({"clip": -1.0}, r"clip: expected a positive number, got -1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(backend: str, case: str) -> None:
    changes, message = REFUSED[case]
    arguments = {"probs": torch.rand(4, 2), "betas": torch.rand(1, 2), "gammas": torch.rand(2), **GOOD, **changes}
    with pytest.raises(ValueError, match=message):
        launcher(backend)(**arguments)
