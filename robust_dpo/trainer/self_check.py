"""Does the fused head compute what the model computes? Asked of the model itself, once, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_dpo.trainer.dropout import evaluating
from robust_dpo.trainer.head import LogitTransform, candidate_transforms, capture_head_input, linear_head

# Logits are blown up to this size for the check: a softcap of 30 changes small logits by less than rounding does,
# and would go unseen on a model whose logits are still small, only to matter later in training.
_PROBE_LOGIT = 60.0
# Allowed error of a log-prob in units of eps(dtype) · largest logit: rounding of the native logits themselves, plus
# a sum over H that is taken in another order.
_ROUNDINGS = 32.0
# fp16 and fp32 heads may still be multiplied in TF32 or bf16 passes on accelerators, so no tighter than this.
_SMALLEST_EPS = 1e-5


@dataclass(frozen=True)
class HeadCheck:
    """Outcome of the self-check.

    Args:
        head: the linear head that may be fused, or None where the model's own logits have to be used.
        transform: what the model does to the head's output.
        reason: why the head cannot be fused; empty where it can.
    """

    head: nn.Linear | None
    transform: LogitTransform
    reason: str = ""


def check_head(model: Any) -> HeadCheck:
    """Compare log-probs from the captured head input with the model's native ones, in float32, on one tiny batch.

    Args:
        model: a causal language model, not wrapped, on its device. Runs twice without gradients, in eval mode.
    """
    head = linear_head(model)
    if head is None:
        return HeadCheck(None, LogitTransform(), "the output layer is not a plain nn.Linear")
    input_ids = torch.arange(16, device=head.weight.device).view(2, 8) % head.out_features
    attention_mask = torch.ones_like(input_ids)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    with torch.no_grad(), evaluating(model):
        with capture_head_input(head) as captured:
            model(**inputs)
        if len(captured) != 1 or captured[0].shape[:2] != input_ids.shape:
            shapes = [tuple(hidden.shape) for hidden in captured]
            return HeadCheck(None, LogitTransform(), f"the output layer was given {shapes}, not one [B, T, H] tensor")
        hidden, native = _amplified_forward(model, head, inputs)
        logits = nn.functional.linear(hidden.float(), head.weight.float(), _float(head.bias))
        expected = native.float().log_softmax(-1)
        if not bool(expected.isfinite().all()):
            return HeadCheck(None, LogitTransform(), "the model gives log-probs that are not finite")
        eps = max(torch.finfo(native.dtype).eps, torch.finfo(head.weight.dtype).eps, _SMALLEST_EPS)
        worst: list[str] = []
        for transform in candidate_transforms(model.config):
            ours = transform(logits)
            error = (ours.log_softmax(-1) - expected).abs().max()
            if bool(error <= _ROUNDINGS * eps * ours.abs().max()):
                return HeadCheck(head, transform)
            worst.append(f"{transform}: off by {float(error):.3g}")
    return HeadCheck(None, LogitTransform(), "fused and native log-probs differ (" + "; ".join(worst) + ")")


def _amplified_forward(model: nn.Module, head: nn.Linear, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Native forward pass with the head's input blown up: (what the head was given [B, T, H], logits [B, T, V])."""
    seen: list[Tensor] = []

    def amplify(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        largest = nn.functional.linear(args[0], head.weight).abs().max().float().clamp(min=1e-6)
        seen.append(args[0] * (_PROBE_LOGIT / largest).to(args[0].dtype))
        return (seen[0],)

    handle = head.register_forward_pre_hook(amplify)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return seen[0], logits


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
