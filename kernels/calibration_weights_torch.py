"""calibration_weights in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.kernels.calibration_weights import WeightForm, check_arguments, result_dtype


def calibration_weights(
    probs: Tensor,
    betas: Tensor,
    gammas: Tensor,
    *,
    form: WeightForm,
    alpha: float,
    num_distributions: int,
    clip: float | None = None,
) -> Tensor:
    """Calibration h of every response; see `CalibrationWeightsLauncher`."""
    check_arguments(probs, betas, gammas, form, alpha, num_distributions, clip)
    c = probs.to(result_dtype(probs))
    if len(betas) > 1:
        betas = betas[torch.arange(len(c), device=c.device) % len(betas)]
    paper = form == "paper"
    h = paper_weights(c, betas, gammas, num_distributions) if paper else mixture_weights(c, alpha, betas, gammas)
    return h if clip is None else h.clamp(max=clip)


def mixture_weights(probs: Tensor, alpha: float, betas: Tensor, gammas: Tensor) -> Tensor:
    """1 / (α + Σ_i β_i (1 − c_i)/(γ_i c_i)).

    Args:
        probs: [..., m] c, or [..., 1]; 0 gives 0.
        alpha: share of the target, > 0.
        betas: broadcastable to [..., m], > 0.
        gammas: broadcastable to [..., m], > 0.

    Returns:
        [...]
    """
    return 1 / (alpha + (betas * (1 - probs) / (gammas * probs)).sum(-1))


def paper_weights(probs: Tensor, betas: Tensor, gammas: Tensor, num_distributions: int) -> Tensor:
    """Mean over i of γ_i c_i / (β_i (1 − c_i) + 1/n); arguments as `mixture_weights`, n distributions."""
    return (gammas * probs / (betas * (1 - probs) + 1 / num_distributions)).mean(-1)
