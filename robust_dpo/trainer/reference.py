"""The reference: whose log-probs the policy's are compared with, and how they are had."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from robust_dpo.trainer.dropout import evaluating
from robust_dpo.trainer.scoring import Batch, SequenceScorer


class Reference(Protocol):
    """Gives the reference log-probs of a batch."""

    @property
    def fingerprint(self) -> str:
        """Tells its weights from others'."""

    def logps(self, policy: nn.Module, batch: Batch) -> Tensor:
        """[S], no gradient. `policy` is the (wrapped) model in training."""
        ...


@dataclass(frozen=True)
class FrozenModel:
    """A model of its own: the user's, or a copy of the policy taken before training."""

    model: nn.Module
    scorer: SequenceScorer
    fingerprint: str

    @staticmethod
    def of(model: nn.Module, scorer: SequenceScorer) -> FrozenModel:
        """Freeze `model`, in place."""
        return FrozenModel(model.requires_grad_(False), scorer, fingerprint(model.named_parameters()))

    def logps(self, policy: nn.Module, batch: Batch) -> Tensor:
        # Always eval mode: `model` is the policy itself where its log-probs are computed before training.
        with torch.no_grad(), evaluating(self.model):
            return self.scorer.logps(self.model, batch)


@dataclass(frozen=True)
class PolicyWithoutAdapter:
    """The policy with its PEFT adapter switched off (and in eval mode) for the length of the pass."""

    scorer: SequenceScorer
    fingerprint: str

    def logps(self, policy: nn.Module, batch: Batch) -> Tensor:
        peft_model = _unwrap(policy)
        with torch.no_grad(), peft_model.disable_adapter(), evaluating(policy):
            return self.scorer.logps(policy, batch)


def own_reference(policy: nn.Module, scorer: SequenceScorer, *, copy_policy: bool) -> Reference:
    """The reference of a run without a `ref_model`: the policy without its adapter, or else the policy as it is now.

    Args:
        policy: the model to be trained, before training.
        scorer: what runs it.
        copy_policy: False where the reference is only used before training starts, and no copy is needed.
    """
    if isinstance(policy, PeftModel):
        return PolicyWithoutAdapter(scorer, fingerprint(frozen_parameters(policy)))
    if not copy_policy:
        return FrozenModel(policy, scorer, fingerprint(policy.named_parameters()))
    model = copy.deepcopy(policy)
    return FrozenModel.of(model, scorer.for_copy(model))


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, shapes, dtypes and up to 64 spread-out values of every parameter.

    An optimiser step moves every value of a trained parameter, so a model that has been trained further is told
    apart, at a cost that does not grow with the model.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].cpu().double()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def frozen_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The named parameters that training leaves alone: for a PEFT model, what is left without its adapter."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]


def _unwrap(model: nn.Module) -> Any:
    while not hasattr(model, "disable_adapter"):
        model = model.get_submodule("module")
    return model
