"""The three matrix products of the LM head, by torch's GEMMs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Rows of the fp32 weight gradient that one rounded product is added to at a time: at H = 4096 a bf16 product of
# 4,096 rows is 32 MB, so it is still in the last-level cache when it is added.
_SLAB_ROWS = 4096


def widens(x: Tensor) -> bool:
    """Whether torch multiplies matrices like `x` with fp32 output, without rounding the sums to half precision."""
    return x.is_cuda and torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16)


@functools.cache
def adds_in_place(device: torch.device) -> bool:
    """Whether this torch adds a bf16 product to an fp32 matrix in one cuBLAS call; not all that have `out_dtype` do."""
    total, z = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, z, z, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def logits_into(tile: Tensor, x: Tensor, weight: Tensor) -> None:
    """Write x Wᵀ into the tile [n, V]; a tile wider than the inputs gets the unrounded product."""
    if tile.dtype == x.dtype:
        torch.mm(x, weight.t(), out=tile)
        return
    if widens(x):
        torch.mm(x, weight.t(), out_dtype=tile.dtype, out=tile)
        return
    wide = x.to(tile.dtype)
    for start in range(0, weight.shape[0], _SLAB_ROWS):
        slab = weight[start : start + _SLAB_ROWS].to(tile.dtype)
        tile[:, start : start + _SLAB_ROWS] = wide @ slab.t()


def times_weight_into(out: Tensor, z: Tensor, weight: Tensor) -> None:
    """Write z W into `out` [n, H]."""
    torch.mm(z, weight, out=out)


def add_product(total: Tensor, z: Tensor, x: Tensor, factors: Tensor, *, first: bool) -> None:
    """Add zᵀ (factors · x) to `total` [V, H], accumulated in the dtype of `total`; the `first` product takes its place.

    The factors ride on x, which is V/H times smaller than z.
    """
    rows = torch.empty_like(x)
    if total.dtype == x.dtype:
        torch.mul(x, factors[:, None], out=rows)
        total.addmm_(z.t(), rows, beta=0 if first else 1)
    elif widens(x) and x.dtype == torch.bfloat16:
        torch.mul(x, factors[:, None], out=rows)
        if first:
            torch.mm(z.t(), rows, out_dtype=total.dtype, out=total)
        elif adds_in_place(total.device):
            torch.addmm(total, z.t(), rows, out_dtype=total.dtype, out=total)
        else:
            for start in range(0, total.shape[0], _SLAB_ROWS):
                columns = z[:, start : start + _SLAB_ROWS].t()
                total[start : start + _SLAB_ROWS] += torch.mm(columns, rows, out_dtype=total.dtype)
    else:
        _add_in_slabs(total, z, x, factors, rows, first)


def _add_in_slabs(total: Tensor, z: Tensor, x: Tensor, factors: Tensor, rows: Tensor, first: bool) -> None:
    """The same where torch cannot accumulate into a wider matrix, or where the factors do not fit into fp16."""
    # Unnormalised robust weights reach e³⁰, and fp16 ends at 65,504: the largest factor waits for the wide sum.
    largest = _largest(factors)
    torch.mul(x, (factors / largest)[:, None], out=rows)
    for start in range(0, total.shape[0], _SLAB_ROWS):
        slab = total[start : start + _SLAB_ROWS]
        columns = z[:, start : start + _SLAB_ROWS].t()
        product = (
            torch.mm(columns, rows, out_dtype=total.dtype) if widens(x) else torch.mm(columns, rows).to(total.dtype)
        )
        if first:
            torch.mul(product, largest, out=slab)
        else:
            slab.addcmul_(product, largest)


def add_weighted_rows(total: Tensor, z: Tensor, factors: Tensor) -> None:
    """Add factorsᵀ z to `total` [V], accumulated in the dtype of `total`."""
    if widens(z):
        # Each factor as the sum of two numbers of half precision, between ±1: exact to 16 bits, in one product.
        largest = _largest(factors)
        high = (factors / largest).to(z.dtype)
        low = (factors / largest - high).to(z.dtype)
        total.addcmul_(torch.mm(torch.stack([high, low]), z, out_dtype=total.dtype).sum(0), largest)
        return
    for start in range(0, len(total), _SLAB_ROWS):
        stop = start + _SLAB_ROWS
        total[start:stop] += factors @ z[:, start:stop].to(total.dtype)


def _largest(factors: Tensor) -> Tensor:
    """[] the largest magnitude, or 1 where there is none."""
    largest = factors.abs().amax()
    return torch.where(largest == 0, 1.0, largest)
