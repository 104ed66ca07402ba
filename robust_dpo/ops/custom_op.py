"""How the package declares its custom ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op` for an op that changes no argument and may read its data on the host.

    The tag keeps the CUDA graphs of torch.compile away from it, which would capture the read. A capture by hand of a
    call that reads nothing is not affected.
    """
    return torch.library.custom_op(name, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
