"""A loss that is not finite must not reach the weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class NonFiniteLossError(FloatingPointError):
    """Raised before the optimizer step; `group_ids` names the groups whose loss was not finite."""

    def __init__(self, group_ids: list[str], step: int) -> None:
        self.group_ids, self.step = group_ids, step
        named = ", ".join(group_ids) if group_ids else "none by itself (the aggregation over groups overflowed)"
        super().__init__(
            f"the loss of optimizer step {step + 1} is not finite; it has not changed the weights. Groups whose "
            f'loss is not finite: {named}. on_nonfinite="skip" leaves such steps out.'
        )


class NonFiniteGuard(TrainerCallback):
    """Watches the losses of an accumulation window and acts once, just before the optimizer does.

    Args:
        skip: leave the step out and count it in `skipped_steps`, instead of raising.
    """

    def __init__(self, accelerator: Accelerator, *, skip: bool) -> None:
        self._accelerator, self._skip = accelerator, skip
        self._window: list[tuple[Tensor, Tensor, list[str]]] = []
        self.skipped_steps = 0

    def watch(self, loss: Tensor, group_losses: Tensor, ids: list[str]) -> None:
        """Remember the loss [] and the group losses [G] of a micro-batch. Reads nothing from the device."""
        self._window.append((loss.detach(), group_losses, ids))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise or drop the gradients of the window where a loss on any rank is not finite."""
        window, self._window = self._window, []
        if not window:
            return
        bad = (~torch.stack([loss for loss, _, _ in window]).isfinite()).sum()
        if int(self._accelerator.reduce(bad, reduction="sum")) == 0:
            return
        ids = [
            name
            for _, group_losses, names in window
            for name, finite in zip(names, group_losses.isfinite().tolist(), strict=True)
            if not finite
        ]
        ids = gather_object(ids)
        if not self._skip:
            raise NonFiniteLossError(ids, state.global_step)
        self.skipped_steps += 1
        # Without gradients, rather than with zero ones: momentum and weight decay must not move the weights either.
        kwargs["optimizer"].zero_grad(set_to_none=True)
        logger.warning("step %d skipped: its loss is not finite. Groups: %s", state.global_step + 1, ids)
