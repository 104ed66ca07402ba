"""Whether the head of a model is fused with its loss: asked before training, or once ranks share its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from robust_dpo.trainer.head import linear_head
from robust_dpo.trainer.self_check import HeadCheck


class HeadRoute:
    """The outcome of a model's self-check, which is made when somebody first asks for it.

    Args:
        ask: checks a model, wrapped as it is run.
        by_engine: an engine owns the weights (FSDP2, DeepSpeed), and may have the head's whole only while it runs.
    """

    def __init__(self, ask: Callable[[nn.Module], HeadCheck], *, by_engine: bool = False) -> None:
        self._ask, self.by_engine = ask, by_engine
        self._found: HeadCheck | None = None

    def check(self, model: nn.Module) -> HeadCheck:
        """The outcome for `model`, wrapped as it is run. All ranks have to come here together where they share it."""
        if self._found is None:
            self._found = self._ask(model)
        return self._found

    def for_copy(self, model: nn.Module) -> HeadRoute:
        """That of a whole copy of the model."""
        route = HeadRoute(self._ask)
        if self._found is not None:
            route._found = replace(self._found, head=linear_head(model) if self._found.head is not None else None)
        return route

    @property
    def name(self) -> str | None:
        """What a record of the run calls it: fused or logits; None before anybody has asked."""
        if self._found is None:
            return None
        return "logits" if self._found.head is None else "fused"
