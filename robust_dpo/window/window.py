"""The window of micro-batches between two optimizer steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from robust_dpo.robust import ExponentialTilt, RobustObjective
from robust_dpo.window.alone import Alone
from robust_dpo.window.one_pass import OnePass
from robust_dpo.window.real_groups import first_seen, kept
from robust_dpo.window.route import RoutePlan
from robust_dpo.window.two_pass import TwoPass
from robust_dpo.window.weighting import Batch, Forward, Look, MicroBatch, Weighed, Weighting

logger = logging.getLogger(__name__)


def make_weighting(
    plan: RoutePlan,
    objective: RobustObjective,
    forward: Forward,
    look: Look,
    accelerator: Accelerator,
    *,
    calibrated: bool,
) -> Weighting:
    """The route that was planned."""
    if plan.kind == "micro_batch":
        return Alone(forward)
    if plan.kind == "one_pass":
        assert isinstance(objective, ExponentialTilt)
        return OnePass(objective, forward, accelerator)
    return TwoPass(objective, forward, look, accelerator, calibrated=calibrated)


class AccumulationWindow:
    """Follows the micro-batches of a training loop from one optimizer step to the next.

    Args:
        weighting: the route.
        accelerator: of the run.
        prepare: moves a batch to the device.
        drop_last: whether the data end with the last full round of batches.
    """

    def __init__(
        self, weighting: Weighting, accelerator: Accelerator, prepare: Callable[[Batch], Batch], *, drop_last: bool
    ) -> None:
        self._weighting, self._accelerator, self._prepare = weighting, accelerator, prepare
        self._drop_last = drop_last
        self._size = self._place = 0

    @property
    def is_open(self) -> bool:
        """Whether micro-batches of an optimizer step are still to come."""
        return self._place < self._size

    def open(self, model: nn.Module, batches: list[Batch], wanted: int) -> list[Batch]:
        """Begin a step.

        Args:
            model: the policy, wrapped as it is trained.
            batches: that the loader gave for the step.
            wanted: how many the step was to have. Where the data ended before, the step is filled up with micro-batches
                that weigh nothing: otherwise it would not be taken, and its gradients would be part of the next.

        Returns:
            `wanted` batches to train on, or none.
        """
        if self.is_open:
            # The loop was left in the middle of a step.
            model.zero_grad()
        self._place = self._size = 0
        if not batches:
            return []
        window = [kept(self._prepare(batch), len(batch["group_sizes"])) for batch in batches[:-1]]
        window.append(self._last(self._prepare(batches[-1]), ended=len(batches) < wanted))
        empty = kept(window[-1].batch, 0)
        window += [empty] * (wanted - len(window))
        self._size = len(window)
        return self._weighting.open(model, window)

    def run(self, model: nn.Module, batch: Batch) -> Weighed:
        """Run the next micro-batch forward. Its loss takes account of the number of them in no way."""
        weighed = self._weighting.run(model, batch, self._place)
        self._place += 1
        return weighed

    def _last(self, batch: Batch, *, ended: bool) -> MicroBatch:
        """The last batch of a window, without the groups that were repeated to fill up the last round of an epoch."""
        state: Any = self._accelerator.gradient_state
        size, ranks = len(batch["group_sizes"]), self._accelerator.num_processes
        ended = ended or (state.in_dataloader and state.end_of_dataloader)
        if not ended or ranks == 1 or self._drop_last:
            return kept(batch, size)
        groups = len(state.active_dataloader.dataset)
        return kept(batch, first_seen(groups, size, self._accelerator.process_index, ranks))
