"""What every calibration_weights launcher takes and gives, and the checks of its arguments."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from robust_dpo.errors import argument_error

WeightForm = Literal["paper", "mixture"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CalibrationWeightsLauncher(Protocol):
    """calibration_weights on one backend: classifier probabilities → h (DoRA, arXiv 2504.05831).

    With c_i the probability of slot i of a response:
    `mixture`: 1 / (α + Σ_i β_i (1 − c_i)/(γ_i c_i)), the exact density ratio; 0 where a c_i is 0.
    `paper`: the mean over i of γ_i c_i / (β_i (1 − c_i) + 1/n).

    Args:
        probs: [S, m] c, contiguous, fp32, bf16, fp16 or float64, in [0, 1] (the caller checks that); one for each slot,
            or m = 1: all slots have the same c.
        betas: [P, slots] β > 0, of response s in row s mod P; contiguous, fp32, or float64 for float64 probs.
        gammas: [slots] γ > 0, in the dtype of betas.
        form: "paper" or "mixture".
        alpha: share of the target in the mixture, > 0; for `mixture`.
        num_distributions: n, of the target and its sources; for `paper`.
        clip: upper bound of h, or None.

    Returns:
        h [S], fp32 (float64 for float64 probs), finite.

    Raises:
        ValueError: a shape, dtype, device or layout is wrong.
    """

    def __call__(
        self,
        probs: Tensor,
        betas: Tensor,
        gammas: Tensor,
        *,
        form: WeightForm,
        alpha: float,
        num_distributions: int,
        clip: float | None = None,
    ) -> Tensor: ...


def result_dtype(probs: Tensor) -> torch.dtype:
    """float64 for float64 probabilities, otherwise float32."""
    return torch.float64 if probs.dtype == torch.float64 else torch.float32


def check_arguments(
    probs: Tensor,
    betas: Tensor,
    gammas: Tensor,
    form: WeightForm,
    alpha: float,
    num_distributions: int,
    clip: float | None,
) -> None:
    """Refuse what no launcher can run; see `CalibrationWeightsLauncher`."""
    if form not in get_args(WeightForm):
        raise argument_error("form", f"one of {', '.join(get_args(WeightForm))}", repr(form))
    if probs.dtype not in _DTYPES:
        raise argument_error("probs", "dtype float32, bfloat16, float16 or float64", probs.dtype)
    if probs.ndim != 2 or probs.shape[1] == 0:
        raise argument_error("probs", "shape [S, m] with m ≥ 1", list(probs.shape))
    if betas.ndim != 2 or 0 in betas.shape or probs.shape[1] not in (1, betas.shape[1]):
        raise argument_error("betas", "shape [P, slots], and as many classifiers in probs or one", list(betas.shape))
    if gammas.shape != betas.shape[1:]:
        raise argument_error("gammas", f"shape [{betas.shape[1]}], as a row of betas", list(gammas.shape))
    for name, vector in (("probs", probs), ("betas", betas), ("gammas", gammas)):
        if vector.device != probs.device:
            raise argument_error(name, f"a tensor on {probs.device}, as probs", vector.device)
        if not vector.is_contiguous():
            raise argument_error(name, "a contiguous tensor", f"strides {vector.stride()}")
        if vector is not probs and vector.dtype != result_dtype(probs):
            raise argument_error(name, f"dtype {result_dtype(probs)}", vector.dtype)
    for name, number in (("alpha", alpha), ("num_distributions", num_distributions), ("clip", clip)):
        if number is not None and not number > 0:
            raise argument_error(name, "a positive number", number)
