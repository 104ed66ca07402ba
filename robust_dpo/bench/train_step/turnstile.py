"""Where a training loop waits after each step until it is asked for the next one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from robust_dpo.bench.memory import PeakMeter, bytes_in_use


@dataclass(frozen=True)
class Passage:
    """What the loop reports of a step: from being let go to having arrived again.

    Args:
        seconds: on the clock.
        cpu_seconds: of all threads of the process; on a busy machine they say more, where the threads do not spin.
        loss: of the step.
    """

    seconds: float
    cpu_seconds: float
    loss: float


class Turnstile:
    """Called by the loop after every step; hands over its time and its loss, and lets it go on when it is told to.

    Memory is metered from the last untimed step on.

    Args:
        connection: to the process that asks.
        device: of the model.
        warmups: steps before the meter starts.
    """

    def __init__(self, connection: Connection, device: torch.device, warmups: int) -> None:
        self._connection, self._device, self._warmups = connection, device, warmups
        self._passages = 0
        self._meter = PeakMeter(device)
        self.resident = 0
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def __call__(self, loss: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds, cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        self._passages += 1
        if self._passages == self._warmups:
            self.resident = bytes_in_use(self._device)
            self._meter.start()
        self._connection.send(Passage(seconds, cpu_seconds, float(loss)))
        if not self._connection.recv():
            raise SystemExit("the comparison ended before the training did")
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def peak(self) -> tuple[int, str] | None:
        """Highest memory of the process since the last untimed step, and how it was taken."""
        return self._meter.stop()
