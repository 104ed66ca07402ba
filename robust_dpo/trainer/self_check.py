"""Does the fused head compute what the model computes? Asked of the model itself, once, before its first loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from robust_dpo.ops.autocast import autocast_off
from robust_dpo.trainer.dropout import evaluating
from robust_dpo.trainer.head import LogitTransform, candidate_transforms, in_place_of_head, linear_head

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


def check_head(model: Any, run: nn.Module | None = None) -> HeadCheck:
    """Compare log-probs from what the head is given with the model's own ones, in float32, on one tiny batch.

    Args:
        model: a causal language model, not wrapped. Runs twice without gradients, in eval mode.
        run: the same, wrapped as it will be run, where ranks share its weights; then all of them check it together.
    """
    head, run = linear_head(model), model if run is None else run
    if head is None:
        return HeadCheck(None, LogitTransform(), "the output layer is not a plain nn.Linear")
    input_ids = torch.arange(16, device=head.weight.device).view(2, 8) % head.out_features
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    with torch.no_grad(), evaluating(run):
        with in_place_of_head(head, lambda hidden: (tuple(hidden.shape), isinstance(head.weight, DTensor))) as seen:
            run(**inputs)
        if [shape[:2] for shape, _ in seen] != [input_ids.shape]:
            shapes = [shape for shape, _ in seen]
            return HeadCheck(None, LogitTransform(), f"the output layer was given {shapes}, not one [B, T, H] tensor")
        if seen[0][1]:
            return HeadCheck(None, LogitTransform(), "ranks hold parts of its weight while it runs (tensor parallel)")
        probe = _amplified_forward(run, head, inputs)
        expected = probe.native.float().log_softmax(-1)
        if not bool(expected.isfinite().all()):
            return HeadCheck(None, LogitTransform(), "the model gives log-probs that are not finite")
        worst: list[str] = []
        for transform in candidate_transforms(model.config):
            ours = transform(probe.products)
            error = (ours.log_softmax(-1) - expected).abs().max()
            if bool(error <= _ROUNDINGS * probe.eps * ours.abs().max()):
                return HeadCheck(head, transform)
            worst.append(f"{transform}: off by {float(error):.3g}")
    return HeadCheck(None, LogitTransform(), "fused and native log-probs differ (" + "; ".join(worst) + ")")


@dataclass(frozen=True)
class _Probe:
    """x Wᵀ + b in float32 [B, T, V], the model's own logits [B, T, V], and the eps of the dtypes they went through."""

    products: Tensor
    native: Tensor
    eps: float


def _amplified_forward(run: nn.Module, head: nn.Linear, inputs: dict[str, Any]) -> _Probe:
    """A forward pass with the head's input blown up, and what the head ought to make of it."""
    products: list[Tensor] = []
    dtypes: list[torch.dtype] = []

    def amplify(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # Here, as an engine that shards the weight has gathered it.
        largest = nn.functional.linear(args[0], head.weight).abs().max().float().clamp(min=1e-6)
        hidden = args[0] * (_PROBE_LOGIT / largest).to(args[0].dtype)
        device = hidden.device.type
        dtypes.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype)
        with autocast_off(hidden.device):
            products.append(nn.functional.linear(hidden.float(), head.weight.float(), _float(head.bias)))
        return (hidden,)

    handle = head.register_forward_pre_hook(amplify)
    try:
        native = run(**inputs).logits
    finally:
        handle.remove()
    eps = max(*(torch.finfo(dtype).eps for dtype in (native.dtype, *dtypes)), _SMALLEST_EPS)
    return _Probe(products[0], native, eps)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
