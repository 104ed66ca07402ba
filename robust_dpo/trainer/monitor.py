"""What is known of a training run as it goes: numbers for logs, weights of groups, steps that are not finite."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from robust_dpo.robust import RobustObjective
from robust_dpo.trainer.metrics import GROUP_METRICS, RunningMeans, group_metrics, robust_metrics, seen_groups
from robust_dpo.trainer.nonfinite import NonFiniteGuard
from robust_dpo.trainer.objective_steps import ObjectiveSteps
from robust_dpo.trainer.scoring import Batch
from robust_dpo.window import Weighed, WindowSolution, layout_of

logger = logging.getLogger(__name__)


class LastLog(TrainerCallback):
    """Logs the steps since the last multiple of `logging_steps` when the training ends, or another callback ends it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step."""
        if args.logging_strategy == IntervalStrategy.STEPS and control.should_training_stop:
            control.should_log = True


class TrainingMonitor:
    """Watches micro-batches and optimizer steps. Reads nothing from the device before it is asked for logs.

    Args:
        accelerator: of the run.
        robust: the aggregation.
        skip_nonfinite: leave out steps that are not finite, instead of ending the run.
        reward_beta: scale of the rewards.

    Attributes:
        guard, objective_steps: callbacks of the trainer.
        step_loss: [] the objective of the last optimizer step.
    """

    step_loss: Tensor

    def __init__(
        self,
        accelerator: Accelerator,
        robust: RobustObjective,
        *,
        skip_nonfinite: bool,
        reward_beta: float,
    ) -> None:
        self._accelerator, self._skips = accelerator, skip_nonfinite
        self._robust, self._reward_beta = robust, reward_beta
        self._means = RunningMeans()
        self._step_ids: list[str] = []
        self._last_weights: tuple[Tensor, list[str]] | None = None
        self.guard = NonFiniteGuard(accelerator, skip=skip_nonfinite)
        self.objective_steps = ObjectiveSteps(robust, self.guard, self._means, accelerator)

    def begin_step(self) -> None:
        """Forget a step that was left in its middle."""
        self._step_ids = []

    def watch(self, weighed: Weighed, batch: Batch) -> None:
        """Metrics and checks of a micro-batch, and at the last one of a step those of the step."""
        output = weighed.output
        self.guard.watch(weighed.loss, output.group_losses, batch["ids"])
        layout = layout_of(batch["group_sizes"], output.logps.device)
        groups = seen_groups(batch, layout, output.logps, output.ref_logps)
        metrics = group_metrics(groups, self._reward_beta)
        if weighed.counts:
            self._step_ids += batch["ids"]
        else:
            metrics = torch.full_like(metrics, float("nan"))
        self._means.add(dict(zip(GROUP_METRICS, metrics.unbind(1), strict=True)))
        if weighed.solution is not None:
            self._watch_step(weighed.solution)

    def _watch_step(self, solution: WindowSolution) -> None:
        # What is not finite counts as unknown.
        known = {"loss": solution.value.where(solution.value.isfinite(), float("nan"))}
        parameter = solution.parameter if self._robust.has_parameter else None
        self._means.add(known | dict(solution.terms) | robust_metrics(solution.max_weight, solution.ess, parameter))
        self._last_weights = solution.weights, self._step_ids
        self.guard.watch_step(solution.value)
        self.objective_steps.watch(solution.domain_losses)
        self.step_loss = solution.value

    def worst_groups(self, count: int) -> list[tuple[str, float]]:
        """Ids and weights of the groups of this rank with the largest weight in the last step, largest first."""
        if self._last_weights is None:
            return []
        weights, ids = self._last_weights
        top = weights.topk(min(count, len(ids)))
        return [(ids[index], weight) for index, weight in zip(top.indices.tolist(), top.values.tolist(), strict=True)]

    def logs(self) -> dict[str, float]:
        """What was gathered since the last call, by name; one reduction over ranks, one read.

        Raises:
            NonFiniteLossError: a step was not finite, and such are not to be left out.
        """
        self.guard.report()
        # RunningMeans knows no mean of nothing.
        logs = {"loss": float("nan"), **self._means.pop(self._accelerator)}
        if self._skips:
            logs["robust/skipped_steps"] = self.guard.skipped_steps
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("largest weights of the last step: %s", self.worst_groups(10))
        return logs
