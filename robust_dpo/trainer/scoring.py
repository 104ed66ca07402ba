"""From a model and a batch to sequence log-probs, through the fused head or through the model's own logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from robust_dpo import ops
from robust_dpo.trainer.head import capture_head_input, linear_head
from robust_dpo.trainer.self_check import HeadCheck

IGNORED = -100
Batch = dict[str, Any]


def shifted_targets(batch: Batch) -> Tensor:
    """[S, T] int64, the token that each position predicts; -100 where there is none (prompt, padding, last)."""
    targets: Tensor = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return targets


def response_lengths(batch: Batch) -> Tensor:
    """[S] int64, tokens of each response."""
    lengths: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(1)
    return lengths


@dataclass(frozen=True)
class SequenceScorer:
    """Runs one kind of model.

    Args:
        check: whether its head may be fused, and what it does to its logits.
        backend: backend of the fused operators.
    """

    check: HeadCheck
    backend: str = "auto"

    @property
    def fused(self) -> bool:
        return self.check.head is not None

    def for_copy(self, model: nn.Module) -> SequenceScorer:
        """The scorer of a copy of the model that this one is for."""
        return replace(self, check=replace(self.check, head=linear_head(model) if self.fused else None))

    def head_arguments(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Hidden [S, T, H], weight, bias, softcap, logit_scale and backend, as the fused operators take them.

        `model` is the wrapped one, so that DDP's hooks run.
        """
        head, transform = self.check.head, self.check.transform
        assert head is not None
        with capture_head_input(head) as captured:
            model(**_model_inputs(batch))
        return {
            "hidden": _real_positions(captured[0], batch),
            "weight": head.weight,
            "bias": head.bias,
            "softcap": transform.softcap,
            "logit_scale": transform.logit_scale,
            "backend": self.backend,
        }

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S] float32, log-prob of each response, differentiable."""
        targets = shifted_targets(batch)
        if self.fused:
            logps = ops.sequence_logps(targets=targets, **self.head_arguments(model, batch))
        else:
            logits = _real_positions(model(**_model_inputs(batch)).logits, batch)
            logps = ops.sequence_logps_from_logits(logits, targets, backend=self.backend)
        assert isinstance(logps, Tensor)
        return logps


def _model_inputs(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _real_positions(values: Tensor, batch: Batch) -> Tensor:
    """[S, T, ...] without the virtual tokens that prompt-learning adapters put in front."""
    return values[:, -batch["input_ids"].shape[1] :]
