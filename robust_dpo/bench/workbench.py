"""What the cases of a run share: device, time, problems, and what to measure."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from robust_dpo.bench.implementation import Implementation
from robust_dpo.bench.problem import Problem, Shape, make_problem
from robust_dpo.bench.solution import TokenLogps, exact_dtype, token_logps
from robust_dpo.bench.timing import Stopwatch


class DeviceLost(RuntimeError):
    """The device can no longer be used by this process.

    Args:
        case: that was measured.
        row: the implementation that did it.
        reason: its own error.
    """

    def __init__(self, case: str, row: str, reason: str) -> None:
        self.case, self.row, self.reason = case, row, reason
        super().__init__(f"{case}: {row}: {reason}")


@dataclass
class Workbench:
    """Handed to every case.

    Args:
        device: where to measure.
        implementations: of the head, those that can be imported and were asked for.
        rounds: of every comparison, if there is time.
        patience: seconds of a comparison after which three rounds are enough.
        deadline: on time.monotonic(), when measuring must stop.
        seed: of all data.
        log: prints a line.
        announce: told (case, row) before each candidate is opened, so that a crash can be blamed on it.
        crashes: (case, row) -> why, of those that took a process down before and are not tried again.
    """

    device: torch.device
    implementations: Sequence[Implementation]
    rounds: int = 10
    patience: float = float("inf")
    deadline: float = float("inf")
    seed: int = 0
    log: Callable[[str], None] = lambda line: None
    announce: Callable[[str, str], None] = lambda case, row: None
    crashes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    stopwatch: Stopwatch = field(init=False)
    _made: tuple[tuple[Shape, torch.dtype], Problem, TokenLogps] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)

    @property
    def remaining(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory that nobody holds back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def problem(self, shape: Shape, dtype: torch.dtype) -> tuple[Problem, TokenLogps]:
        """A problem with a live reference and its exact log-probs; the last one is kept, for cases that share it."""
        if self._made is None or self._made[0] != (shape, dtype):
            self._made = None
            self.release()
            problem = make_problem(shape, dtype, self.seed, self.device)
            self._made = (shape, dtype), problem, token_logps(problem, exact_dtype(self.device))
        return self._made[1], self._made[2]
