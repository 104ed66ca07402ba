"""calibration_weights through the native CUDA extension (csrc/calibration_weights.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robust_dpo import _cuda
from robust_dpo.kernels.calibration_weights import WeightForm, check_arguments, result_dtype
from robust_dpo.kernels.cuda_target import DTYPE_CODES, cuda_target


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
    """Calibration h of every response; see `CalibrationWeightsLauncher`.

    Raises:
        ValueError: an argument is not as it says there.
        RuntimeError: CUDA refuses the launch, or an earlier launch has failed; names kernel and shape.
    """
    check_arguments(probs, betas, gammas, form, alpha, num_distributions, clip)
    weights = torch.empty(len(probs), dtype=result_dtype(probs), device=probs.device)
    _cuda.calibration_weights(
        **cuda_target("probs", probs),
        probs=probs.data_ptr(),
        prob_dtype=DTYPE_CODES[probs.dtype],
        betas=betas.data_ptr(),
        gammas=gammas.data_ptr(),
        weights=weights.data_ptr(),
        responses=len(probs),
        classifiers=probs.shape[1],
        slots=betas.shape[1],
        period=len(betas),
        paper=form == "paper",
        offset=1 / num_distributions if form == "paper" else alpha,
        clip=math.inf if clip is None else clip,
    )
    return weights
