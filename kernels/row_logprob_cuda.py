"""row_logprob through the native CUDA extension (csrc/row_logprob_kernel.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo import _cuda
from robust_dpo.errors import argument_error
from robust_dpo.kernels.cuda_target import DTYPE_CODES, MAX_BLOCKS, address, cuda_target
from robust_dpo.kernels.row_logprob import RowLogprob, check_arguments
from robust_dpo.kernels.row_plan_cuda import RowPlan, chip_of, plan_gradient, plan_rows

_INT_MAX = 2**31 - 1
# Numbers that a block leaves for the second launch where rows are split without a cluster.
_PARTIALS = 4


def row_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_out: Tensor | None = None,
    row_scale: Tensor | None = None,
    entropy: bool = False,
    known: RowLogprob | None = None,
    plan: RowPlan | None = None,
) -> RowLogprob:
    """Token log-prob of every row, and its gradient in place; see `RowLogprobLauncher`.

    Results are the same bits in every call with the same shapes, strides and alignment on the same chip. `plan` is for
    measurements and tests: another than `plan_rows` or `plan_gradient` would choose.

    Raises:
        ValueError: an argument is not as it says there, or a tile has more than 2³¹ − 1 columns or blocks.
        RuntimeError: CUDA refuses the launch, or an earlier launch has failed; names kernel and shape.
    """
    check_arguments(logits, targets, bias, softcap, grad_out, row_scale, entropy, known)
    if logits.dtype == torch.float64:
        raise argument_error("logits", "dtype float32, bfloat16 or float16 for CUDA", logits.dtype)
    target = cuda_target("logits", logits)
    rows, vocab = logits.shape
    if vocab > _INT_MAX:
        raise argument_error("logits", f"at most {_INT_MAX} columns", vocab)
    targets = targets.contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    row_scale = None if row_scale is None else row_scale.detach().to(torch.float32).contiguous()
    if known is None:
        logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
        result = RowLogprob(logp, torch.empty_like(logp), torch.empty_like(logp) if entropy else None)
        target_logits = None
    else:
        result = RowLogprob(known.logp.contiguous(), known.lse.contiguous(), None)
        # In place, another block may have overwritten the target's logit by the time that one needs it.
        target_logits = logits.detach().gather(1, targets.clamp(0, vocab - 1)[:, None])
    if plan is None:
        plan = _plan(logits, grad_out, is_known=known is not None)
    if rows * plan.segments > MAX_BLOCKS:
        raise argument_error("logits", f"at most {MAX_BLOCKS} blocks of rows", rows * plan.segments)
    partials = None
    if plan.segments > 1 and not plan.cluster and known is None:
        partials = torch.empty(rows, plan.segments, _PARTIALS, dtype=torch.float32, device=logits.device)
    _cuda.row_logprob(
        **target,
        threads=plan.threads,
        segments=plan.segments,
        cluster=plan.cluster,
        keep=plan.keep,
        partials=address(partials),
        tile=logits.data_ptr(),
        tile_dtype=DTYPE_CODES[logits.dtype],
        tile_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        targets=targets.data_ptr(),
        bias=address(bias),
        softcap=0.0 if softcap is None else softcap,
        scale=logit_scale,
        logp=result.logp.data_ptr(),
        lse=result.lse.data_ptr(),
        entropy=address(result.entropy),
        grad=address(grad_out),
        grad_dtype=DTYPE_CODES[logits.dtype if grad_out is None else grad_out.dtype],
        grad_stride=0 if grad_out is None else grad_out.stride(0),
        row_scale=address(row_scale),
        target_logits=address(target_logits),
    )
    return result if known is None else known


def _plan(logits: Tensor, grad_out: Tensor | None, *, is_known: bool) -> RowPlan:
    (rows, vocab), chip = logits.shape, chip_of(logits.device, _cuda.ARCHITECTURES)
    narrowed = grad_out is not None and grad_out.itemsize < logits.itemsize
    if is_known:
        return plan_gradient(rows, vocab, logits.itemsize, narrowed=narrowed, chip=chip)
    return plan_rows(rows, vocab, logits.itemsize, gradient=grad_out is not None, narrowed=narrowed, chip=chip)
