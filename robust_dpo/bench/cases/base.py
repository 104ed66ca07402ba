"""What every kind of case has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robust_dpo.bench.compare import Candidate, Opened
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench
from robust_dpo.dispatch import backends, choose_backend

# Far above rounding, far below a wrong result, for kernels that are given their logits: fp32 arithmetic, and gradients
# rounded once to their own dtype.
KERNEL_LIMIT = 1e-4
GRADIENT_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Case(ABC):
    """One entry of the suite."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique, and the key under which a resumed run finds the record: everything that matters is in it."""

    @property
    @abstractmethod
    def group(self) -> str:
        """Kind of case; what a case costs is learnt from others of its group."""

    @property
    @abstractmethod
    def cost(self) -> float:
        """Operations or bytes, in the unit of the group."""

    @abstractmethod
    def measure(self, bench: Workbench) -> Record:
        """Check, time, and write down."""

    def wants(self, bench: Workbench) -> list[str]:
        """Rows that a complete record has for what is asked for, where that can change between runs."""
        return []


def backends_for(operator: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Name -> detail of every backend that runs an operator here, the one that `auto` takes first."""
    found = {}
    for status in backends().backends:
        try:
            choose_backend(operator, status.name, device, dtype)
        except RuntimeError:
            continue
        # Triton's interpreter is for tests: a thousand times slower than what it stands for.
        if "interpreted" not in status.detail:
            found[status.name] = status.detail
    return found


def copy_floor(traffic: float, like: Tensor, spare: Tensor) -> Candidate:
    """A copy from `like` to `spare` that moves `traffic` bytes (reads and writes), as the floor of a kernel.

    Args:
        traffic: bytes; at most what a whole number of copies moves, the last one of a part.
        like: contiguous source.
        spare: destination of the same size.
    """
    source, target = like.view(-1).view(torch.uint8), spare.view(-1).view(torch.uint8)
    whole, rest = divmod(int(traffic) // 2, source.numel())

    def call() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    def open_() -> Opened:
        call()
        return Opened(Run(call), {})

    row = Row("copy", Role.FLOOR, note="the same traffic")
    return Candidate(row, open_, {}, takes_memory=False)
