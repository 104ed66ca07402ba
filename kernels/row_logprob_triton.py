"""row_logprob in Triton: log-prob, log-sum-exp, entropy and gradient of every row of a tile in one launch.

One program takes a row, and then another. It reads a row twice, for the statistics and for the gradient; rows in
flight are kept to what the L2 cache holds, so that the second read does not come from memory. Few long rows go to
row_logprob_split_triton.py instead, rows whose results are known to row_gradient_triton.py.
"""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from robust_dpo.errors import argument_error
from robust_dpo.kernels.gpu import gpu_of
from robust_dpo.kernels.row_blocks import load_target_logit, locate_target, row_start, span_of
from robust_dpo.kernels.row_gradient import write_gradient
from robust_dpo.kernels.row_gradient_triton import launch_gradient
from robust_dpo.kernels.row_launch import (
    THREADS,
    TYPE_NAMES,
    LaunchShape,
    aligned_bias,
    all_forms,
    form_of,
    has_form,
    launch,
    launch_shape,
    row_jit,
    variant,
)
from robust_dpo.kernels.row_logits import transform
from robust_dpo.kernels.row_logprob import RowLogprob, check_arguments
from robust_dpo.kernels.row_logprob_split_triton import launch_split
from robust_dpo.kernels.row_statistics import finish, row_statistics
from robust_dpo.kernels.triton_aot import Variant


@row_jit
def row_logprob_kernel(
    p_logits: tl.tensor,
    p_targets: tl.tensor,
    p_bias: tl.tensor,
    p_row_scale: tl.tensor,
    p_logp: tl.tensor,
    p_lse: tl.tensor,
    p_entropy: tl.tensor,
    p_grad: tl.tensor,
    stride: tl.int64,
    grad_stride: tl.int64,
    rows: tl.int32,
    vocab: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,
    has_bias: tl.int32,
    has_row_scale: tl.int32,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    TAKES_TURNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE_STORE: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
) -> None:
    """Results of rows, and their gradients where p_grad is given."""
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    turns = 1
    if TAKES_TURNS:
        turns = tl.cdiv(rows - first, programs)
    for turn in range(0, turns):
        i_row = first + turn * programs
        p_row = row_start(p_logits, i_row, stride, ALIGNED)
        target, is_read = locate_target(p_targets + i_row, vocab)
        z_target = load_target_logit(p_row, target, is_read)
        span = span_of(p_row, 0, vocab, vocab, target, is_read, VECTOR, ALIGNED)
        statistics = row_statistics(p_row, span, head_of_model, VECTOR, LANES, ALIGNED, TRANSFORMED, ENTROPY, EVICTION)
        v_target, _ = transform(z_target, target, target >= 0, head_of_model, TRANSFORMED)
        logp, lse, entropy, for_gradient = finish(statistics, v_target, target, is_read)
        tl.store(p_logp + i_row, logp)
        tl.store(p_lse + i_row, lse)
        if ENTROPY:
            tl.store(p_entropy + i_row, entropy)
        if p_grad is not None:
            m, inverse, target_factor = for_gradient
            scale = tl.load(p_row_scale + i_row, mask=is_read & (has_row_scale != 0), other=1.0) * logit_scale
            p_grad_row = row_start(p_grad, i_row, grad_stride, ALIGNED)
            result = (m, scale * inverse, scale * target_factor)
            write_gradient(
                p_row, p_grad_row, span, head_of_model, result, VECTOR, LANES, ALIGNED, WIDE_STORE, TRANSFORMED
            )


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
    shape: LaunchShape | None = None,
) -> RowLogprob:
    """Token log-prob of every row, and its gradient in place; see `RowLogprobLauncher`.

    A target that is neither in [0, V) nor `IGNORE_INDEX` gives logp NaN and a gradient without onehot. Results are the
    same bits in every call with the same shapes, strides and alignment. `shape` is for measurements: another than
    `launch_shape` would choose.
    """
    check_arguments(logits, targets, bias, softcap, grad_out, row_scale, entropy, known)
    if logits.dtype not in TYPE_NAMES:
        raise argument_error("logits", "dtype float32, bfloat16 or float16 for Triton", logits.dtype)
    if isinstance(row_logprob_kernel, JITFunction) and not logits.is_cuda:
        raise argument_error("logits", "a tensor on a GPU (or TRITON_INTERPRET=1 in the environment)", logits.device)
    rows, vocab = logits.shape
    logp = torch.empty(rows if known is None else 0, dtype=torch.float32, device=logits.device)
    result = known or RowLogprob(logp, torch.empty_like(logp), torch.empty_like(logp) if entropy else None)
    if rows == 0:
        return result
    if grad_out is not None and not has_form(logits.dtype, grad_out.dtype):
        logits = logits.detach().float()
    bias = aligned_bias(bias)
    row_scale = None if row_scale is None else row_scale.detach().to(torch.float32).contiguous()
    form = form_of(logits, grad_out, bias is not None or softcap is not None, entropy)
    if shape is None:
        read_twice = grad_out is not None and known is None
        multiprocessors = gpu_of(logits.device).multiprocessors
        shape = launch_shape(rows, vocab, logits.itemsize, multiprocessors, read_twice=read_twice)
    values = {
        "p_logits": logits.detach(),
        "p_targets": targets.contiguous(),
        # Pointers to nothing that is read or written stand for what there is not: fewer variants to compile.
        "p_bias": logp if bias is None else bias,
        "p_row_scale": logp if row_scale is None else row_scale,
        "p_logp": result.logp.contiguous(),
        "p_lse": result.lse.contiguous(),
        "p_entropy": logp if result.entropy is None else result.entropy,
        "p_grad": grad_out,
        "stride": logits.stride(0),
        "grad_stride": 0 if grad_out is None else grad_out.stride(0),
        "rows": rows,
        "vocab": vocab,
        "logit_scale": float(logit_scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "has_bias": int(bias is not None),
        "has_row_scale": int(row_scale is not None),
    }
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        if known is not None:
            launch_gradient(form, shape.segments, logits, targets, values)
        elif shape.segments > 1 and form.can_split:
            launch_split(form, shape.segments, logits, values)
        else:
            programs = rows if shape.programs is None else shape.programs
            launch(row_logprob_kernel, programs, form, shape.threads, logits.device, values)
    return result


def aot_variants() -> list[Variant]:
    """Every form with every number of threads that `launch_shape` chooses from."""
    return [
        variant("row_logprob", row_logprob_kernel, form, threads)
        for form in all_forms()
        for threads in reversed(THREADS)
    ]
