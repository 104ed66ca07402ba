"""Seconds of one call, and of several calls taken in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# The least that a median with a spread is made of.
MEDIAN_OF = 3
# More than any L2 cache (H100: 50 MB, B200: 126 MB): after it is read nothing of a call's inputs is left there, and
# what was written before is in memory. To write it would leave lines that are written back during the call.
_FLUSH_BYTES = 256 << 20
# For which the GPU is kept busy before a call, 1 ms at 2 GHz: in that time the CPU submits it.
_HEAD_START_CYCLES = 2_000_000


@dataclass(frozen=True)
class Run:
    """Something to time.

    Args:
        call: the timed part.
        prepare: called before each timed call, outside of the time: restores what the call overwrites.
        finish: called after it, outside of the time: lets go of results.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None
    finish: Callable[[], object] | None = None


def waiting(call: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """The same call, which returns when the device is done with it: for clocks that know nothing of devices."""
    if device.type != "cuda":
        return call

    def run() -> T:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return run


class Stopwatch:
    """Times calls on one device.

    On a GPU between two events on the current stream. Before the first one the L2 cache is flushed and the GPU kept
    busy for a millisecond in which the CPU submits the call, so that the time is the device's: launch overhead is part
    of it only where a call waits for the device, or takes a millisecond longer to submit than to run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.ones(_FLUSH_BYTES // 4, device=device)

    def seconds(self, run: Run) -> float:
        """Of one call."""
        if run.prepare is not None:
            run.prepare()
        seconds = self._wall(run.call) if self._flush is None else self._between_events(run.call, self._flush)
        if run.finish is not None:
            run.finish()
        return seconds

    def _wall(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _between_events(self, call: Callable[[], object], flush: Tensor) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.amax()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3


def in_turns(
    runs: Mapping[str, Run],
    stopwatch: Stopwatch,
    *,
    rounds: int,
    enough: float = math.inf,
    deadline: float = math.inf,
    warmups: int = 1,
    clock: Callable[[], float] = time.monotonic,
    seconds: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run in each of up to `rounds` rounds, after untimed ones.

    Each round starts one place later than the one before, so that drift and noise of the machine fall on all alike.

    Args:
        runs: by name.
        stopwatch: of their device.
        rounds: at most.
        enough: on `clock`, when three rounds are enough, and no more are warmed up for.
        deadline: on `clock`, when no round begins but the first.
        warmups: untimed rounds.
        clock: of the two times.
        seconds: filled in as the rounds go, for a caller that is interrupted; a new one otherwise.
    """
    seconds = {} if seconds is None else seconds
    order = list(runs)
    for _ in range(warmups):
        if clock() >= min(enough, deadline):
            break
        for run in runs.values():
            stopwatch.seconds(run)
    seconds.update({name: [] for name in order})
    for turn in range(rounds):
        if turn and clock() >= (deadline if turn < MEDIAN_OF else min(enough, deadline)):
            break
        first = turn % len(order) if order else 0
        for name in order[first:] + order[:first]:
            seconds[name].append(stopwatch.seconds(runs[name]))
    return seconds
