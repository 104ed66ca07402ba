"""Losses by name, and a loss bound to its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robust_dpo.checks import FINITE, POSITIVE, Interval, check_flag, check_number
from robust_dpo.errors import argument_error, type_error
from robust_dpo.groups import Groups

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class BoundLoss:
    """A loss with its options, ready to be called on groups.

    Args:
        name: the registered name, or the name of the user's function.
        function: `function(groups, **arguments) -> [G]`.
        arguments: keyword arguments in a fixed order: beta, where the loss has one, and the options.
        needs_reference: the loss reads log-ratios. False for a user's function that does not say
            so in an attribute `needs_reference`; one that reads them all the same fails when it does.
        needs_scores: the loss reads the values of the scores, not only their order.
        built_in: `function` comes from the registry.
        couples_groups: the loss of a group depends on other groups of the batch: it is computed over the whole batch
            at once. False for a user's function that does not say so in an attribute `couples_groups`.
    """

    name: str
    function: LossFunction
    arguments: tuple[tuple[str, Any], ...]
    needs_reference: bool
    needs_scores: bool
    built_in: bool
    couples_groups: bool = False

    @property
    def key(self) -> str:
        """What identifies the loss: name and arguments, and for a user's function also the object."""
        arguments = ",".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.name}({arguments})" + ("" if self.built_in else f"@{id(self.function):x}")

    def check_given(self, *, reference: bool, scores: bool) -> None:
        """Refuse groups that lack what the loss needs.

        Args:
            reference: whether there is one.
            scores: whether there are any.

        Raises:
            ValueError: something is missing.
        """
        if self.needs_reference and not reference:
            raise argument_error("ref_logps", f"a reference, which the loss {self.name!r} needs", None)
        if self.needs_scores and not scores:
            raise argument_error("scores", f"scores of the responses, which the loss {self.name!r} needs", None)

    def __call__(self, groups: Groups) -> Tensor:
        """Loss of each group, [G], in the dtype of the log-probs.

        Raises:
            ValueError: the groups lack the reference or the scores that the loss needs, or the result is not [G].
            TypeError: the function did not return a floating tensor.
        """
        self.check_given(reference=groups.ref_logps is not None, scores=groups.scores is not None)
        losses = self.function(groups, **dict(self.arguments))
        if not isinstance(losses, Tensor):
            raise type_error("loss", f"a floating tensor [G] from {self.name!r}", losses)
        if not losses.is_floating_point():
            raise TypeError(f"loss: expected a floating tensor [G] from {self.name!r}, got {losses.dtype}")
        if losses.shape != groups.logps.shape[:1]:
            expected = f"shape {list(groups.logps.shape[:1])}, one value per group, from {self.name!r}"
            raise argument_error("loss", expected, list(losses.shape))
        return losses


class UnknownOption(TypeError):
    """Options that a loss does not have.

    Args:
        loss: its name.
        unknown: options that were given and are not among
        accepted: those that it has.
    """

    def __init__(self, loss: str, unknown: Sequence[str], accepted: Sequence[str]) -> None:
        self.unknown, self.accepted = tuple(unknown), tuple(accepted)
        expected = f"one of {', '.join(accepted)}" if accepted else "none"
        super().__init__(f"options of loss {loss!r}: expected {expected}, got {', '.join(unknown)}")


@dataclass(frozen=True)
class _Registered:
    function: LossFunction
    needs_reference: bool
    needs_scores: bool
    couples_groups: bool
    ranges: Mapping[str, Interval]


_LOSSES: dict[str, _Registered] = {}


def register_loss(
    name: str,
    *,
    needs_reference: bool = True,
    needs_scores: bool = False,
    couples_groups: bool = False,
    **ranges: Interval,
) -> Callable[[LossFunction], LossFunction]:
    """Make `fn(groups, *, beta=…, **options) -> [G]` available under `name`.

    Every keyword argument of `fn` needs a default, a bool or a float; it is the option's default and its type.
    `beta` must be positive and other numbers finite, unless `ranges` has an `Interval` of the option's name.

    Args:
        name: what `loss=` calls it.
        needs_reference: the loss reads log-ratios.
        needs_scores: the loss reads the values of the scores, not only their order.
        couples_groups: the loss of a group depends on other groups of the batch: it is computed over the whole batch
            at once.
        **ranges: allowed values by option.

    Raises:
        ValueError: the name is taken.
        TypeError: an option of `fn` has no default.
    """
    if name in _LOSSES:
        raise argument_error("name", "a name that is not registered yet", repr(name))

    def decorate(function: LossFunction) -> LossFunction:
        bare = [option.name for option in _keywords(function) if option.default is option.empty]
        if bare:
            raise TypeError(f"loss {name!r}: expected a default for every option, got none for {', '.join(bare)}")
        limits = {"beta": POSITIVE, **ranges}
        _LOSSES[name] = _Registered(function, needs_reference, needs_scores, couples_groups, limits)
        return function

    return decorate


def available_losses() -> tuple[str, ...]:
    """Names that `loss=` accepts, in alphabetical order."""
    return tuple(sorted(_LOSSES))


def resolve(
    loss: str | LossFunction | BoundLoss, beta: float | None = None, options: Mapping[str, Any] | None = None
) -> BoundLoss:
    """Bind a loss to its options and check them.

    Args:
        loss: a registered name, a function `fn(groups, ...) -> [G]`, or a bound loss, which is returned as it is.
        beta: scale of the implicit reward; None takes the loss's own default. Losses without a `beta`
            (`rrhf`, `lire`, `sft`, or a function whose signature has none) are not given it.
        options: the loss's further keyword arguments by name.

    Raises:
        ValueError: no loss has that name, or a value is out of its range.
        TypeError: `loss` cannot be called, or a value is of the wrong type.
        UnknownOption: the loss has no option of that name (a TypeError).
    """
    options = dict(options or {})
    if beta is not None:
        check_number("beta", beta, POSITIVE)
    if isinstance(loss, BoundLoss):
        if beta is not None or options:
            raise argument_error("loss", "no beta or options beside a loss that is already bound", loss.key)
        return loss
    if isinstance(loss, str):
        return _resolve_name(loss, beta, options)
    if not callable(loss):
        raise type_error("loss", "a name or a function Groups -> [G]", loss)
    return _resolve_function(loss, beta, options)


def _resolve_name(name: str, beta: float | None, options: dict[str, Any]) -> BoundLoss:
    if name not in _LOSSES:
        raise argument_error("loss", f"one of {', '.join(available_losses())}, or a function", repr(name))
    entry = _LOSSES[name]
    defaults = {option.name: option.default for option in _keywords(entry.function)}
    _refuse_unknown(name, options, [option for option in defaults if option != "beta"])
    given = {"beta": beta, **options} if beta is not None and "beta" in defaults else options
    arguments: list[tuple[str, Any]] = []
    for option, default in defaults.items():
        value = given.get(option, default)
        if isinstance(default, bool):
            arguments.append((option, check_flag(option, value)))
        else:
            arguments.append((option, check_number(option, value, entry.ranges.get(option, FINITE))))
    return BoundLoss(
        name,
        entry.function,
        tuple(arguments),
        entry.needs_reference,
        entry.needs_scores,
        built_in=True,
        couples_groups=entry.couples_groups,
    )


def _resolve_function(function: LossFunction, beta: float | None, options: dict[str, Any]) -> BoundLoss:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    keywords = _keywords(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(function))
    accepted = [option.name for option in keywords]
    if not takes_any:
        _refuse_unknown(name, options, [option for option in accepted if option != "beta"])
    arguments = dict(options)
    if beta is not None and (takes_any or "beta" in accepted):
        arguments["beta"] = beta
    missing = [p.name for p in keywords if p.default is p.empty and p.name not in arguments]
    if missing:
        raise TypeError(f"loss: expected a value for every option of {name!r}, got none for {', '.join(missing)}")
    return BoundLoss(
        name,
        function,
        tuple(sorted(arguments.items())),
        bool(getattr(function, "needs_reference", False)),
        bool(getattr(function, "needs_scores", False)),
        built_in=False,
        couples_groups=bool(getattr(function, "couples_groups", False)),
    )


def _parameters(function: LossFunction) -> list[inspect.Parameter]:
    """What `function` takes after the groups."""
    # A module's own signature is (*args, **kwargs); what it accepts stands on its forward.
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError as error:
        raise type_error("loss", "a function whose signature can be read", function) from error
    return list(signature.parameters.values())[1:]


def _keywords(function: LossFunction) -> list[inspect.Parameter]:
    return [p for p in _parameters(function) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _refuse_unknown(name: str, options: Mapping[str, Any], accepted: list[str]) -> None:
    unknown = [option for option in options if option not in accepted]
    if unknown:
        raise UnknownOption(name, unknown, accepted)
