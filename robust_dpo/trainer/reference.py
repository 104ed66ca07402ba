"""The reference: whose log-probs the policy's are compared with, and how they are had."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from robust_dpo.errors import argument_error
from robust_dpo.reference_cache import base_tensors, configuration_fingerprint, model_tensors, weights_fingerprint
from robust_dpo.trainer.dropout import evaluating
from robust_dpo.trainer.models import has_sharded_parameters
from robust_dpo.trainer.scoring import Batch, SequenceScorer


@dataclass(frozen=True)
class Identity:
    """What a reference is recognised by.

    Args:
        weights: hash of every parameter and buffer.
        configuration: hash of the model's class, configuration and active adapters.
        dtype: of the weights.
    """

    weights: str
    configuration: str
    dtype: torch.dtype

    @staticmethod
    def of(model: nn.Module, tensors: dict[str, Tensor], *, adapters: bool) -> Identity:
        """The identity of a model of which `tensors` take part, with or without its adapters."""
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        return Identity(
            weights_fingerprint(tensors.items()), configuration_fingerprint(model, adapters=adapters), dtype
        )


class Reference(Protocol):
    """Gives the reference log-probs of a batch."""

    @property
    def scorer(self) -> SequenceScorer:
        """What runs it."""

    @property
    def identity(self) -> Identity:
        """Tells it from others."""

    def logps(self, policy: nn.Module, batch: Batch) -> Tensor:
        """[S], no gradient. `policy` is the (wrapped) model in training."""
        ...


@dataclass(frozen=True)
class FrozenModel:
    """A model of its own: the user's, or a copy of the policy taken before training."""

    model: nn.Module
    scorer: SequenceScorer
    identity: Identity

    @staticmethod
    def of(model: nn.Module, scorer: SequenceScorer) -> FrozenModel:
        """Freeze `model`, in place.

        Raises:
            ValueError: ranks hold parts of it.
        """
        _refuse_sharded(model)
        return FrozenModel.as_it_is(model.requires_grad_(False), scorer)

    @staticmethod
    def as_it_is(model: nn.Module, scorer: SequenceScorer) -> FrozenModel:
        """`model` with the weights that it has now, for as long as it keeps them."""
        return FrozenModel(model, scorer, Identity.of(model, model_tensors(model), adapters=True))

    def logps(self, policy: nn.Module, batch: Batch) -> Tensor:
        # Always eval mode: `model` is the policy itself where its log-probs are computed before training.
        with torch.no_grad(), evaluating(self.model):
            return self.scorer.logps(self.model, batch)


@dataclass(frozen=True)
class PolicyWithoutAdapter:
    """The policy with its PEFT adapter switched off (and in eval mode) for the length of the pass."""

    scorer: SequenceScorer
    identity: Identity

    @staticmethod
    def of(policy: PeftModel, scorer: SequenceScorer) -> PolicyWithoutAdapter:
        """What is left of `policy`: its weights from before the adapter."""
        return PolicyWithoutAdapter(scorer, Identity.of(policy.get_base_model(), base_tensors(policy), adapters=False))

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

    Raises:
        ValueError: ranks hold parts of the policy already, so it can be neither copied nor hashed.
    """
    _refuse_sharded(policy)
    if isinstance(policy, PeftModel):
        return PolicyWithoutAdapter.of(policy, scorer)
    if not copy_policy:
        return FrozenModel.as_it_is(policy, scorer)
    model = copy.deepcopy(policy)
    return FrozenModel.of(model, scorer.for_copy(model))


def _refuse_sharded(model: nn.Module) -> None:
    if has_sharded_parameters(model):
        expected = "a ref_model that every rank has whole, or rows with ref_logps"
        raise argument_error("ref_model", expected, "a model that was sharded when it was loaded")


def _unwrap(model: nn.Module) -> Any:
    while not hasattr(model, "disable_adapter"):
        model = model.get_submodule("module")
    return model
