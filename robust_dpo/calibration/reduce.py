"""From the calibration of responses to the calibration of their group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust_dpo.errors import argument_error, type_error


def _mean(h: Tensor, mask: Tensor) -> Tensor:
    return h.masked_fill(~mask, 0).sum(1) / mask.sum(1)


def _chosen(h: Tensor, mask: Tensor) -> Tensor:
    return h[:, 0]


def _product(h: Tensor, mask: Tensor) -> Tensor:
    return h.masked_fill(~mask, 1).prod(1)


def _min(h: Tensor, mask: Tensor) -> Tensor:
    return h.masked_fill(~mask, float("inf")).amin(1)


def _share(h: Tensor, mask: Tensor) -> Tensor:
    total = h.masked_fill(~mask, 0).sum(1)
    size = mask.sum(1).to(h.dtype)
    # where every response has h = 0 none is more target-like than another
    return torch.where(total > 0, size * h[:, 0] / total.clamp_min(torch.finfo(h.dtype).tiny), torch.ones_like(total))


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "chosen": _chosen,
    "product": _product,
    "min": _min,
    "share": _share,
}


def group_calibration(h: Tensor, reduce: str = "mean", *, mask: Tensor | None = None) -> Tensor:
    """Calibration of each group from that of its responses.

    - `mean`, the paper's: how much the group's responses look like the target, whichever of them is preferred. It finds
      groups from another source; a pair and the same pair with its label swapped have the same value.
    - `chosen`: h of the preferred response alone.
    - `share`: K · h_chosen / Σ h, how much more target-like the preferred response is than its rivals, mean 1. With
      `target="chosen"` it is what tells a swapped pair: for a pair and h ∝ p/(1 − p) it is, up to a factor, the
      posterior probability that the label is right.
    - `product`: the density ratio of the whole group if its responses are independent given the prompt; high variance.
    - `min`: the group is as much target as its least target-like response; discounts groups of mixed sources.

    Args:
        h: [G, K] float ≥ 0, calibration of each response, the preferred response first.
        reduce: one of the names above.
        mask: [G, K] bool, True where there is a response (all, when None); the first slot of a group always is one.

    Returns:
        [G], the dtype of `h`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(h, Tensor) or not h.is_floating_point():
        raise type_error("h", "a floating-point tensor", h)
    if h.ndim != 2 or h.shape[1] < 1:
        raise argument_error("h", "shape [G, K] with K ≥ 1", list(h.shape))
    if reduce not in REDUCTIONS:
        raise argument_error("reduce", f"one of {', '.join(REDUCTIONS)}", repr(reduce))
    if mask is None:
        mask = torch.ones_like(h, dtype=torch.bool)
    if mask.shape != h.shape or mask.dtype != torch.bool or not mask[:, 0].all():
        raise argument_error("mask", f"a bool tensor {list(h.shape)}, True in its first column", mask)
    if not (torch.isfinite(h) & (h >= 0))[mask].all():
        raise argument_error("h", "finite values, at least 0", h)
    return REDUCTIONS[reduce](h, mask)
