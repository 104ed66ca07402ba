"""The language model's head: where it is, what it sees, and what the model does to its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
    x Wᵀ + b, so exactly `nn.Linear` counts, no subclass.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head if type(head) is nn.Linear else None


@contextmanager
def capture_head_input(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, a forward pass of the model leaves in the yielded list what its head was given, [B, T, H].

    The head itself runs on zero rows: no logits are computed, but the model's output still depends on the head's
    parameters, which is how DistributedDataParallel sees that they are in use.
    """
    captured: list[Tensor] = []
    own_forward = head.__dict__.get("forward")
    native = head.forward

    def forward(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return native(hidden[..., :0, :])

    head.__dict__["forward"] = forward
    try:
        yield captured
    finally:
        if own_forward is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own_forward
