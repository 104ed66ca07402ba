"""calibration_weights and rescale in CUDA: on a GPU where the extension runs on one, else compiled for the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cuda_emulated import implementation
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_dpo.dispatch import backends
from robust_dpo.kernels import calibration_weights_torch

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = torch.device("cuda" if backends()["cuda"].usable else "cpu")


@settings(max_examples=60)
@given(
    responses=st.sampled_from([0, 1, 7, 255, 257, 700]),
    slots=st.integers(1, 5),
    shared=st.booleans(),
    period=st.integers(1, 4),
    form=st.sampled_from(["paper", "mixture"]),
    clip=st.sampled_from([None, 0.5, 1.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_calibration_weights(
    responses: int, slots: int, shared: bool, period: int, form: str, clip: float | None, dtype: torch.dtype
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    probs = torch.rand(responses, 1 if shared else slots).to(DEVICE, dtype)
    betas, gammas = (0.05 + torch.rand(period, slots)).to(DEVICE, wide), (0.2 + 3 * torch.rand(slots)).to(DEVICE, wide)
    options = {"form": form, "alpha": 0.3, "num_distributions": slots + 1, "clip": clip}
    h = implementation("calibration_weights").calibration_weights(probs, betas, gammas, **options)
    exact = calibration_weights_torch.calibration_weights(probs.double(), betas.double(), gammas.double(), **options)
    assert h.dtype == wide
    tolerance = {"rtol": 1e-13, "atol": 0.0} if wide == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    torch.testing.assert_close(h.double(), exact, **tolerance)


@pytest.mark.parametrize("form", ["paper", "mixture"])
def test_certain_and_tiny_probabilities(form: str) -> None:
    probs = torch.tensor([0.0, 1e-45, 1.2e-38, 1e-30, 1e-3, 0.5, 1 - 6e-8, 1.0], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    options = {"form": form, "alpha": 0.5, "num_distributions": 2}
    h = implementation("calibration_weights").calibration_weights(probs[:, None], one[:, None] / 2, one, **options)
    assert h.isfinite().all() and (h.diff() >= 0).all()
    assert h[0] == 0


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 31, 4095, 4097, 30_001])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_rescale_multiplies_every_element(
    shift: int, count: int, dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    rescale = implementation("rescale").rescale
    memory = torch.randn(shift + count + 5, dtype=dtype, device=DEVICE)
    before = memory.clone()
    total = memory[shift : shift + count]
    factor = torch.full((1,), math.exp(-31.0), dtype=factor_dtype, device=DEVICE)
    rescale(total, factor)
    assert torch.equal(total, before[shift : shift + count] * factor.to(dtype))
    assert torch.equal(memory[:shift], before[:shift])
    assert torch.equal(memory[shift + count :], before[shift + count :])


def test_rescale_by_one_changes_no_bit_and_by_nan_all() -> None:
    rescale = implementation("rescale").rescale
    total = torch.tensor([math.nan, -0.0, math.inf, 1e-45, 3.0], device=DEVICE)
    before = total.view(torch.int32).clone()
    rescale(total, torch.ones((), dtype=torch.float64, device=DEVICE))
    assert torch.equal(total.view(torch.int32), before)
    rescale(total, torch.tensor(math.nan, dtype=torch.float64, device=DEVICE))
    assert total.isnan().all()


@pytest.mark.parametrize(
    ("total", "factor", "message"),
    [
        (torch.ones(2, dtype=torch.int64), torch.ones(()), "total: expected dtype float32 or float64, got torch.int64"),
        (torch.ones(2, 2).T[:1], torch.ones(()), r"total: expected a contiguous tensor, got strides \(1, 2\)"),
        (torch.ones(2), torch.ones(2), r"factor: expected one number .*, got \[2\] of torch.float32"),
        (torch.ones(2, device="meta"), torch.ones(()), "factor: expected a tensor on meta, as total, got cpu"),
        (torch.ones(2, device="meta"), torch.ones((), device="meta"), "total: expected a tensor on a GPU, got meta"),
    ],
    ids=["integers", "strided", "factors", "elsewhere", "nowhere"],
)
def test_rescale_refuses(total: torch.Tensor, factor: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        implementation("rescale").rescale(total, factor)


def test_a_graph_is_looked_for_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another GPU may be current, whose stream says nothing about this one's.
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1].index == 1)
    captures = implementation("group_epilogue")._captures
    assert captures(torch.device("cuda", 1)) and not captures(torch.device("cuda", 0))
    assert len(current) == 1
