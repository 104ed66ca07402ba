"""The robust preference loss from hidden states and the LM head, with its gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust_dpo import losses
from robust_dpo.dispatch import backend_name
from robust_dpo.errors import argument_error
from robust_dpo.ops import inputs
from robust_dpo.ops.autocast import autocast_dtype, autocast_off
from robust_dpo.ops.batch_layout import BatchLayout
from robust_dpo.ops.choose_head import hidden_gradient_dtype
from robust_dpo.ops.chunking import ChunkRows, chunk_rows
from robust_dpo.ops.custom_op import custom_op
from robust_dpo.ops.grouped_head import GroupedHead, GroupedResult, Reference
from robust_dpo.ops.head import HeadWeights
from robust_dpo.ops.objective import forget, name_objective, named, refuse_parameters
from robust_dpo.ops.precision import exact_dtype
from robust_dpo.ops.scaling import first_order, scaled
from robust_dpo.output import PreferenceOutput
from robust_dpo.robust import RobustObjective


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group_size: int = 2,
    group_sizes: Tensor | None = None,
    seq_lens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    loss: str | Callable[..., Tensor] | losses.BoundLoss = "sigmoid",
    beta: float | None = None,
    robust: str | RobustObjective = "mean",
    calibration: Tensor | None = None,
    scores: Tensor | None = None,
    log_normalizer: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    tile_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    **loss_options: Any,
) -> PreferenceOutput:
    """Robust preference loss of responses given as hidden states, without ever holding their logits.

    Rows whose target is −100 (prompt, padding) are dropped before the first matrix product. The rest goes through the
    head in chunks of whole groups; loss and gradients come out of the same pass: 6·N·H·V operations for N response
    rows, 8 with a live reference. Aggregations that are not exponential tilts (`single_pass` False) and losses that
    couple groups take a pass over the log-probs first (+2). logits = softcap·tanh(logit_scale·(x Wᵀ + bias)/softcap).

    On a GPU the lengths of the responses are read once, before the first product, and contents are checked with them.
    Packed rows with `seq_lens` on the CPU (`group_sizes`, where given, there too) need no read: the host never waits,
    and after a first call with the same lengths the call can be captured into a CUDA graph. Then rows of ignored
    targets are computed and weigh nothing, and what is wrong in a tensor's contents makes the loss NaN.

    Args:
        hidden: [B, T, H], one response in every row, rows of a group adjacent; or [N, H], responses packed one after
            the other, with `seq_lens`. fp32, bf16, fp16 or float64.
        weight: [V, H] LM head, same dtype and device.
        targets: [B, T] or [N] int64, the token that each position predicts (already shifted), −100 where ignored. A
            response without any target is not refused: its log-prob is the empty sum, 0, it counts as one token long,
            and its `ref_logps` are taken as they are. Leave such groups out.
        group_size: responses of every group (2: chosen, rejected).
        group_sizes: [G] integers, for groups of different sizes; `group_size` is then not used.
        seq_lens: [S] integers, rows of each packed response; on the CPU, or beside the targets.
        bias: [V] of the head.
        ref_logps: [S] log-probs of the responses under the reference, or
        ref_hidden: the reference's hidden states, shaped like `hidden` in its leading dimensions, with
        ref_weight: [V, H'] its head, and
        ref_bias: [V].
        loss: a name of `robust_dpo.losses.available_losses()`, or a function `Groups -> [G]`.
        beta: scale of the implicit reward; None takes the loss's default (0.1 for most).
        robust: "mean", "kl", "kl_radius", "dr_dpo", or an object such as `KLRobust(lam=1.0)`.
        calibration: h ≥ 0, [G], or [S] to be averaged over each group.
        scores: [S] quality of the responses, higher is better; without, responses are taken best first.
        log_normalizer: [] log Σ e^s over a larger batch that this call is a part of; then the gradients of the parts
            add up to the gradient of the whole batch. See `PreferenceOutput.log_partition`. Only for exponential tilts
            of losses that do not couple groups.
        softcap: final logit softcap > 0.
        logit_scale: factor of the logits.
        backend: "auto", or one that must be used: "torch", "cpu", "triton" (no float64), or a registered one.
        tile_dtype: dtype in which logits meet the softmax: torch.float32, the inputs' own, or None for the accurate one
            where it is cheap.
        chunk_bytes: memory for the logits of a chunk; None takes the default of the device, which is more where a
            single group would not fit otherwise.
        **loss_options: options of the loss, such as `label_smoothing`.

    Returns:
        `PreferenceOutput`; only `.loss` is differentiable, in `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: the backend that was asked for cannot run this.
    """
    hidden, weight = inputs.check_head("", hidden, weight, bias)
    device = hidden.device
    responses = inputs.check_targets(targets, hidden.shape[:-1], seq_lens, device, "hidden")
    groups = inputs.count_groups(responses, group_size, group_sizes, device)
    live_reference = _check_reference(hidden, weight, ref_logps, ref_hidden, ref_weight, ref_bias)
    inputs.check_group_vectors(responses, groups, device, ref_logps, calibration, scores, log_normalizer)
    softcap, logit_scale = inputs.check_logit_transform(softcap, logit_scale)
    compute_dtype = autocast_dtype(hidden, weight)
    tile_dtype = inputs.check_tile_dtype(tile_dtype, compute_dtype)
    refuse_parameters(loss)
    objective = name_objective(loss, beta, loss_options, robust, linear_preference_loss)
    rows = hidden.shape[0] * (hidden.shape[1] if hidden.ndim == 3 else 1)
    live = torch.is_grad_enabled()
    try:
        result = GroupedResult(
            *_operator(
                hidden,
                weight,
                targets,
                seq_lens,
                None if group_sizes is not None else group_size,
                group_sizes,
                bias,
                ref_logps,
                ref_hidden,
                ref_weight,
                ref_bias,
                calibration,
                scores,
                log_normalizer,
                objective,
                softcap,
                logit_scale,
                compute_dtype,
                tile_dtype,
                *chunk_rows(weight.shape[0], tile_dtype or compute_dtype, device, chunk_bytes, rows),
                backend_name(backend),
                live and hidden.requires_grad,
                live and weight.requires_grad,
                live and bias is not None and bias.requires_grad,
            )
        )
    finally:
        forget(objective)
    has_reference = live_reference or ref_logps is not None
    return PreferenceOutput(
        loss=result.loss,
        logps=result.logps,
        ref_logps=result.ref_logps if has_reference else None,
        log_ratios=result.logps - result.ref_logps if has_reference else None,
        group_losses=result.group_losses,
        weights=result.weights,
        ess=1 / result.weights.square().sum(),
        parameter=result.parameter,
        log_partition=result.log_partition,
    )


def _check_reference(
    hidden: Tensor, weight: Tensor, ref_logps: object, ref_hidden: object, ref_weight: object, ref_bias: object
) -> bool:
    """Whether the reference comes as hidden states; refuses half a reference and two of them."""
    if ref_hidden is None and ref_weight is None:
        if ref_bias is not None:
            raise argument_error("ref_bias", "None without ref_hidden and ref_weight", "a tensor")
        return False
    if ref_logps is not None:
        raise argument_error("ref_logps", "None beside ref_hidden and ref_weight", "a tensor")
    if ref_hidden is None or ref_weight is None:
        missing, given = ("ref_hidden", "ref_weight") if ref_hidden is None else ("ref_weight", "ref_hidden")
        raise argument_error(missing, f"a tensor beside {given}", None)
    states, matrix = inputs.check_head("ref_", ref_hidden, ref_weight, ref_bias)
    if states.shape[:-1] != hidden.shape[:-1]:
        raise argument_error("ref_hidden", f"the leading dimensions {list(hidden.shape[:-1])}", list(states.shape))
    if matrix.shape[0] != weight.shape[0]:
        raise argument_error("ref_weight", f"a vocabulary of {weight.shape[0]}", matrix.shape[0])
    if states.device != hidden.device:
        raise argument_error("ref_hidden", f"a tensor on {hidden.device}", states.device)
    return True


@custom_op("robust_dpo::linear_preference_loss")
def _operator(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_lens: Tensor | None,
    group_size: int | None,
    group_sizes: Tensor | None,
    bias: Tensor | None,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    calibration: Tensor | None,
    scores: Tensor | None,
    log_normalizer: Tensor | None,
    objective: str,
    softcap: float | None,
    logit_scale: float,
    compute_dtype: torch.dtype,
    tile_dtype: torch.dtype | None,
    usual_rows: int,
    max_rows: int,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`GroupedResult`, field by field."""
    with autocast_off(hidden.device):
        head = HeadWeights.prepare(weight, compute_dtype, bias, softcap, logit_scale)
        layout = BatchLayout.read(
            targets,
            seq_lens,
            group_size,
            group_sizes,
            len(weight),
            ref_logps,
            calibration,
            scores,
            head.accumulation_dtype,
        )
        reference: Reference | Tensor | None = ref_logps
        if ref_hidden is not None and ref_weight is not None:
            ref_head = HeadWeights.prepare(ref_weight, compute_dtype, ref_bias, softcap, logit_scale)
            reference = Reference(ref_head, ref_hidden)
        rows = ChunkRows(usual_rows, max_rows)
        run = GroupedHead(head, hidden, layout, reference, scores, rows=rows, backend=backend, tile_dtype=tile_dtype)
        return run.solve(named(objective), log_normalizer, needs_hidden, needs_weight, needs_bias)


@_operator.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_lens: Tensor | None,
    group_size: int | None,
    group_sizes: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    compute_dtype, tile_dtype, _, _, backend, needs_hidden, needs_weight, needs_bias = rest[-8:]
    dtype = torch.promote_types(compute_dtype, torch.float32)
    responses = hidden.shape[0] if seq_lens is None else seq_lens.shape[0]
    groups = group_sizes.shape[0] if group_sizes is not None else responses // (group_size or 1)

    def empty(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    has_reference = rest[0] is not None or rest[1] is not None
    return GroupedResult(
        loss=empty(),
        logps=empty(responses),
        ref_logps=empty(responses) if has_reference else empty(0),
        group_losses=empty(groups),
        weights=empty(groups),
        parameter=empty(),
        log_partition=hidden.new_empty((), dtype=exact_dtype(hidden.device)),
        grad_hidden=hidden.new_empty(
            hidden.shape, dtype=hidden_gradient_dtype(hidden.device, compute_dtype, backend, tile_dtype)
        )
        if needs_hidden
        else empty(0),
        grad_weight=empty(*weight.shape) if needs_weight else empty(0),
        grad_bias=empty(weight.shape[0]) if needs_bias else empty(0),
        grad_factor=empty(),
        hidden_factors=empty(*hidden.shape[:-1]) if needs_hidden else empty(0),
    )


_INPUTS = 25
_GRADIENTS = {7: 0, 8: 1, 9: 6}  # output of the operator: the input whose gradient it is


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(output[i] for i in (*_GRADIENTS, 10, 11)))
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in _GRADIENTS.values()]
    ctx.wanted = inputs[-3:]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * _INPUTS
    if grad_loss is not None:
        *gradients, factor, hidden_factors = ctx.saved_tensors
        scale = factor * grad_loss
        scales = ((hidden_factors * scale)[..., None], scale, scale)
        each = zip(gradients, scales, ctx.dtypes, ctx.wanted, _GRADIENTS.values(), strict=True)
        for gradient, own_scale, dtype, wanted, place in each:
            if wanted and ctx.needs_input_grad[place]:
                result[place] = scaled(gradient, own_scale, dtype)
    return first_order("linear_preference_loss", result)


_operator.register_autograd(_backward, setup_context=_setup_context)
