"""calibration_weights in Triton: one launch where PyTorch takes eight, each for a few thousand numbers."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_dpo.errors import argument_error
from robust_dpo.kernels.calibration_weights import WeightForm, check_arguments
from robust_dpo.kernels.triton_aot import Variant

# Two responses for each of 128 threads: a batch of thousands is spread over the device, its launch is all it costs.
BLOCK = 256
NUM_WARPS = 4
_POINTERS = {"p_betas": "*fp32", "p_gammas": "*fp32", "p_weights": "*fp32"}
_NUMBERS = {"responses": "i64", "classifiers": "i64", "slots": "i64", "period": "i64"}


@triton.jit(do_not_specialize=[*_NUMBERS, "offset", "clip"], do_not_specialize_on_alignment=["p_probs", *_POINTERS])
def calibration_weights_kernel(
    p_probs: tl.tensor,
    p_betas: tl.tensor,
    p_gammas: tl.tensor,
    p_weights: tl.tensor,
    responses: tl.int64,
    classifiers: tl.int64,
    slots: tl.int64,
    period: tl.int64,
    offset: tl.float32,
    clip: tl.float32,
    PAPER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    o_response = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_response = o_response < responses
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_slot in range(0, slots):
        # Of one classifier, every slot reads the same probability.
        o_prob = o_response * classifiers + i_slot % classifiers
        b_prob = tl.load(p_probs + o_prob, m_response, other=1.0).to(tl.float32)
        b_beta = tl.load(p_betas + o_response % period * slots + i_slot)
        gamma = tl.load(p_gammas + i_slot)
        # IEEE divisions: the approximate one gives 0 for denominators beyond 2¹²⁶, which tiny probabilities lead to.
        if PAPER:
            b_sum += tl.div_rn(gamma * b_prob, b_beta * (1.0 - b_prob) + offset)
        else:
            # A probability of 0 gives infinity here, and 0 in the end.
            b_sum += tl.div_rn(b_beta * (1.0 - b_prob), gamma * b_prob)
    b_weight = tl.div_rn(b_sum, tl.zeros_like(b_sum) + slots) if PAPER else tl.div_rn(1.0, b_sum + offset)
    tl.store(p_weights + o_response, tl.minimum(b_weight, clip), m_response)


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
    """Calibration h of every response; see `CalibrationWeightsLauncher`. Not for float64."""
    check_arguments(probs, betas, gammas, form, alpha, num_distributions, clip)
    if probs.dtype == torch.float64:
        raise argument_error("probs", "dtype float32, bfloat16 or float16 for Triton", probs.dtype)
    responses, classifiers = probs.shape
    weights = torch.empty(responses, dtype=torch.float32, device=probs.device)
    if responses == 0:
        return weights
    paper = form == "paper"
    with torch.cuda.device(probs.device) if probs.is_cuda else nullcontext():
        calibration_weights_kernel[(triton.cdiv(responses, BLOCK),)](
            probs,
            betas,
            gammas,
            weights,
            responses,
            classifiers,
            betas.shape[1],
            len(betas),
            1 / num_distributions if paper else alpha,
            float("inf") if clip is None else clip,
            PAPER=paper,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return weights


def aot_variants() -> list[Variant]:
    """Both forms for every dtype. Columns of probabilities are not contiguous, so none loads 16 bytes at a time."""
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        arguments = {"p_probs": f"*{dtype}", **_POINTERS, **_NUMBERS, "offset": "fp32", "clip": "fp32"}
        for paper in (False, True):
            name = f"{dtype} {'paper' if paper else 'mixture'}"
            constants = {"PAPER": paper, "BLOCK": BLOCK}
            options = {"num_warps": NUM_WARPS}
            kernel = calibration_weights_kernel
            found.append(Variant(name, kernel, arguments, constants, frozenset(), options, hot=False))
    return found
