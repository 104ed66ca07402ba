"""calibration_weights through the native CPU extension (csrc/calibration_weights_cpu.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robust_dpo import _cpu
from robust_dpo.errors import argument_error
from robust_dpo.kernels.calibration_weights import WeightForm, check_arguments, result_dtype
from robust_dpo.kernels.row_logprob_cpu import DTYPE_CODES


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
    if probs.device.type != "cpu":
        raise argument_error("probs", "a tensor on the CPU", probs.device)
    responses, classifiers = probs.shape
    weights = torch.empty(responses, dtype=result_dtype(probs))
    paper = form == "paper"
    _cpu.calibration_weights(
        probs=probs.data_ptr(),
        prob_dtype=DTYPE_CODES[probs.dtype],
        betas=betas.data_ptr(),
        gammas=gammas.data_ptr(),
        weights=weights.data_ptr(),
        responses=responses,
        classifiers=classifiers,
        slots=betas.shape[1],
        period=len(betas),
        paper=paper,
        offset=1 / num_distributions if paper else alpha,
        clip=math.inf if clip is None else clip,
        threads=torch.get_num_threads(),
    )
    return weights
