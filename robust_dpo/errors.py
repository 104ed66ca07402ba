"""The one way to refuse input: every message names the argument, what was expected and what came."""

from __future__ import annotations

from pathlib import Path


def argument_error(argument: str, expected: str, got: object) -> ValueError:
    """The error for a value of the right type that cannot be used."""
    return ValueError(f"{argument}: expected {expected}, got {got}")


def type_error(argument: str, expected: str, got: object) -> TypeError:
    """The error for a value of the wrong type; names the type of `got`."""
    return TypeError(f"{argument}: expected {expected}, got {type(got).__name__}")


class DataError(ValueError):
    """Something in a data file cannot be used; the message starts with `file:line:` where both are known."""

    def __init__(self, reason: str, *, path: str | Path | None = None, line: int | None = None) -> None:
        self.reason, self.path, self.line = reason, path, line
        place = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(place + reason)
