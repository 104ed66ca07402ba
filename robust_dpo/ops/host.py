"""Traffic between host and device: few numbers, each direction once, and nothing that waits for the device."""

from __future__ import annotations

import functools
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
    """An int64 vector on `device`, without waiting for what runs there.

    Kept from call to call: shapes repeat, and a copy cannot be part of a CUDA graph.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    return _sent(tuple(values), device)


@functools.lru_cache(maxsize=256)
def _sent(values: tuple[int, ...], device: torch.device) -> Tensor:
    staged = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return staged.to(device, non_blocking=True)
