"""The reference: whose log-probs the policy's are compared with, and how they are had."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn

from robust_dpo.checkpoints.ranks import decided_once
from robust_dpo.errors import argument_error
from robust_dpo.reference_cache import base_tensors, configuration_fingerprint, model_tensors, weights_fingerprint
from robust_dpo.trainer.dropout import evaluating
from robust_dpo.trainer.models import has_sharded_parameters, placed
from robust_dpo.trainer.scoring import Batch, SequenceScorer

# Of accelerate's mixed precisions, those of half a word.
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    def of(model: nn.Module, tensors: dict[str, Tensor], accelerator: Accelerator, *, adapters: bool) -> Identity:
        """The identity of a model of which `tensors` take part, with or without its adapters.

        The main process makes it for all: the others may not have the weights yet.
        """

        def make() -> Identity:
            dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
            configuration = configuration_fingerprint(model, adapters=adapters)
            return Identity(weights_fingerprint(tensors.items()), configuration, dtype)

        return decided_once(accelerator, make)


class Reference(Protocol):
    """Gives the reference log-probs of a batch."""

    @property
    def identity(self) -> Identity:
        """Tells it from others."""

    @property
    def scorer(self) -> SequenceScorer:
        """What runs it."""

    def model_in(self, policy: nn.Module) -> nn.Module:
        """What is run; `policy` as of `logps`."""
        ...

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
    def of(model: nn.Module, scorer: SequenceScorer, accelerator: Accelerator) -> FrozenModel:
        """Freeze `model`, in place, in the precision that the policy will have.

        Raises:
            ValueError: ranks hold parts of it.
        """
        _refuse_sharded(model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # It casts the weights of the policy and leaves autocast off.
            model = model.to(HALF_DTYPES.get(accelerator.mixed_precision))
        return FrozenModel.as_it_is(model.requires_grad_(False), scorer, accelerator)

    @staticmethod
    def as_it_is(model: nn.Module, scorer: SequenceScorer, accelerator: Accelerator) -> FrozenModel:
        """`model` with the weights that it has now, for as long as it keeps them."""
        return FrozenModel(model, scorer, Identity.of(model, model_tensors(model), accelerator, adapters=True))

    def model_in(self, policy: nn.Module) -> nn.Module:
        return self.model

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
    def of(policy: PeftModel, scorer: SequenceScorer, accelerator: Accelerator) -> PolicyWithoutAdapter:
        """What is left of `policy`: its weights from before the adapter."""
        identity = Identity.of(policy.get_base_model(), base_tensors(policy), accelerator, adapters=False)
        return PolicyWithoutAdapter(scorer, identity)

    def model_in(self, policy: nn.Module) -> nn.Module:
        return policy

    def logps(self, policy: nn.Module, batch: Batch) -> Tensor:
        peft_model = _unwrap(policy)
        with torch.no_grad(), peft_model.disable_adapter(), evaluating(policy):
            return self.scorer.logps(policy, batch)


def own_reference(
    policy: nn.Module, scorer: SequenceScorer, accelerator: Accelerator, *, copy_policy: bool
) -> Reference:
    """The reference of a run without a `ref_model`: the policy without its adapter, or else the policy as it is now.

    Args:
        policy: the model to be trained, before training.
        scorer: what runs it.
        accelerator: of the run.
        copy_policy: False where the reference is only used before training starts, and no copy is needed.

    Raises:
        ValueError: ranks hold parts of the policy already, so it can be neither copied nor hashed.
    """
    _refuse_sharded(policy)
    if isinstance(policy, PeftModel):
        return PolicyWithoutAdapter.of(policy, scorer, accelerator)
    if not copy_policy:
        return FrozenModel.as_it_is(policy, scorer, accelerator)
    model = placed(copy.deepcopy(policy), accelerator)
    return FrozenModel.of(model, scorer.for_copy(model), accelerator)


def _refuse_sharded(model: nn.Module) -> None:
    if has_sharded_parameters(model):
        expected = "a ref_model that every rank has whole, or rows with ref_logps"
        raise argument_error("ref_model", expected, "a model that was sharded when it was loaded")


def _unwrap(model: nn.Module) -> Any:
    while not hasattr(model, "disable_adapter"):
        model = model.get_submodule("module")
    return model
