"""This package as an implementation of the problem."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from robust_dpo.bench.implementation import ANYWHERE, CPU_ONLY, Builder, Implementation, LossFunction, add
from robust_dpo.bench.problem import Problem

OURS = "ours"


def ours(problem: Problem, **options: Any) -> LossFunction:
    """robust_dpo.linear_preference_loss, with `options` such as `chunk_bytes` passed on."""
    from robust_dpo import linear_preference_loss

    name = "sigmoid" if problem.group_size == 2 else "plackett_luce"

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        output = linear_preference_loss(
            hidden,
            weight,
            problem.targets,
            group_size=problem.group_size,
            ref_hidden=problem.ref_hidden,
            ref_weight=problem.ref_weight,
            ref_logps=problem.ref_logps,
            loss=name,
            beta=problem.beta,
            **options,
        )
        return output.loss

    return loss


def ours_with(
    name: str,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    devices: frozenset[str] = ANYWHERE,
    tile_dtype: torch.dtype | None = None,
    **options: Any,
) -> Implementation:
    """A variant with options of `linear_preference_loss`."""
    build: Builder = functools.partial(ours, tile_dtype=tile_dtype, **options)
    return Implementation(
        name,
        build,
        "robust_dpo",
        "robust_dpo",
        dtypes=dtypes,
        devices=devices,
        tile_dtype=tile_dtype,
        ours=True,
    )


_BF16 = (torch.bfloat16,)
add(ours_with(OURS))
add(ours_with("ours_fp32_tile", dtypes=_BF16, tile_dtype=torch.float32))
# On a GPU a tile has the dtype of the inputs anyway.
add(ours_with("ours_bf16_tile", dtypes=_BF16, devices=CPU_ONLY, tile_dtype=torch.bfloat16))
add(ours_with("ours_torch", backend="torch"))
