"""The trainer callback that keeps metrics.jsonl and the robust weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from robust_dpo.reporting.run_directory import RunDirectory, write_json

_KEPT = 4096
"""Robust weights that the histogram is drawn from: those of the last steps that were logged."""
_WORST = 20


class MetricsCallback(TrainerCallback):
    """Appends every log of a `transformers.Trainer` to the run's metrics.jsonl, on the main process only.

    Args:
        run: where to write.
        weights: number → ids and robust weights of that many groups of the last micro-batch, largest first, as
            `RobustDPOTrainer.worst_groups`; None keeps no weights.
    """

    def __init__(self, run: RunDirectory, weights: Callable[[int], list[tuple[str, float]]] | None = None) -> None:
        self.run = run
        self._weights = weights
        self._recent: deque[float] = deque(maxlen=_KEPT)
        self._worst: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run repeats the steps after its checkpoint: drop what the killed run had logged of them."""
        if state.is_world_process_zero:
            self.run.keep_metrics_until(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line per log, and the weights of the step."""
        if not state.is_world_process_zero or not logs:
            return
        self.run.append_metrics({"step": state.global_step, **logs})
        if self._weights is None or "loss" not in logs:
            return
        groups = self._weights(_KEPT)
        # G·q: 1 is the weight that the plain mean gives, whatever the batch size
        self._recent.extend(weight * len(groups) for _, weight in groups)
        self._worst.update((identifier, weight * len(groups)) for identifier, weight in groups[:_WORST])
        worst = sorted(self._worst.items(), key=lambda item: -item[1])[:_WORST]
        self._worst = dict(worst)
        write_json(self.run.weights, {"weights": [round(weight, 6) for weight in self._recent], "worst": worst})
