"""A loss or a gradient that is not finite must not reach the weights."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from robust_dpo.trainer.metrics import widest_float

logger = logging.getLogger(__name__)

_Losses: TypeAlias = "tuple[Tensor, Tensor, list[str]]"

# Without logging nobody asks for a report, and what it needs must not pile up.
_MOST_STEPS = 1000
# Where gradients and weights are plain tensors: elsewhere an optimizer may not mix them with a flag that is one.
_UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient of an optimizer step was not finite; the weights are those from before it.

    Args:
        group_ids: names of the groups whose loss was not finite.
        step: optimizer steps before that one.
    """

    def __init__(self, group_ids: list[str], step: int) -> None:
        self.group_ids, self.step = group_ids, step
        named = (
            ", ".join(group_ids) if group_ids else "none (the gradients, or the aggregation over groups, overflowed)"
        )
        super().__init__(
            f"the loss of optimizer step {step + 1} is not finite; it has not changed the weights. Groups whose "
            f'loss is not finite: {named}. on_nonfinite="skip" leaves such steps out.'
        )


@dataclass(frozen=True)
class _Step:
    """One optimizer step.

    Args:
        number: optimizer steps before it.
        bad: [] float on the device, 1 where a loss on any rank was not finite.
        window: of each micro-batch the loss [], the group losses [G] and the groups' names.
    """

    number: int
    bad: Tensor
    window: list[_Losses]

    def group_ids(self) -> list[str]:
        """Names of the groups of this rank whose loss is not finite. Reads them."""
        return [
            name
            for _, group_losses, names in self.window
            for name, finite in zip(names, group_losses.isfinite().tolist(), strict=True)
            if not finite
        ]


class NonFiniteGuard(TrainerCallback):
    """Keeps optimizer steps whose loss or gradient is not finite, on any rank, from changing anything.

    An optimizer that can leave a step out on the device (torch's fused ones) is told so there, and the host does not
    wait: it learns of it in `report`. Any other has its gradients taken away, which takes one read per optimizer step.

    Args:
        accelerator: of the run.
        skip: leave out such steps alone, and count them. Otherwise the first one stops the training, and none of those
            after it that the device has been given by then changes anything either.

    Attributes:
        skipped_steps: how many `report` has told of.
        taken: [] bool, whether the optimizer step at hand changes the weights, known from `on_pre_optimizer_step` on.
    """

    def __init__(self, accelerator: Accelerator, *, skip: bool) -> None:
        self._accelerator, self._skip = accelerator, skip
        self._window: list[_Losses] = []
        self._steps: list[_Step] = []
        self._stopped: Tensor | None = None
        self._norm: Tensor | None = None
        self._value: Tensor | None = None
        self._counted: Tensor | None = None
        self.skipped_steps = 0
        self.taken: Tensor | bool = True

    def watch(self, loss: Tensor, group_losses: Tensor, ids: list[str]) -> None:
        """Remember the loss [] and the group losses [G] of a micro-batch. Reads nothing from the device."""
        self._window.append((loss.detach(), group_losses, ids))

    def watch_step(self, value: Tensor) -> None:
        """Remember the objective [] of the step. Reads nothing from the device."""
        self._value = value.to(widest_float(value.device))

    def watch_norm(self, norm: Tensor) -> None:
        """Remember the norm [] of the gradients of the step. Reads nothing from the device.

        Not with torch's scaler of fp16 gradients: it leaves out by itself what overflows, and adapts to it.
        """
        if self._accelerator.scaler is None:
            self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a training that was stopped."""
        self._forget_step()
        self._steps, self._stopped, self._counted = [], None, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a step that was left in its middle."""
        self._forget_step()

    def _forget_step(self) -> None:
        self._window, self._norm, self._value = [], None, None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the step out, on the device where that is possible, if a loss of its window is not finite."""
        window, value = self._window, self._value
        if not window:
            return
        found = [loss for loss, _, _ in window]
        if self._norm is not None:
            found.append(self._norm.detach().to(found[0]))
        bad = (~torch.stack(found).isfinite()).any().float()
        bad = self._accelerator.reduce(bad, reduction="sum").clamp(max=1)
        self._forget_step()
        if value is not None:
            # Not finite on a rank that has nothing of its own in the step.
            counts = (bad == 0) & value.isfinite()
            counted = torch.stack([value.where(counts, 0), counts.to(value)])
            self._counted = counted if self._counted is None else self._counted + counted
        step = _Step(state.global_step, bad, window)
        optimizer = _unwrapped(kwargs["optimizer"])
        if self._skips_on_device(optimizer):
            self._steps.append(step)
            if not self._skip:
                bad = self._stopped = bad if self._stopped is None else torch.maximum(bad, self._stopped)
            optimizer.found_inf = bad
            if len(self._steps) >= _MOST_STEPS:
                self.report()
        elif bool(bad):
            self._steps.append(step)
            self.report()
            if self._accelerator.scaler is not None:
                # The scaler takes no step of gradients that it has not looked at, and refuses to look twice: clipping
                # and measuring their norm have had it do so.
                with contextlib.suppress(RuntimeError):
                    self._accelerator.unscale_gradients(kwargs["optimizer"])
            # Without gradients, rather than with zero ones: momentum and weight decay must not move the weights either.
            optimizer.zero_grad(set_to_none=True)
        self.taken = bad == 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the flag away again; the optimizer is the user's."""
        vars(_unwrapped(kwargs["optimizer"])).pop("found_inf", None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report what was not logged."""
        self.report()

    def mean_loss(self) -> float:
        """Mean loss of the training's optimizer steps that were not left out, over all ranks; NaN if there is none.

        One reduction, one read.
        """
        if self._counted is None:
            return float("nan")
        total, steps = self._accelerator.reduce(self._counted, reduction="sum").tolist()
        return float(total / steps) if steps else float("nan")

    def report(self) -> None:
        """Learn of the steps since the last call, with one read.

        Raises:
            NonFiniteLossError: a loss was not finite, and such steps are not to be skipped.
        """
        steps, self._steps = self._steps, []
        flags = torch.stack([step.bad for step in steps]).tolist() if steps else []
        for step in [step for step, bad in zip(steps, flags, strict=True) if bad]:
            ids = gather_object(step.group_ids())
            if not self._skip:
                raise NonFiniteLossError(ids, step.number)
            self.skipped_steps += 1
            logger.warning("step %d skipped: its loss is not finite. Groups: %s", step.number + 1, ids)

    def state_dict(self) -> dict[str, int]:
        """For checkpoints, which are written after a report: the count is all there is."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped_steps = state["skipped_steps"]

    def _skips_on_device(self, optimizer: Any) -> bool:
        """Whether the optimizer takes `found_inf`, and nobody else sets it: torch's scaler of fp16 gradients does.

        Only Adam's: torch's fused SGD leaves its momentum without contents if the first step is left out.
        """
        if self._accelerator.scaler is not None or self._accelerator.distributed_type not in _UNSHARDED:
            return False
        groups = optimizer.param_groups
        fused = isinstance(optimizer, torch.optim.Adam) and all(group["fused"] for group in groups)
        # As those of models are that transformers shards when it loads them.
        return fused and not any(isinstance(each, DTensor) for group in groups for each in group["params"])


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)
