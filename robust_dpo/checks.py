"""Numbers and flags that a caller sets, checked against their range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from robust_dpo.errors import argument_error, type_error


@dataclass(frozen=True)
class Interval:
    """Finite numbers between `low` and `high`; an end is excluded where it is open or infinite."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        # Comparisons, not math.isfinite: torch.compile traces them for floats that it has made symbolic.
        return -math.inf < value < math.inf and above and below

    def __str__(self) -> str:
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"


FINITE = Interval()
POSITIVE = Interval(low=0.0, low_open=True)
NON_NEGATIVE = Interval(low=0.0)


def check_number(name: str, value: object, interval: Interval) -> float:
    """`value` as a float.

    Raises:
        TypeError: it is not a real number (a bool is none).
        ValueError: it is not finite or outside `interval`.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise type_error(name, str(interval), value)
    if float(value) not in interval:
        raise argument_error(name, str(interval), value)
    return float(value)


def check_flag(name: str, value: object) -> bool:
    """`value` if it is a bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise type_error(name, "True or False", value)
    return value
