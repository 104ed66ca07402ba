"""The gradient of row_logprob in Triton where its results are known: one read of the tile, one write."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from robust_dpo.kernels.row_blocks import locate_target, row_start, span_of
from robust_dpo.kernels.row_gradient import write_gradient
from robust_dpo.kernels.row_launch import (
    SPLIT_THREADS,
    RowForm,
    all_forms,
    launch,
    row_jit,
    segments_of,
    variant,
)
from robust_dpo.kernels.row_logits import expm1, transform
from robust_dpo.kernels.triton_aot import Variant


@triton.jit
def exact_difference(v_target: tl.tensor, logp: tl.tensor, lse: tl.tensor, is_usable: tl.tensor) -> tl.tuple:
    """The log-sum-exp v_target − logp as a number and what its rounding has lost; `lse` and 0 where it is not usable.

    In fp32 alone, all probabilities of a row with logits around 1e4 would be off by 1e-4.
    """
    high = tl.where(is_usable, v_target - logp, lse)
    back = high - v_target
    low = (v_target - (high - back)) - (logp + back)
    return high, tl.where(is_usable, low, 0.0)


@row_jit
def row_gradient_kernel(
    p_logits: tl.tensor,
    p_targets: tl.tensor,
    p_bias: tl.tensor,
    p_row_scale: tl.tensor,
    p_logp: tl.tensor,
    p_lse: tl.tensor,
    p_target_logits: tl.tensor,
    p_grad: tl.tensor,
    stride: tl.int64,
    grad_stride: tl.int64,
    vocab: tl.int32,
    segments: tl.int32,
    segment_vecs: tl.int32,
    logit_scale: tl.float32,
    softcap: tl.float32,
    has_bias: tl.int32,
    has_row_scale: tl.int32,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE_STORE: tl.constexpr,
    TRANSFORMED: tl.constexpr,
) -> None:
    """The gradient of one segment of a row: e^{v − lse}, and e^logp − 1 at the target."""
    i_row = (tl.program_id(0) // segments).to(tl.int64)
    i_segment = tl.program_id(0) % segments
    p_row = row_start(p_logits, i_row, stride, ALIGNED)
    p_grad_row = row_start(p_grad, i_row, grad_stride, ALIGNED)
    target, is_read = locate_target(p_targets + i_row, vocab)
    span = span_of(p_row, i_segment, segment_vecs, vocab, target, is_read, VECTOR, ALIGNED)
    scale = tl.load(p_row_scale + i_row, mask=is_read & (has_row_scale != 0), other=1.0) * logit_scale
    logp = tl.load(p_logp + i_row, mask=is_read, other=0.0)
    lse = tl.load(p_lse + i_row, mask=is_read, other=0.0)
    head_of_model = (p_bias, has_bias, logit_scale, softcap)
    z_target = tl.load(p_target_logits + i_row, mask=is_read, other=0.0).to(tl.float32)
    v_target, _ = transform(z_target, target, target >= 0, head_of_model, TRANSFORMED)
    lse, below = exact_difference(v_target, logp, lse, (target >= 0) & (logp > float("-inf")))
    result = (lse, tl.where(is_read, scale * tl.exp(-below), 0.0), scale * expm1(logp))
    write_gradient(p_row, p_grad_row, span, head_of_model, result, VECTOR, LANES, ALIGNED, WIDE_STORE, TRANSFORMED)


def launch_gradient(
    form: RowForm, segments: int, logits: Tensor, targets: Tensor, values: Mapping[str, object]
) -> None:
    """The gradient of `logits`, each row by up to `segments` programs.

    Args:
        form: one with a gradient.
        segments: at most 64; one where the form cannot be split.
        logits: [n, V].
        targets: [n].
        values: runtime parameters of `row_logprob_kernel`, by name.
    """
    rows, vocab = logits.shape
    segments, segment_vecs = segments_of(vocab, segments if form.can_split else 1, form, SPLIT_THREADS)
    # In place, another program may have overwritten the target's logit by the time that one needs it.
    target_logits = logits.detach().gather(1, targets.clamp(0, vocab - 1)[:, None])
    values = {**values, "p_target_logits": target_logits, "segments": segments, "segment_vecs": segment_vecs}
    launch(row_gradient_kernel, rows * segments, form, SPLIT_THREADS, logits.device, values)


def aot_variants() -> list[Variant]:
    """Every form with a gradient; none depends on the entropy, which is not computed."""
    forms = [form for form in all_forms() if form.grad is not None and not form.entropy]
    return [variant("row_gradient", row_gradient_kernel, form, SPLIT_THREADS) for form in forms]
