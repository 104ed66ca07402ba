"""row_logprob in Triton: log-prob, log-sum-exp, entropy and gradient of every row of a tile in one launch.

One program takes one row. It reads the row twice, for the statistics and for the gradient; rows in flight are kept to
what the L2 cache holds, so that the second read does not come from memory. Few long rows go to
row_logprob_split_triton.py instead.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from robust_dpo.errors import argument_error
from robust_dpo.kernels.row_blocks import (
    finish,
    load_target,
    row_head,
    row_start,
    row_statistics,
    transform,
    write_gradient,
)
from robust_dpo.kernels.row_launch import (
    TYPE_NAMES,
    LaunchShape,
    all_forms,
    form_of,
    launch,
    launch_shape,
    variant,
)
from robust_dpo.kernels.row_logprob import RowLogprob, check_arguments
from robust_dpo.kernels.row_logprob_split_triton import launch_split
from robust_dpo.kernels.triton_aot import Variant


@triton.jit(do_not_specialize=["vocab", "has_bias", "has_row_scale"])
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
    vocab: tl.tensor,
    logit_scale: tl.tensor,
    softcap: tl.tensor,
    has_bias: tl.tensor,
    has_row_scale: tl.tensor,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE_STORE: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> None:
    """Results of one row, and its gradient where p_grad is given."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = row_start(p_logits, i_row, stride, ALIGNED)
    target, z_target = load_target(p_row, p_targets + i_row, vocab)
    head = row_head(p_row, vocab, ALIGNED)
    n_vec = (vocab - head) // VECTOR
    span = (head, head * 0, n_vec, n_vec, vocab, target)
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    m, s, t = row_statistics(
        p_row, span, head_of_model,
        VECTOR, LANES, ALIGNED, TRANSFORMED, ENTROPY, "evict_first" if p_grad is None else "evict_last",
    )  # fmt: skip
    v_target, _ = transform(z_target, target, target >= 0, head_of_model, TRANSFORMED)
    logp, lse, entropy, total, target_factor = finish(m, s, t, v_target, target)
    tl.store(p_logp + i_row, logp)
    tl.store(p_lse + i_row, lse)
    if ENTROPY:
        tl.store(p_entropy + i_row, entropy)
    if p_grad is not None:
        scale = tl.load(p_row_scale + i_row, mask=has_row_scale != 0, other=1.0) * logit_scale
        p_grad_row = row_start(p_grad, i_row, grad_stride, ALIGNED)
        result = (m, scale / total, scale * target_factor)
        write_gradient(p_row, p_grad_row, span, head_of_model, result, VECTOR, LANES, ALIGNED, WIDE_STORE, TRANSFORMED)


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
    shape: LaunchShape | None = None,
) -> RowLogprob:
    """Token log-prob of every row, and its gradient in place; see `RowLogprobLauncher`.

    A target outside of [0, V) gives logp NaN and a gradient without onehot. Results are the same bits in every call
    with the same shapes, strides and alignment. `shape` is for measurements: another than `launch_shape` would choose.
    """
    check_arguments(logits, targets, bias, softcap, grad_out, row_scale)
    if logits.dtype not in TYPE_NAMES:
        raise argument_error("logits", "dtype float32, bfloat16 or float16 for Triton", logits.dtype)
    if isinstance(row_logprob_kernel, JITFunction) and not logits.is_cuda:
        raise argument_error("logits", "a tensor on a GPU (or TRITON_INTERPRET=1 in the environment)", logits.device)
    rows, vocab = logits.shape
    logp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    result = RowLogprob(logp, torch.empty_like(logp), torch.empty_like(logp) if entropy else None)
    if rows == 0:
        return result
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    row_scale = None if row_scale is None else row_scale.detach().to(torch.float32).contiguous()
    form = form_of(logits, grad_out, bias, softcap is not None, entropy)
    if shape is None:
        shape = launch_shape(rows, vocab, logits.itemsize, _multiprocessors(logits.device))
    values = {
        "p_logits": logits.detach(),
        "p_targets": targets.contiguous(),
        # Pointers to nothing that is read or written stand for what there is not: fewer variants to compile.
        "p_bias": logp if bias is None else bias,
        "p_row_scale": logp if row_scale is None else row_scale,
        "p_logp": logp,
        "p_lse": result.lse,
        "p_entropy": logp if result.entropy is None else result.entropy,
        "p_grad": grad_out,
        "stride": logits.stride(0),
        "grad_stride": 0 if grad_out is None else grad_out.stride(0),
        "vocab": vocab,
        "logit_scale": float(logit_scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "has_bias": int(bias is not None),
        "has_row_scale": int(row_scale is not None),
    }
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        if shape.segments > 1 and form.can_split:
            launch_split(form, shape.segments, logits, values)
        else:
            launch(row_logprob_kernel, rows, form, shape.threads, values)
    return result


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def aot_variants() -> list[Variant]:
    """Every form with the most threads, where registers are fewest, the common ones with fewer threads too."""
    return [
        variant("row_logprob", row_logprob_kernel, form, threads)
        for form in all_forms()
        for threads in (128, 256, 512, 1024)
        if threads == 1024 or (form.aligned and not form.entropy and (threads == 512 or not form.transformed))
    ]
