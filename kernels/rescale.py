"""rescale: a conditional multiplication, decided where the factor is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

RESCALED = (torch.float32, torch.float64)
"""The dtypes of what the launchers multiply."""


class RescaleLauncher(Protocol):
    """rescale on one backend: `total *= factor`, and next to nothing where the factor is exactly 1.

    Args:
        total: contiguous fp32 or float64, of any shape, changed in place.
        factor: [] fp32 or float64 on the same device; the host does not read it.
    """

    def __call__(self, total: Tensor, factor: Tensor) -> None: ...
