"""The last step of a gradient that was computed in the forward pass: one factor, one rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robust_dpo.dispatch import get_rescale
from robust_dpo.kernels.rescale import RESCALED


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times a factor, in `dtype`; reuses the memory of `gradient` where nobody can see it.

    A weight gradient is as large as the head, so a copy is worth avoiding. Autograd frees saved tensors after a
    backward pass unless the graph is kept; a compiled backward is out-of-place and lets the compiler decide.
    """
    if type(gradient) is not Tensor:
        return (gradient * factor).to(dtype)
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    return product(gradient, factor, dtype, reuse=not keeps_graph)


@torch.no_grad()
def product(gradient: Tensor, factor: Tensor, dtype: torch.dtype, *, reuse: bool) -> Tensor:
    """The gradient times a factor, read once, rounded once to `dtype`; with `reuse`, in its own memory if it can be.

    Then a factor [] that is 1 leaves memory untouched.
    """
    fits = reuse and gradient.dtype == dtype
    if fits and factor.ndim == 0 and dtype in RESCALED and gradient.is_contiguous():
        get_rescale("auto", gradient.device, dtype)(gradient, factor)
        return gradient
    return torch.mul(gradient, factor, out=gradient if fits else torch.empty_like(gradient, dtype=dtype))


def first_order(operator: str, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients, and with `create_graph` a graph behind them that refuses to be differentiated.

    They were made in the forward pass, so autograd would take them for constants, and a second derivative would be
    wrong without a word.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    refuse = torch._C._functions.DelayedError(f"{operator}: gradients of gradients are not implemented".encode(), 1)
    return tuple(None if each is None else refuse(each.detach().requires_grad_()) for each in gradients)
