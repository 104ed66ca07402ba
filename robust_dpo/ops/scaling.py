"""The last step of a gradient that was computed in the forward pass: one factor, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times a factor, in `dtype`; reuses the memory of `gradient` where nobody can see it.

    A weight gradient is as large as the head, so a copy is worth avoiding. Autograd frees saved tensors after a
    backward pass unless the graph is kept; a compiled backward is out-of-place and lets the compiler decide.
    """
    keeps_graph = type(gradient) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph()
    product = gradient * factor if keeps_graph else gradient.mul_(factor)
    return product.to(dtype)
