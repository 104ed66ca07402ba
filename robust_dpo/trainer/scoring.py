"""From a model and a batch to sequence log-probs, through the fused head or through the model's own logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
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
    """Runs one kind of model. `check` says whether its head may be fused, and how its logits are made."""

    check: HeadCheck

    @property
    def fused(self) -> bool:
        return self.check.head is not None

    def for_copy(self, model: nn.Module) -> SequenceScorer:
        """The scorer of a copy of the model that this one is for."""
        return SequenceScorer(replace(self.check, head=linear_head(model) if self.fused else None))

    def head_input(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S, T, H], what the head of `model` (the wrapped one: DDP's hooks run) is given. For the fused route."""
        assert self.check.head is not None
        with capture_head_input(self.check.head) as captured:
            model(**_model_inputs(batch))
        # Prompt-learning adapters put virtual tokens in front.
        return captured[0][:, -batch["input_ids"].shape[1] :]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S, T, V], the model's own logits."""
        logits: Tensor = model(**_model_inputs(batch)).logits
        return logits[:, -batch["input_ids"].shape[1] :]

    def head_arguments(self) -> dict[str, Any]:
        """weight, bias, softcap and logit_scale as the fused operators take them."""
        head, transform = self.check.head, self.check.transform
        assert head is not None
        return {
            "weight": head.weight,
            "bias": head.bias,
            "softcap": transform.softcap,
            "logit_scale": transform.logit_scale,
        }

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S] float32, log-prob of each response, without gradient."""
        targets = shifted_targets(batch)
        with torch.no_grad():
            if self.fused:
                hidden = self.head_input(model, batch)
                return ops.sequence_logps(hidden, targets=targets, **self.head_arguments()).detach()
            return ops.sequence_logps_from_logits(self.logits(model, batch), targets).detach()


def _model_inputs(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
