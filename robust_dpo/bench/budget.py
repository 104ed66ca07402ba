"""Time that a run may take, and the ways to keep to it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# Kept free at the end for tables and plots, but never more than a tenth of the whole.
_MARGIN_SECONDS = 20.0
_MARGIN_SHARE = 0.1


class OutOfTime(BaseException):
    """The time is up in the middle of a case.

    No `Exception`: it has to pass through the handlers of whatever library it interrupts.
    """


def minutes_for(seconds: float) -> int:
    """Whole minutes that a run must be given for so many seconds of measuring."""
    return math.ceil(min(seconds / (1 - _MARGIN_SHARE), seconds + _MARGIN_SECONDS) / 60)


class Budget:
    """Minutes from now on.

    Args:
        minutes: of the whole run.
        margin_seconds: kept for what comes after the last case; None for 20 seconds, at most a tenth of the whole.
    """

    def __init__(self, minutes: float, margin_seconds: float | None = None) -> None:
        seconds = 60 * minutes
        margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * seconds) if margin_seconds is None else margin_seconds
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.deadline = self.end - margin

    @property
    def remaining(self) -> float:
        """Seconds until measuring must stop; negative afterwards."""
        return self.deadline - time.monotonic()

    @property
    def minutes_left(self) -> float:
        """Of the whole, margin included."""
        return max(0.0, self.end - time.monotonic()) / 60

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise `OutOfTime` in the block when the time is up, also in the middle of a compilation.

        Only in the main thread, and where the system has alarms; elsewhere the block runs to its end.
        """
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(number: int, frame: FrameType | None) -> None:
            raise OutOfTime

        if self.remaining <= 0:
            raise OutOfTime
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.remaining)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Pace:
    """How long a case will take, from the case of its group that was most like it."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, float]]] = {}

    def learn(self, group: str, cost: float, seconds: float) -> None:
        self._seen.setdefault(group, []).append((max(cost, 1.0), seconds))

    def expect(self, group: str, cost: float) -> float:
        """Seconds; 0 for a group that was never seen: then it is tried, and the alarm stands by.

        More cost takes longer in proportion; less cost may be set-up that does not shrink, so it is taken as long.
        """
        cost = max(cost, 1.0)
        seen = self._seen.get(group, [])
        known, seconds = min(seen, key=lambda entry: abs(math.log(cost / entry[0])), default=(1.0, 0.0))
        return seconds * max(1.0, cost / known)
