"""The trainer callback that keeps metrics.jsonl."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from robust_dpo.reporting.run_directory import RunDirectory


class MetricsCallback(TrainerCallback):
    """Appends every log of a `transformers.Trainer` to the run's metrics.jsonl, on the main process only."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

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
        """One line per log."""
        if state.is_world_process_zero and logs:
            self.run.append_metrics({"step": state.global_step, **logs})
