"""What launchers ask of the GPU that a tensor is on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Args:
    multiprocessors: that it has.
    warp_size: threads that run in step: 64 on AMD's data centre GPUs, else 32.
    """

    multiprocessors: int
    warp_size: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU `device` of a tensor, so with an index; for the interpreter, which runs one program after the other, a
    chip of one multiprocessor.
    """
    if device.type != "cuda":
        return Gpu(1, 32)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.warp_size if torch.version.hip is not None else 32)
