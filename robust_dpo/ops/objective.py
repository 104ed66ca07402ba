"""A loss and a robust aggregation, and the derivative that the chunked head needs of them."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_dpo import losses
from robust_dpo.errors import argument_error
from robust_dpo.groups import GroupLayout, Groups
from robust_dpo.ops.precision import exact_dtype
from robust_dpo.robust import ExponentialTilt, RobustObjective, Solution
from robust_dpo.robust import resolve as resolve_robust

Loss = str | Callable[..., Tensor] | losses.BoundLoss


@dataclass(frozen=True)
class Objective:
    """What is minimised: a group loss and how the groups' losses become one value."""

    loss: losses.BoundLoss
    robust: RobustObjective

    @staticmethod
    def resolve(
        loss: Loss, beta: float | None, options: Mapping[str, Any], aggregation: str | RobustObjective
    ) -> Objective:
        return Objective(losses.resolve(loss, beta, options), resolve_robust(aggregation))

    @property
    def key(self) -> str:
        return f"{self.loss.key}|{self.robust.key}"

    @property
    def tilt(self) -> ExponentialTilt | None:
        """The aggregation, where gradients of some groups can be accumulated before the others are known."""
        robust = self.robust
        if isinstance(robust, ExponentialTilt) and robust.single_pass and not self.loss.couples_groups:
            return robust
        return None

    def solve(self, group_losses: Tensor, calibration: Tensor | None, log_normalizer: Tensor | None) -> Solution:
        """The aggregation of group losses [G] in float64, given in their dtype but for `log_partition`.

        Raises:
            ValueError: there is a `log_normalizer`, and the losses of a part of a batch are not those of the batch.
        """
        if log_normalizer is not None and self.loss.couples_groups:
            expected = f"None: the loss {self.loss.name!r} couples the groups of a batch, give the whole batch"
            raise argument_error("log_normalizer", expected, log_normalizer)
        exact, dtype = exact_dtype(group_losses.device), group_losses.dtype
        wide = None if calibration is None else calibration.to(exact)
        solution = self.robust.solve(group_losses.detach().to(exact), wide, log_normalizer)
        return Solution(
            value=solution.value.to(dtype),
            weights=solution.weights.to(dtype),
            coefficients=solution.coefficients.to(dtype),
            parameter=solution.parameter.to(dtype),
            log_partition=solution.log_partition,
        )


@dataclass(frozen=True)
class Responses:
    """Flat vectors [S] of what the losses read; `ref_logps` and `scores` may be missing."""

    logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None
    scores: Tensor | None

    def part(self, select: slice) -> Responses:
        """Some consecutive responses."""
        return Responses(
            self.logps[select],
            self.lengths[select],
            None if self.ref_logps is None else self.ref_logps[select],
            None if self.scores is None else self.scores[select],
        )


def group_responses(responses: Responses, layout: GroupLayout) -> Groups:
    """Pad flat responses to [G, K]. Lengths count at least 1, so that an empty response divides by no zero."""
    dtype = responses.logps.dtype
    return Groups(
        logps=layout.pad(responses.logps),
        lengths=layout.pad(responses.lengths.to(dtype).clamp(min=1), fill=1.0),
        mask=layout.mask,
        ref_logps=None if responses.ref_logps is None else layout.pad(responses.ref_logps.to(dtype)),
        scores=None if responses.scores is None else layout.pad(responses.scores),
    )


# From coefficients c [G] of the group losses to ∂(Σ c·ℓ)/∂logp of every response [S].
PullBack = Callable[[Tensor], Tensor]


def group_epilogue(objective: Objective, responses: Responses, layout: GroupLayout) -> tuple[Tensor, PullBack]:
    """Group losses ℓ [G], detached, and what takes their coefficients back to the responses, once.

    The derivative is autograd's on these few numbers, so every differentiable function of `Groups` will do.
    """
    with _autograd_inside_operator():
        logps = responses.logps.detach().requires_grad_()
        live = Responses(logps, responses.lengths, responses.ref_logps, responses.scores)
        group_losses = objective.loss(group_responses(live, layout))

    def pull_back(coefficients: Tensor) -> Tensor:
        if not group_losses.requires_grad:
            return torch.zeros_like(logps)
        with _autograd_inside_operator():
            given = coefficients.to(group_losses.dtype)
            # A loss may ignore the log-probs and still have a graph, of a parameter of its own.
            (derivative,) = torch.autograd.grad(group_losses, logps, given, allow_unused=True, materialize_grads=True)
        return derivative

    return group_losses.detach().to(logps.dtype, copy=True), pull_back


@contextmanager
def _autograd_inside_operator() -> Iterator[None]:
    """Autograd for code inside a custom op, where the dispatcher has excluded its keys for this thread."""
    with ExitStack() as stack:
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


# Custom ops take tensors, numbers and strings, so an objective travels into them by name. An entry lives for one call;
# those of compiled graphs, which call again and again with the key that they were traced with, stay.
_NAMED: dict[str, Objective] = {}
_CALLS = itertools.count()
# The torch that recompiles for a function of another identity; 2.11 looks at its code only.
_GUARDS_IDENTITY = "2.13"


def name_objective(
    loss: Loss,
    beta: float | None,
    options: Mapping[str, Any],
    aggregation: str | RobustObjective,
    caller: Callable[..., object],
) -> str:
    """Check an objective and give it the name that `named` knows it by, until `forget`.

    `caller` took the options beside arguments of its own, one of which may have been meant by an unknown option.
    """
    if torch.compiler.is_compiling():
        names = tuple(options)
        # The identity is a guard: functions that differ only in what they close over share their code.
        identity = id(loss) if callable(loss) else 0
        values = tuple(_encode(options[option]) for option in names)
        kind, fields, settings = _taken_apart(aggregation)
        graph_name: str = _name_for_graph(loss, identity, _encode(beta), names, values, kind, fields, settings)
        return graph_name
    try:
        objective = Objective.resolve(loss, beta, options, aggregation)
    except losses.UnknownOption as error:
        raise TypeError(f"{error}{_other_meaning(error, caller)}") from None
    name = f"{objective.key}#{next(_CALLS)}"
    _NAMED[name] = objective
    return name


def _other_meaning(error: losses.UnknownOption, caller: Callable[..., object]) -> str:
    """What an unknown option may have been meant to be: an argument of `caller`, or an option misspelt."""
    parameters = inspect.signature(caller).parameters.values()
    known = [*error.accepted, *(each.name for each in parameters if each.kind is not each.VAR_KEYWORD)]
    near = [match for name in error.unknown for match in difflib.get_close_matches(name, known, n=2)]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f" ({caller.__name__} has no such argument either{meant})"


def named(name: str) -> Objective:
    """The objective of that name."""
    return _NAMED[name]


def forget(name: str) -> None:
    """Let go of an objective after its call; compiled graphs keep theirs."""
    if not torch.compiler.is_compiling():
        del _NAMED[name]


def refuse_parameters(loss: Loss) -> None:
    """A loss with parameters to train needs autograd all the way, which the fused operator does not give it."""
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        expected = "a loss without trainable parameters; preference_loss(sequence_logps(...)) trains them"
        raise argument_error("loss", expected, type(loss).__name__)


@torch._dynamo.assume_constant_result
def _name_for_graph(
    loss: Loss,
    identity: int,
    beta: Any,
    names: tuple[str, ...],
    values: tuple[Any, ...],
    aggregation: Any,
    fields: tuple[str, ...],
    settings: tuple[Any, ...],
) -> str:
    """The same while torch.compile traces, which takes the result for a constant.

    Numbers come in as `_encode` writes them: torch.compile makes symbols of floats that change, and a constant cannot
    be taken from a symbol.
    """
    if torch.__version__ < _GUARDS_IDENTITY and getattr(loss, "__closure__", None) is not None:
        expected = "under torch.compile, a function that closes over nothing (give its numbers as options)"
        raise argument_error("loss", expected, f"a closure, which torch {torch.__version__} does not tell from others")
    options = {name: _decode(value) for name, value in zip(names, values, strict=True)}
    if isinstance(aggregation, type):
        aggregation = aggregation(**{field: _decode(value) for field, value in zip(fields, settings, strict=True)})
    objective = Objective.resolve(loss, _decode(beta), options, aggregation)
    # A user's function is kept alive here, so that its identity stays its own.
    _NAMED.setdefault(objective.key, objective)
    return objective.key


def _taken_apart(aggregation: Any) -> tuple[Any, tuple[str, ...], tuple[Any, ...]]:
    """A dataclass as its class and fields: torch.compile cannot make a constant of every object."""
    if not is_dataclass(aggregation):
        return aggregation, (), ()
    kind: Any = type(aggregation)
    fields = tuple(kind.__dataclass_fields__)
    return kind, fields, tuple(_encode(getattr(aggregation, field)) for field in fields)


def _encode(value: Any) -> Any:
    """A number as `("float", hex)`, which torch.compile keeps a constant; anything else as it is."""
    return ("float", value.hex()) if isinstance(value, float) else value


def _decode(value: Any) -> Any:
    return float.fromhex(value[1]) if isinstance(value, tuple) and value[:1] == ("float",) else value
