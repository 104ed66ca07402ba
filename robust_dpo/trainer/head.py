"""The language model's head: where it is, what it sees, and what the model does to its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: softcap · tanh(logit_scale · z / softcap)."""

    softcap: float | None = None
    logit_scale: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits, of the shape and dtype of `logits`."""
        scaled = logits if self.logit_scale == 1.0 else logits * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def _softcap(value: float) -> LogitTransform:
    return LogitTransform(softcap=value)


def _multiply(value: float) -> LogitTransform:
    return LogitTransform(logit_scale=value)


def _divide(value: float) -> LogitTransform:
    return LogitTransform(logit_scale=1.0 / value)


# Configuration field → its possible meanings. Families disagree about the meaning of a name (Granite divides by
# `logits_scaling`, HyperCLOVA X multiplies), so the self-check tries them on the model itself.
_TRANSFORMS: dict[str, tuple[Callable[[float], LogitTransform], ...]] = {
    "final_logit_softcapping": (_softcap,),  # Gemma 2, 3, 3n
    "logits_soft_cap": (_softcap,),  # RecurrentGemma
    "output_logit_soft_cap": (_softcap,),  # xLSTM
    "logit_scale": (_multiply,),  # Cohere, Command R
    "lm_head_multiplier": (_multiply,),  # Falcon-H1
    "output_multiplier": (_multiply,),
    "logits_scaling": (_divide, _multiply),  # Granite; HyperCLOVA X
}


def candidate_transforms(config: Any) -> list[LogitTransform]:
    """The transforms that a model's configuration may mean, likeliest first; always ends with none at all."""
    text_config = config.get_text_config()
    values = {name: getattr(text_config, name, None) for name in _TRANSFORMS}
    found = [
        reading(float(value))
        for name, value in values.items()
        if isinstance(value, int | float) and value != 0
        for reading in _TRANSFORMS[name]
    ]
    return list(dict.fromkeys([*found, LogitTransform()]))


def linear_head(model: Any) -> nn.Linear | None:
    """The output projection of a causal language model where it is a plain `nn.Linear`; None where it is not.

    A head that carries an adapter, is quantised or is the user's own class computes something else than
    x Wᵀ + b, so exactly `nn.Linear` counts, no subclass but the one that FSDP2 makes of it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    kind = type(head).__bases__[1] if isinstance(head, FSDPModule) else type(head)
    return head if kind is nn.Linear else None


@contextmanager
def in_place_of_head(head: nn.Linear, operate: Callable[[Tensor], T], *, by_engine: bool = False) -> Iterator[list[T]]:
    """Inside, a forward pass of the model leaves in the yielded list what `operate` gives for what its head was given.

    That is [B, T, H]. `operate` runs where the head would have, when an engine that shards its weight has gathered it.
    The logits of the pass have zero rows. They depend on the head's parameters, which is how DistributedDataParallel
    sees that they are in use. Engines that own the weights (FSDP2, DeepSpeed) look at the gradient of the output
    instead, so `by_engine` it depends on the head's input alone where that has a gradient: one of the weight would be
    as large as the weight.
    """
    results: list[T] = []
    own_forward = head.__dict__.get("forward")
    native = head.forward

    def forward(hidden: Tensor) -> Tensor:
        results.append(operate(hidden))
        nothing = hidden[..., :0, :]
        if not (by_engine and hidden.requires_grad):
            return native(nothing)
        # No view, as a change in place would take the engine's hooks away.
        return nothing[..., :1].expand(*nothing.shape[:-1], head.out_features).clone()

    head.__dict__["forward"] = forward
    try:
        yield results
    finally:
        if own_forward is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own_forward
