"""Aggregations by name, and the published modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from robust_dpo.errors import argument_error, type_error
from robust_dpo.robust.base import RobustObjective

Factory = TypeVar("Factory", bound=Callable[[], RobustObjective])

_OBJECTIVES: dict[str, Callable[[], RobustObjective]] = {}


def register_objective(name: str) -> Callable[[Factory], Factory]:
    """Make `factory()`, an objective with its default parameters, available under `name`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _OBJECTIVES:
        raise argument_error("name", "a name that is not registered yet", repr(name))

    def decorate(factory: Factory) -> Factory:
        _OBJECTIVES[name] = factory
        return factory

    return decorate


def available_objectives() -> tuple[str, ...]:
    """Names that `robust=` accepts, in alphabetical order."""
    return tuple(sorted(_OBJECTIVES))


def resolve(robust: str | RobustObjective) -> RobustObjective:
    """The objective itself, or the one of that name with its default parameters.

    Raises:
        ValueError: no objective has that name.
        TypeError: it is neither a name nor an objective.
    """
    if isinstance(robust, RobustObjective):
        return robust
    if not isinstance(robust, str):
        raise type_error("robust", "a name or a RobustObjective", robust)
    if robust not in _OBJECTIVES:
        expected = f"one of {', '.join(available_objectives())}, or a RobustObjective"
        raise argument_error("robust", expected, repr(robust))
    return _OBJECTIVES[robust]()
