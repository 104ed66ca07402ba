"""The operators as custom ops: opcheck, and torch.compile around the public functions without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, make_problem, relative_error
from torch import Tensor

from robust_dpo import (
    Groups,
    KLRobust,
    linear_preference_loss,
    preference_loss,
    sequence_logps,
    sequence_logps_from_logits,
)
from robust_dpo.ops.objective import name_objective, named
from robust_dpo.robust import Mean, RobustObjective

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = torch.ops.robust_dpo


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def head_arguments(problem: Problem, objective: str, **changes: Any) -> tuple[Any, ...]:
    """Arguments of robust_dpo::linear_preference_loss, in its order."""
    kwargs = problem.kwargs
    names = ("bias", "ref_logps", "ref_hidden", "ref_weight", "ref_bias", "calibration", "scores", "log_normalizer")
    values = {
        "objective": objective,
        "softcap": None,
        "logit_scale": 1.0,
        "compute_dtype": problem.hidden.dtype,
        "tile_dtype": None,
        "usual_rows": 16,
        "max_rows": 16,
        "backend": "auto",
        "needs_hidden": problem.hidden.requires_grad,
        "needs_weight": problem.weight.requires_grad,
        "needs_bias": "bias" in kwargs and kwargs["bias"].requires_grad,
    } | changes
    grouping = (kwargs.get("seq_lens"), None, kwargs["group_sizes"])
    return (*problem.args, *grouping, *(kwargs.get(name) for name in names), *values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("loss", "robust"),
    [("sigmoid", Mean()), ("sigmoid", KLRobust(radius=0.1)), ("aot_unpaired", KLRobust())],
    ids=["one_pass", "two_passes", "coupled"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck_linear_preference_loss(packed: bool, loss: str, robust: RobustObjective, dtype: torch.dtype) -> None:
    objective = name_objective(loss, None, {}, robust, linear_preference_loss)
    live = make_problem([2, 3, 2], packed=packed, bias=True, calibration=True).to(dtype)
    # A backward pass that frees its graph scales the gradients of the one pass where they lie, and the last check
    # compares the operator's outputs, which nobody but opcheck holds, after it. The compiled tests below stand in.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if named(objective).tilt is not None:
        checks.pop()
    torch.library.opcheck(OPS.linear_preference_loss, head_arguments(live, objective), test_utils=checks)
    cached = make_problem([2, 2], reference="cached", scores=True).to(dtype)
    cached.weight.requires_grad_(False)
    torch.library.opcheck(OPS.linear_preference_loss, head_arguments(cached, objective, softcap=5.0), test_utils=checks)
    cached.hidden.requires_grad_(False)
    torch.library.opcheck(OPS.linear_preference_loss, head_arguments(cached, objective))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck_sequence_logps(packed: bool, entropy: bool, dtype: torch.dtype) -> None:
    problem = make_problem([2, 2], packed=packed, bias=True).to(dtype)
    inputs = (*problem.args, problem.kwargs.get("seq_lens"))
    settings = (problem.kwargs["bias"], 5.0, 0.5, dtype, None, 16, "auto")
    torch.library.opcheck(OPS.sequence_logps, (*inputs, *settings[:-1], 32, "auto", entropy))
    frozen = tuple(value.detach() if isinstance(value, Tensor) else value for value in (*inputs, *settings))
    grads = torch.randn(4), torch.randn(problem.targets.shape)
    for given in (grads, (grads[0], None), (None, grads[1])):
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            torch.library.opcheck(OPS.sequence_logps_backward, (*given, *frozen, *needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.usefixtures("logits_route")
def test_opcheck_logits_logps(packed: bool, entropy: bool, dtype: torch.dtype) -> None:
    problem = make_problem([2, 2], packed=packed)
    logits = torch.randn(*problem.targets.shape, 37).to(dtype).requires_grad_()
    arguments = (problem.targets, problem.kwargs.get("seq_lens"), 5.0, 0.5, 16, "auto")
    torch.library.opcheck(OPS.logits_logps, (logits, *arguments, entropy))
    *_, known = OPS.logits_logps(logits.detach(), *arguments, entropy)
    grads = torch.randn(4), torch.randn(problem.targets.shape)
    for given in (grads, (grads[0], None), (None, grads[1])):
        torch.library.opcheck(OPS.logits_logps_backward, (*given, known, logits.detach(), *arguments))


def softplus_loss(groups: Groups, *, beta: float = 0.1, gap: float = 0.0) -> Tensor:
    """A user's own loss."""
    ratios = groups.log_ratios
    return torch.nn.functional.softplus(gap - beta * (ratios[:, 0] - ratios[:, 1]))


def agree(function: Callable[..., Tensor], leaves: list[Tensor], *calls: dict[str, Any], backend: str) -> None:
    """Compiled without a break, the function gives the loss and gradients that it gives in eager mode."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for call in calls:
        eager, fast = function(**call), compiled(**call)
        assert relative_error(fast, eager) < 1e-6
        one, two = (torch.autograd.grad(loss, leaves) for loss in (fast, eager))
        for left, right in zip(one, two, strict=True):
            assert relative_error(left, right) < 1e-5


def scaled_loss(factor: float) -> Callable[[Groups], Tensor]:
    """Losses that share their code and differ in what they close over."""
    return lambda groups: factor * groups.log_ratios[:, 1]


@pytest.mark.parametrize("operator", ["head", "vectors"])
def test_functions_of_the_same_code_are_told_apart(operator: str) -> None:
    problem = make_problem([2, 2], reference="cached").to(torch.float64)
    logps = -torch.rand(4, dtype=torch.float64)

    def value(loss: Callable[[Groups], Tensor]) -> Tensor:
        if operator == "head":
            return linear_preference_loss(*problem.args, loss=loss, **problem.kwargs | {"group_sizes": None}).loss
        return preference_loss(logps, problem.kwargs["ref_logps"], loss=loss).loss

    compiled = torch.compile(value, fullgraph=True, backend="eager")
    if torch.__version__ < "2.13":
        with pytest.raises(Exception, match="closes over nothing"):
            compiled(scaled_loss(1.0))
        return
    for factor in (1.0, 2.0, -3.0):
        loss = scaled_loss(factor)
        assert relative_error(compiled(loss), value(loss)) < 1e-12


BETAS = [{"beta": beta} for beta in (0.1, 0.2, 0.35, 0.5)]


def head_loss(problem: Problem, **options: Any) -> Callable[..., Tensor]:
    def loss(**more: Any) -> Tensor:
        # A step of a model's own on both sides, so that the operator sits inside the graph.
        hidden = torch.tanh(problem.hidden)
        output = linear_preference_loss(hidden, problem.weight, problem.targets, **problem.kwargs, **options, **more)
        return 2 * output.loss + 0 * output.weights.sum()

    return loss


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", ["sigmoid", "aot_unpaired", softplus_loss], ids=["built_in", "coupled", "users"])
@pytest.mark.parametrize("robust", [KLRobust(lam=0.5), "kl_radius"], ids=["one_pass", "two_passes"])
def test_linear_preference_loss(robust: Any, loss: Any, packed: bool) -> None:
    problem = make_problem([2, 2, 2], packed=packed, bias=True, calibration=True).to(torch.float32)
    function = head_loss(problem, loss=loss, robust=robust, chunk_bytes=1)
    agree(function, list(problem.leaves.values()), *BETAS, backend="aot_eager")


def test_an_option_that_changes() -> None:
    problem = make_problem([2, 2]).to(torch.float32)
    function = head_loss(problem, loss=softplus_loss)
    agree(function, list(problem.leaves.values()), *({"gap": gap} for gap in (0.0, 0.5, 1.5)), backend="aot_eager")


@pytest.mark.parametrize("entropy", [False, True])
def test_sequence_logps(entropy: bool) -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float32)

    def function() -> Tensor:
        hidden = torch.tanh(problem.hidden)
        result = sequence_logps(
            hidden, problem.weight, problem.targets, bias=problem.kwargs["bias"], per_token=True, entropy=entropy
        )
        return result.logps.square().sum() + result.token_logps.sin().sum()

    agree(function, list(problem.leaves.values()), {}, backend="aot_eager")


def test_sequence_logps_from_logits() -> None:
    problem = make_problem([2, 2])
    logits = torch.randn(*problem.targets.shape, 37, requires_grad=True)

    def function() -> Tensor:
        return sequence_logps_from_logits(torch.tanh(logits), problem.targets, softcap=3.0).square().sum()

    agree(function, [logits], {}, backend="aot_eager")


@pytest.mark.parametrize(
    ("loss", "robust"),
    [("sigmoid", "mean"), ("plackett_luce", KLRobust(lam=0.5)), ("aot", "kl"), (softplus_loss, "kl")],
    ids=["built_in-default", "listwise-object", "coupled-name", "users-name"],
)
def test_preference_loss(loss: Any, robust: Any) -> None:
    logps, ref_logps, calibration = torch.randn(6, requires_grad=True), torch.randn(6), torch.rand(3)

    def function(**options: Any) -> Tensor:
        return preference_loss(
            logps.sin(), ref_logps, loss=loss, robust=robust, calibration=calibration, **options
        ).loss

    agree(function, [logps], *BETAS, backend="aot_eager")


@pytest.mark.slow
def test_inductor() -> None:
    problem = make_problem([2, 2], bias=True).to(torch.float32)
    agree(head_loss(problem), list(problem.leaves.values()), *BETAS[:2], backend="inductor")
