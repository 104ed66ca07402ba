"""Differentiable log-probs of responses, from hidden states and the LM head or from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_dpo.dispatch import backend_name
from robust_dpo.errors import argument_error
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops import inputs
from robust_dpo.ops.autocast import autocast_dtype, autocast_off
from robust_dpo.ops.choose_head import choose_head
from robust_dpo.ops.chunking import chunk_rows
from robust_dpo.ops.custom_op import custom_op
from robust_dpo.ops.head import HeadWeights
from robust_dpo.ops.logits_logps import logits_logps
from robust_dpo.ops.logp_pass import Logps, fake_logps, logp_pass
from robust_dpo.ops.row_selection import select_rows
from robust_dpo.ops.rows import cut_rows


class SequenceLogps(NamedTuple):
    """Log-probs of responses in nats, fp32 (float64 for float64 input).

    Args:
        logps: [S] of each response, the sum over its tokens; differentiable.
        token_logps: shaped like `targets`, of each token, 0 where the target is −100; differentiable.
        entropy: shaped like `targets`, of the distribution at each position, 0 where the target is −100; detached. None
            unless asked for.
    """

    logps: Tensor
    token_logps: Tensor
    entropy: Tensor | None


def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    seq_lens: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    per_token: bool = False,
    entropy: bool = False,
    backend: str = "auto",
    tile_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> Tensor | SequenceLogps:
    """Log-prob of each response, differentiable in `hidden`, `weight` and `bias`.

    Nothing of size N×V is kept: the backward pass computes the logits of each chunk again, 8·N·H·V operations in all.

    Args:
        hidden, weight, targets, seq_lens, bias, softcap, logit_scale, backend, tile_dtype, chunk_bytes: as in
            `linear_preference_loss`.
        per_token: also return the log-prob of each token.
        entropy: also return the entropy at each position (and the log-prob of each token).

    Returns:
        logps [S], or `SequenceLogps` where `per_token` or `entropy` is asked for; 0 for a response without a target.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: the backend that was asked for cannot run this.
    """
    hidden, weight = inputs.check_head("", hidden, weight, bias)
    inputs.check_targets(targets, hidden.shape[:-1], seq_lens, hidden.device, "hidden")
    softcap, logit_scale = inputs.check_logit_transform(softcap, logit_scale)
    dtype = autocast_dtype(hidden, weight)
    tile_dtype = inputs.check_tile_dtype(tile_dtype, dtype)
    result = _forward(
        hidden,
        weight,
        targets,
        seq_lens,
        bias,
        softcap,
        logit_scale,
        dtype,
        tile_dtype,
        *chunk_rows(weight.shape[0], tile_dtype or dtype, hidden.device, chunk_bytes, targets.numel()),
        backend_name(backend),
        entropy,
    )
    return _select(result, per_token, entropy)


def sequence_logps_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    seq_lens: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    per_token: bool = False,
    entropy: bool = False,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor | SequenceLogps:
    """Log-prob of each response from logits, differentiable in them.

    On a GPU nothing is read back: one launch takes all rows and skips those of ignored targets. The log-prob of a
    response with a target outside of [0, V) is NaN there, and so are all where `seq_lens` do not add up.

    Args:
        logits: [B, T, V], one response in every row, or [N, V], packed, with `seq_lens`. fp32, bf16, fp16 or float64.
        targets: [B, T] or [N] int64, already shifted, −100 where ignored.
        seq_lens, softcap, logit_scale, per_token, entropy, backend: as in `sequence_logps`.
        chunk_bytes: memory for copies of response rows where prompt rows lie between them.

    Returns:
        logps [S], or `SequenceLogps` where `per_token` or `entropy` is asked for.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: the backend that was asked for cannot run this.
    """
    logits = inputs.check_floating("logits", logits)
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0:
        raise argument_error("logits", "shape [B, T, V] or [N, V] with V > 0", list(logits.shape))
    inputs.check_targets(targets, logits.shape[:-1], seq_lens, logits.device, "logits")
    softcap, logit_scale = inputs.check_logit_transform(softcap, logit_scale)
    max_rows = chunk_rows(logits.shape[-1], logits.dtype, logits.device, chunk_bytes, targets.numel()).usual
    backend = backend_name(backend)
    logps, token_logps, entropies, _ = logits_logps(
        logits, targets, seq_lens, softcap, logit_scale, max_rows, backend, entropy
    )
    return _select((logps, token_logps, entropies), per_token, entropy)


def _select(result: tuple[Tensor, Tensor, Tensor], per_token: bool, entropy: bool) -> Tensor | SequenceLogps:
    logps, token_logps, entropies = result
    if not (per_token or entropy):
        return logps
    return SequenceLogps(logps, token_logps, entropies if entropy else None)


@custom_op("robust_dpo::sequence_logps")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_lens: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    compute_dtype: torch.dtype,
    tile_dtype: torch.dtype | None,
    usual_rows: int,
    max_rows: int,
    backend: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [S], token log-probs and entropies shaped like `targets` (entropies empty where not asked for)."""
    head = HeadWeights.prepare(weight, compute_dtype, bias, softcap, logit_scale)
    rows = select_rows(targets, seq_lens, weight.shape[0])
    engine = choose_head(head.weight, usual_rows, backend=backend, tile_dtype=tile_dtype)

    def forward(start: int, stop: int) -> RowLogprob:
        x = rows.gather(hidden, start, stop).to(compute_dtype)
        return engine.forward(head, x, rows.targets[start:stop], keep=False, entropy=entropy)

    with autocast_off(hidden.device):
        # Each chunk reads the whole weight.
        at_once = usual_rows if engine.writes_logits else max_rows
        return logp_pass(rows, targets, at_once, head.accumulation_dtype, entropy, forward)


@_forward.register_fake
def _fake_forward(hidden: Tensor, weight: Tensor, targets: Tensor, seq_lens: Tensor | None, *rest: Any) -> Logps:
    return fake_logps(targets, seq_lens, torch.promote_types(rest[3], torch.float32), rest[-1])


@custom_op("robust_dpo::sequence_logps_backward")
def _backward(
    grad_logps: Tensor | None,
    grad_token_logps: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_lens: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    compute_dtype: torch.dtype,
    tile_dtype: torch.dtype | None,
    usual_rows: int,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    head = HeadWeights.prepare(weight, compute_dtype, bias, softcap, logit_scale)
    rows = select_rows(targets, seq_lens, weight.shape[0])
    engine = choose_head(head.weight, usual_rows, backend=backend, tile_dtype=tile_dtype)
    gradients = engine.allocate(head, rows.count, needs_hidden, needs_weight, needs_bias)
    coefficients = rows.coefficients(grad_logps, grad_token_logps, head.accumulation_dtype)
    with autocast_off(hidden.device):
        for start, stop in cut_rows(0, rows.count, usual_rows):
            x, t = rows.gather(hidden, start, stop).to(compute_dtype), rows.targets[start:stop]
            kept = engine.forward(head, x, t, keep=True)
            engine.backward(head, x, t, kept, coefficients[start:stop], gradients, start)
    empty = hidden.new_empty
    grad_hidden = gradients.finished_hidden(hidden.dtype)
    return (
        empty(0) if grad_hidden is None else rows.spread(grad_hidden, hidden.shape),
        empty(0) if gradients.weight is None else gradients.weight.to(weight.dtype),
        empty(0) if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
    )


@_backward.register_fake
def _fake_backward(
    grad_logps: Tensor | None,
    grad_token_logps: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    bias = rest[2]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = (*inputs[5:10], inputs[11])


def _autograd(ctx: Any, grad_logps: Tensor | None, grad_token_logps: Tensor | None, _: object) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
    if grad_logps is None and grad_token_logps is None:
        return (None,) * 13
    result = _backward(grad_logps, grad_token_logps, *tensors, *ctx.settings, *needs)
    grads = [gradient if need else None for gradient, need in zip(result, needs, strict=True)]
    return grads[0], grads[1], None, None, grads[2], *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)
