"""preference_loss on vectors of log-probs: against the reference, and as the other operators' last step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import make_problem, relative_error
from torch import Tensor

from robust_dpo import DrDPO, KLRobust, Mean, linear_preference_loss, losses, preference_loss, reference, sequence_logps
from robust_dpo.groups import GroupLayout
from robust_dpo.losses import available_losses
from robust_dpo.robust import RobustObjective

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [2, 4, 1, 3, 2]
OBJECTIVES: dict[str, RobustObjective] = {
    "mean": Mean(),
    "kl": KLRobust(lam=0.7),
    "outside": KLRobust(lam=0.7, calibration="outside"),
    "radius": KLRobust(radius=0.2),
    "dr_dpo": DrDPO(beta=0.6),
}


def vectors(sizes: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    count = sum(sizes)
    return {
        "logps": (-20 * torch.rand(count, dtype=torch.float64)).to(dtype).requires_grad_(),
        "ref_logps": (-20 * torch.rand(count, dtype=torch.float64)).to(dtype),
        "lengths": torch.randint(1, 30, (count,)),
        "scores": torch.randn(count, dtype=torch.float64).to(dtype),
        "calibration": torch.rand(len(sizes), dtype=torch.float64).to(dtype),
        "group_sizes": torch.tensor(sizes),
    }


def expected(loss: str, robust: RobustObjective, v: dict[str, Tensor]) -> Tensor:
    layout = GroupLayout.build(len(v["logps"]), 2, v["group_sizes"], torch.device("cpu"))
    bound = losses.resolve(loss)
    values = reference.group_epilogue(v["logps"], v["ref_logps"], v["lengths"], layout, bound, v["scores"])
    return reference.aggregate(robust, values, v["calibration"])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", available_losses())
def test_matches_the_reference(loss: str, objective: str) -> None:
    v = vectors(SIZES)
    truth = expected(loss, OBJECTIVES[objective], v)
    output = preference_loss(**v, loss=loss, robust=OBJECTIVES[objective])
    assert relative_error(output.loss, truth) < 1e-6
    one, two = (torch.autograd.grad(each, v["logps"])[0] for each in (output.loss, truth))
    assert relative_error(one, two) < 1e-6
    assert output.weights.sum().item() == pytest.approx(1)
    detached = [output.logps, output.ref_logps, output.log_ratios, output.group_losses, output.weights, output.ess]
    assert not any(value is None or value.requires_grad for value in detached)


@pytest.mark.parametrize("loss", available_losses())
def test_composes_with_sequence_logps(loss: str) -> None:
    problem = make_problem([2, 3, 2], scores=True, calibration=True).to(torch.float64)
    kwargs = {name: problem.kwargs[name] for name in ("group_sizes", "scores", "calibration")}
    options: dict[str, Any] = {"loss": loss, "robust": KLRobust(lam=0.4), **kwargs}
    fused = linear_preference_loss(*problem.args, **(problem.kwargs | options))
    apart = preference_loss(
        sequence_logps(*problem.args), fused.ref_logps, lengths=(problem.targets != -100).sum(1), **options
    )
    leaves = list(problem.leaves.values())
    for name in ("loss", "logps", "log_ratios", "group_losses", "weights", "ess", "parameter", "log_partition"):
        torch.testing.assert_close(getattr(fused, name), getattr(apart, name))
    for one, two in zip(torch.autograd.grad(fused.loss, leaves), torch.autograd.grad(apart.loss, leaves), strict=True):
        assert relative_error(one, two) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_raised_to_fp32(dtype: torch.dtype) -> None:
    v = vectors(SIZES, dtype)
    output = preference_loss(**v, loss="plackett_luce", robust=KLRobust(lam=0.5))
    assert output.loss.dtype == torch.float32
    wide = {name: value.double() if value.is_floating_point() else value for name, value in v.items()}
    wide["logps"] = wide["logps"].detach().requires_grad_()
    truth = expected("plackett_luce", KLRobust(lam=0.5), wide)
    assert relative_error(output.loss, truth) < 1e-5
    (gradient,) = torch.autograd.grad(output.loss, v["logps"])
    assert gradient.dtype == dtype
    (wide_gradient,) = torch.autograd.grad(truth, wide["logps"])
    assert relative_error(gradient, wide_gradient) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("objective", ["mean", "kl", "outside", "dr_dpo"])
@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "plackett_luce"])
def test_gradcheck(loss: str, objective: str) -> None:
    v = vectors(SIZES)
    logps = v.pop("logps")

    def value(logps: Tensor) -> Tensor:
        return preference_loss(logps, loss=loss, beta=0.5, robust=OBJECTIVES[objective], **v).loss

    assert torch.autograd.gradcheck(value, (logps,))


def test_calibration_per_response_is_averaged() -> None:
    v = vectors([2, 3])
    per_response = torch.rand(5, dtype=torch.float64)
    means = torch.stack([per_response[:2].mean(), per_response[2:].mean()])
    one, two = (preference_loss(**(v | {"calibration": h}), robust="kl").loss for h in (per_response, means))
    torch.testing.assert_close(one, two)


def test_without_lengths_a_response_has_length_one() -> None:
    v = vectors([2, 2])
    del v["lengths"]
    same = preference_loss(**v, loss="simpo", lengths=torch.ones(4))
    torch.testing.assert_close(preference_loss(**v, loss="simpo").loss, same.loss)


def test_scaled_and_repeated_backward() -> None:
    v = vectors(SIZES)
    loss = preference_loss(**v, robust=KLRobust(lam=0.5)).loss
    plain, scaled = (torch.autograd.grad(f * loss, v["logps"], retain_graph=True)[0] for f in (1, 3))
    torch.testing.assert_close(scaled, 3 * plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(mode: Any) -> None:
    v = vectors(SIZES)
    with mode():
        output = preference_loss(**v, robust="kl")
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, preference_loss(**v, robust="kl").loss.detach())


def test_a_nan_is_seen() -> None:
    v = vectors([2, 2])
    logps = v["logps"].detach().clone()
    logps[1] = math.nan
    output = preference_loss(**(v | {"logps": logps}), robust="kl")
    assert output.loss.isnan()
    assert output.group_losses.isnan().tolist() == [True, False]


@given(
    parts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=2, max_size=4),
    objective=st.sampled_from(["mean", "kl", "dr_dpo"]),
)
def test_parts_add_up_to_the_batch(parts: list[list[int]], objective: str) -> None:
    robust = OBJECTIVES[objective]
    v = vectors([size for part in parts for size in part])
    whole = preference_loss(**v, loss="plackett_luce", robust=robust)
    (wanted,) = torch.autograd.grad(whole.loss, v["logps"])
    total = torch.zeros_like(wanted)
    first_group = first = 0
    for part in parts:
        rows, groups = slice(first, first + sum(part)), slice(first_group, first_group + len(part))
        first, first_group = rows.stop, groups.stop
        piece = {n: value[groups if n in ("calibration", "group_sizes") else rows] for n, value in v.items()}
        output = preference_loss(**piece, loss="plackett_luce", robust=robust, log_normalizer=whole.log_partition)
        total += torch.autograd.grad(output.loss, v["logps"])[0]
    torch.testing.assert_close(total, wanted)
