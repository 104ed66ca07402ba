"""The dtype that the matrix products run in."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.errors import argument_error


def autocast_off(device: torch.device) -> torch.autocast:
    """Context of the chunks: operators choose their dtypes themselves, and autocast would round fp32 products."""
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of autocast where it is on (float64 is left alone), otherwise the common dtype of the inputs.

    Raises:
        ValueError: without autocast, the dtypes differ.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise argument_error("weight", f"dtype {hidden.dtype}, as hidden, outside autocast", weight.dtype)
    return hidden.dtype
