"""The head operators on Triton's kernels, through its interpreter where there is no GPU; and rows that are not read.

The kernels have tests of their own; these see that the operators hand them the right vectors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Problem, make_problem, relative_error, require_backend
from torch import Tensor

import robust_dpo
from robust_dpo import DrDPO, KLRobust, Mean, reference
from robust_dpo.losses import available_losses
from robust_dpo.ops import batch_layout, epilogue
from robust_dpo.ops.row_selection import RowSelection

pytestmark = pytest.mark.usefixtures("one_thread")

# Three to four chunks of 16 rows, and a group that is larger than a chunk.
SIZES = [2, 1, 4, 2]
AGGREGATIONS = {"mean": Mean(), "kl": KLRobust(lam=0.5), "radius": KLRobust(radius=0.2), "dr_dpo": DrDPO(beta=0.7)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    require_backend("triton")


def solve(problem: Problem, **options: Any) -> tuple[Tensor, list[Tensor]]:
    output = robust_dpo.linear_preference_loss(*problem.args, **problem.kwargs, chunk_bytes=1, **options)
    return output.loss.detach(), list(torch.autograd.grad(output.loss, list(problem.leaves.values())))


def exact(problem: Problem, robust: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    wide = problem.to(torch.float64)
    loss = reference.linear_preference_loss(*wide.args, **wide.kwargs, robust=robust, **options)
    leaves = list(wide.leaves.values())
    return loss.detach(), list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def assert_matches(problem: Problem, robust: Any, backend: str = "triton", **options: Any) -> None:
    dtype = problem.hidden.dtype
    tile = options.pop("tile_dtype", None)
    wanted, wanted_grads = exact(problem, robust, **options)
    loss, grads = solve(problem, robust=robust, backend=backend, tile_dtype=tile, **options)
    assert relative_error(loss, wanted) < TOLERANCE[dtype]
    for name, gradient, true in zip(problem.leaves, grads, wanted_grads, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, true) < TOLERANCE[dtype], name


@pytest.mark.parametrize("loss", available_losses())
def test_every_loss(loss: str) -> None:
    problem = make_problem(SIZES, scores=True, calibration=True, bias=True, reference="live").to(torch.float32)
    assert_matches(problem, KLRobust(lam=0.5), loss=loss)


@pytest.mark.parametrize("reference_kind", ["live", "cached"])
@pytest.mark.parametrize("robust", list(AGGREGATIONS))
def test_every_aggregation(robust: str, reference_kind: str) -> None:
    problem = make_problem(SIZES, calibration=True, reference=reference_kind).to(torch.float32)
    assert_matches(problem, AGGREGATIONS[robust], loss="ipo", beta=0.5)


@pytest.mark.parametrize("tile", [None, torch.float32], ids=["own", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, tile: torch.dtype | None) -> None:
    problem = make_problem([2, 2, 2], vocab=101, calibration=True).to(dtype)
    assert_matches(problem, KLRobust(lam=0.5), tile_dtype=tile, softcap=9.0, logit_scale=0.8)


def test_scores_that_grow_rescale_what_was_accumulated() -> None:
    problem = make_problem([2] * 6, longest=16, reference="cached").to(torch.float32)
    # Each pair is worse than the one before it by far more than e³⁰ of weight.
    problem.kwargs["ref_logps"] = torch.tensor([60.0, -60.0] * 6) * torch.arange(1, 7).repeat_interleave(2)
    assert_matches(problem, KLRobust(lam=0.3), loss="sigmoid", beta=0.5)


def test_the_kernel_is_used_and_a_loss_that_it_lacks_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for kind in (epilogue.NativeEpilogue, epilogue.AutogradEpilogue):
        call = kind.accumulate

        def spy(self: Any, *args: Any, call: Any = call, name: str = kind.__name__) -> None:
            used.append(name)
            call(self, *args)

        monkeypatch.setattr(kind, "accumulate", spy)
    problem = make_problem([2, 2], reference="cached").to(torch.float32)
    solve(problem, backend="triton")
    assert set(used) == {"NativeEpilogue"}
    used.clear()

    def own(groups: Any) -> Tensor:
        return -torch.nn.functional.logsigmoid(groups.log_ratios[:, 0] - groups.log_ratios[:, 1])

    solve(problem, backend="triton", loss=own)
    assert set(used) == {"AutogradEpilogue"}
    used.clear()
    # fp32 would make ties of scores that differ in float64.
    problem.kwargs["scores"] = torch.tensor([1.0, 1.0 + 1e-12, 2.0, 1.0], dtype=torch.float64)
    assert_matches(problem, Mean())
    assert set(used) == {"AutogradEpilogue"}


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("robust", ["kl", "radius"])
def test_rows_that_are_not_read_weigh_nothing(backend: str, robust: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU when the host knows the lengths: ignored rows are computed, and contents are not read."""
    require_backend(backend)

    class Unread(RowSelection):
        @staticmethod
        def begin(targets: Tensor, seq_lens: Tensor | None, vocab: int) -> RowSelection:
            return RowSelection(targets, seq_lens, vocab, None)

    problem = make_problem(SIZES, packed=True, calibration=True, bias=True).to(torch.float32)
    assert (problem.targets == -100).any()
    monkeypatch.setattr(batch_layout, "RowSelection", Unread)
    assert_matches(problem, AGGREGATIONS[robust], backend=backend)
    problem.kwargs["calibration"][1] = -1.0
    loss, _ = solve(problem, backend=backend, robust=AGGREGATIONS[robust])
    assert loss.isnan()


def test_sequence_logps_and_the_logits_route() -> None:
    problem = make_problem(SIZES, bias=False, packed=True).to(torch.float32)
    lens = problem.kwargs["seq_lens"]
    wanted, _ = reference.sequence_logps(problem.hidden.double() @ problem.weight.double().T, problem.targets, lens)
    logits = (problem.hidden @ problem.weight.T).detach().requires_grad_()
    routes = {
        "hidden": robust_dpo.sequence_logps(*problem.args, seq_lens=lens, backend="triton", chunk_bytes=1),
        "logits": robust_dpo.sequence_logps_from_logits(
            logits, problem.targets, seq_lens=lens, backend="triton", chunk_bytes=1
        ),
    }
    for name, logps in routes.items():
        assert relative_error(logps, wanted) < 1e-5, name
    factors = torch.randn(len(lens))
    (ours,) = torch.autograd.grad((routes["logits"] * factors).sum(), logits)
    exact_logits = logits.detach().double().requires_grad_()
    exact_logps, _ = reference.sequence_logps(exact_logits, problem.targets, lens)
    (true,) = torch.autograd.grad((exact_logps * factors).sum(), exact_logits)
    assert relative_error(ours, true) < 1e-5
