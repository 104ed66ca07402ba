"""Traffic between host and device: few numbers, each direction once, and nothing that waits for the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor


def fetch(*vectors: Tensor | None) -> list[list[int]]:
    """Contents of integer vectors, [] for None; those on a device come in one transfer, which waits for it."""
    there = [vector for vector in vectors if vector is not None and vector.device.type != "cpu"]
    numbers = iter(torch.cat([vector.long() for vector in there]).tolist() if there else ())
    contents: list[list[int]] = []
    for vector in vectors:
        if vector is None:
            contents.append([])
        elif vector.device.type == "cpu":
            contents.append(vector.tolist())
        else:
            contents.append([next(numbers) for _ in range(len(vector))])
    return contents


def send(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 vector on `device`, without waiting for what runs there; nobody may change it.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the vector was not sent before.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)
    if torch.cuda.is_current_stream_capturing():
        return _COPIES.for_graph(tuple(values), device)
    return _COPIES.for_stream(tuple(values), device, torch.cuda.current_stream(device).cuda_stream)


class DeviceCopies:
    """Vectors kept from call to call: shapes repeat, and a copy from the host cannot be part of a CUDA graph.

    One for each stream, because another stream would have to wait for its copy. Those that a graph reads are kept for
    good, for it has their addresses.

    Args:
        size: number of vectors kept, the most recent ones; without those of graphs.
    """

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._recent: OrderedDict[tuple[tuple[int, ...], torch.device, int], Tensor] = OrderedDict()
        self._of_graphs: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def for_stream(self, values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
        """The vector for work on a stream, copied there at the first request."""
        key = (values, device, stream)
        if key not in self._recent:
            staged = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=torch.cuda.is_available())
            self._recent[key] = staged.to(device, non_blocking=True)
        self._recent.move_to_end(key)
        if len(self._recent) > self._size:
            self._recent.popitem(last=False)
        return self._recent[key]

    def for_graph(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """The vector as a graph may use it: copied before the capture began, which waited for all streams."""
        key = (values, device)
        if key not in self._of_graphs:
            found = [vector for (sent, where, _), vector in self._recent.items() if (sent, where) == key]
            if not found:
                raise RuntimeError(
                    "seq_lens and group_sizes: expected lengths that were used in a call before the capture of this "
                    f"CUDA graph (their copies cannot be captured), got {len(values)} new numbers"
                )
            self._of_graphs[key] = found[-1]
        return self._of_graphs[key]


_COPIES = DeviceCopies()
