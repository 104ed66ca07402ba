"""rescale in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def rescale(total: Tensor, factor: Tensor) -> None:
    """Multiply `total` in place; see `RescaleLauncher`."""
    # On the CPU a look at the factor is free; elsewhere the host would have to wait for the device.
    if total.device.type != "cpu" or float(factor) != 1.0:
        total *= factor.to(total.dtype)
