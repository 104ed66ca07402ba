"""The three matrix products of the LM head, by torch's GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the fp32 weight gradient that one rounded product is added to at a time: at H = 4096 a bf16 product of
# 4,096 rows is 32 MB, so it is still in the last-level cache when it is added.
_SLAB_ROWS = 4096


def logits_into(tile: Tensor, x: Tensor, weight: Tensor) -> None:
    """Write x Wᵀ into the tile [n, V]; a tile wider than the inputs gets the product of the widened inputs."""
    if tile.dtype == x.dtype:
        torch.mm(x, weight.t(), out=tile)
        return
    wide = x.to(tile.dtype)
    for start in range(0, weight.shape[0], _SLAB_ROWS):
        slab = weight[start : start + _SLAB_ROWS].to(tile.dtype)
        tile[:, start : start + _SLAB_ROWS] = wide @ slab.t()


def times_weight(z: Tensor, weight: Tensor) -> Tensor:
    """[n, H] z W."""
    return torch.mm(z, weight)


def add_product(total: Tensor, z: Tensor, x: Tensor, factors: Tensor) -> None:
    """Add zᵀ (factors · x) to `total` [V, H], accumulated in the dtype of `total`."""
    if len(x) == 0:
        return
    column = factors[:, None]
    if total.dtype == x.dtype:
        total.addmm_(z.t(), x * column)
        return
    # Unnormalised robust weights reach e³⁰, and fp16 ends at 65,504: the largest factor waits for the wide sum.
    largest = factors.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    rows = (x * (column / largest)).to(x.dtype)
    for start in range(0, total.shape[0], _SLAB_ROWS):
        slab = total[start : start + _SLAB_ROWS]
        slab.addcmul_(torch.mm(z[:, start : start + _SLAB_ROWS].t(), rows).to(total.dtype), largest)


def add_weighted_rows(total: Tensor, z: Tensor, factors: Tensor) -> None:
    """Add factorsᵀ z to `total` [V], accumulated in the dtype of `total`."""
    for start in range(0, len(total), _SLAB_ROWS):
        stop = start + _SLAB_ROWS
        total[start:stop] += factors @ z[:, start:stop].to(total.dtype)
