"""Multiplying gradients that have been accumulated already."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from robust_dpo.dispatch import get_rescale
from robust_dpo.kernels.rescale import RESCALED

# Accumulated gradients may outgrow their first micro-batch by this share of the exponents that their dtype has: e^59 in
# fp32 and bf16, e^7 in fp16.
_SHARE_OF_RANGE = 2 / 3


def accumulated(model: nn.Module) -> list[Tensor]:
    """The gradients that the parameters hold."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def room_to_grow(gradients: Iterable[Tensor]) -> float:
    """The exponent that a factor of these gradients may have; 0 where there are none."""
    largest = (torch.finfo(gradient.dtype).max for gradient in gradients)
    return min((_SHARE_OF_RANGE * math.log(value) for value in largest), default=0.0)


def scale(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply in place by `factor` [], one pass over memory.

    The host reads nothing from a device.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), members in by_kind.items():
        torch._foreach_mul_(members, factor.to(device, dtype))


def scale_where_needed(gradients: Iterable[Tensor], factor: Tensor, backend: str = "auto") -> None:
    """The same where `factor` is mostly exactly 1: memory is then not touched, and the host reads nothing.

    On the CPU it looks at the factor, which is free there.
    """
    others = []
    for gradient in gradients:
        if gradient.dtype in RESCALED and gradient.is_contiguous() and gradient.device == factor.device:
            get_rescale(backend, gradient.device, gradient.dtype)(gradient, factor)
        else:
            others.append(gradient)
    scale(others, factor)
