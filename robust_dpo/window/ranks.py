"""The ranks that a route spans."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Ranks(Protocol):
    """What a route asks of them; `accelerate.Accelerator` answers for all ranks of a run."""

    @property
    def num_processes(self) -> int: ...

    @property
    def process_index(self) -> int: ...

    def gather(self, tensor: Any) -> Any: ...


class OneRank:
    """A rank by itself, whatever others there are."""

    num_processes = 1
    process_index = 0

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor
