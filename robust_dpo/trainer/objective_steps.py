"""The state of an aggregation, moved on with the optimizer."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

from robust_dpo.robust import RobustObjective
from robust_dpo.trainer.metrics import RunningMeans
from robust_dpo.trainer.nonfinite import NonFiniteGuard
from robust_dpo.window import DomainLosses


class ObjectiveSteps(TrainerCallback):
    """Moves the weights of domains on, once for each optimizer step that has changed the model's.

    Reads nothing from the device: where torch's fused optimizers leave a step out, the state is left there as well.

    Args:
        robust: the aggregation.
        guard: knows of steps that are left out.
        means: get the state after each step.
        accelerator: of the run.
    """

    def __init__(
        self, robust: RobustObjective, guard: NonFiniteGuard, means: RunningMeans, accelerator: Accelerator
    ) -> None:
        self._robust, self._guard, self._means, self._accelerator = robust, guard, means, accelerator
        self._losses: DomainLosses | None = None

    def watch(self, losses: DomainLosses | None) -> None:
        """Remember the losses of the step."""
        self._losses = losses

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a step that was left in its middle."""
        self._losses = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step."""
        if self._losses is None:
            return
        step, self._losses = self._losses, None
        # Torch's scaler and DeepSpeed leave steps out by themselves.
        taken = self._guard.taken & (not self._accelerator.optimizer_step_was_skipped)
        self._robust.advance(step.losses, step.calibration, step.labels, taken=taken)
        self._means.add({f"robust/{name}": value for name, value in self._robust.metrics().items()})
