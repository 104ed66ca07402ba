"""The custom op behind `sequence_logps_from_logits`: the row kernel on logits that exist already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_dpo.dispatch import get_row_logprob
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops.custom_op import custom_op
from robust_dpo.ops.dense_logits import DenseRows, dense_logps
from robust_dpo.ops.logp_pass import fake_logps, logp_pass
from robust_dpo.ops.row_selection import select_rows
from robust_dpo.ops.rows import cut_rows


def takes_all_rows(device: torch.device) -> bool:
    """Whether rows without a target go to the kernel, which skips them: to leave them out is to wait for a device."""
    return device.type != "cpu"


@custom_op("robust_dpo::logits_logps")
def logits_logps(
    logits: Tensor,
    targets: Tensor,
    seq_lens: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    max_rows: int,
    backend: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [S], token log-probs and entropies shaped like `targets` (entropies empty where not asked for).

    And for the backward pass log-probs and log-sum-exps of all rows [2, M], where all rows were taken, otherwise [0].
    """
    launch = get_row_logprob(backend, logits.device, logits.dtype)
    dense = DenseRows.of(logits, targets) if takes_all_rows(logits.device) else None
    if dense is not None:
        found = launch(dense.matrix(logits), dense.targets, softcap=softcap, logit_scale=logit_scale, entropy=entropy)
        return *dense_logps(dense, found, seq_lens), torch.stack([found.logp, found.lse])
    rows = select_rows(targets, seq_lens, logits.shape[-1])

    def forward(start: int, stop: int) -> RowLogprob:
        tile = rows.gather(logits, start, stop)
        return launch(tile, rows.targets[start:stop], softcap=softcap, logit_scale=logit_scale, entropy=entropy)

    dtype = torch.promote_types(logits.dtype, torch.float32)
    return *logp_pass(rows, targets, max_rows, dtype, entropy, forward), logits.new_empty((2, 0), dtype=dtype)


@logits_logps.register_fake
def _fake(
    logits: Tensor, targets: Tensor, seq_lens: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    dense = DenseRows.of(logits, targets) if takes_all_rows(logits.device) else None
    known = logits.new_empty((2, 0 if dense is None else len(dense.targets)), dtype=dtype)
    return *fake_logps(targets, seq_lens, dtype, rest[-1]), known


@custom_op("robust_dpo::logits_logps_backward")
def _backward(
    grad_logps: Tensor | None,
    grad_token_logps: Tensor | None,
    known: Tensor,
    logits: Tensor,
    targets: Tensor,
    seq_lens: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    max_rows: int,
    backend: str,
) -> Tensor:
    """Gradient of the logits, in their dtype; zero in rows whose target is −100."""
    launch = get_row_logprob(backend, logits.device, logits.dtype)
    dense = DenseRows.of(logits, targets) if takes_all_rows(logits.device) else None
    if dense is not None:
        gradient = dense.new_gradient(logits)
        launch(
            dense.matrix(logits),
            dense.targets,
            softcap=softcap,
            logit_scale=logit_scale,
            grad_out=dense.matrix(gradient),
            row_scale=dense.coefficients(grad_logps, grad_token_logps, seq_lens),
            known=RowLogprob(known[0], known[1], None),
        )
        return gradient
    rows = select_rows(targets, seq_lens, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    coefficients = rows.coefficients(grad_logps, grad_token_logps, dtype)
    every = rows.index is None
    allocate = logits.new_empty if every else logits.new_zeros
    gradient = allocate((targets.numel(), logits.shape[-1]))
    for start, stop in cut_rows(0, rows.count, max_rows):
        tile = rows.gather(logits, start, stop)
        # A gathered tile is a copy, so its gradient can take its place before it goes where it belongs.
        out = gradient[start:stop] if every else tile
        launch(
            tile,
            rows.targets[start:stop],
            softcap=softcap,
            logit_scale=logit_scale,
            grad_out=out,
            row_scale=coefficients[start:stop],
        )
        if rows.index is not None:
            gradient[rows.index[start:stop]] = out
    return gradient.view(logits.shape)


@_backward.register_fake
def _fake_backward(
    grad_logps: Tensor | None, grad_token_logps: Tensor | None, known: Tensor, logits: Tensor, *rest: Any
) -> Tensor:
    dense = DenseRows.of(logits, rest[0]) if takes_all_rows(logits.device) else None
    return logits.new_empty(logits.shape) if dense is None else dense.new_gradient(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], *inputs[:3])
    ctx.settings = inputs[3:7]


def _autograd(ctx: Any, grad_logps: Tensor | None, grad_token_logps: Tensor | None, *_: object) -> tuple[Any, ...]:
    gradient = None
    if grad_logps is not None or grad_token_logps is not None:
        gradient = _backward(grad_logps, grad_token_logps, *ctx.saved_tensors, *ctx.settings)
    return gradient, *(None,) * 7


logits_logps.register_autograd(_autograd, setup_context=_setup_context)
