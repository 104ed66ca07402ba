"""The trainers, ours and TRL's, with the same arguments; each takes its own steps on its own batches."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from robust_dpo.bench.train_step.data import Row, padding_tokenizer
from robust_dpo.bench.train_step.setting import BETA, LAM, LEARNING_RATE, MAX_GRAD_NORM, Setting
from robust_dpo.bench.train_step.turnstile import Turnstile
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer


def common_arguments(setting: Setting, folder: str) -> dict[str, Any]:
    """What both configurations are told. Batches come in the order of the rows; nothing is saved or evaluated."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.groups,
        "max_steps": setting.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "beta": BETA,
        "max_length": setting.max_length,
        "precompute_ref_log_probs": not setting.live,
        "train_sampling_strategy": "sequential",
        "bf16": setting.dtype == "bf16",
        "use_cpu": setting.device == "cpu",
        "dataloader_pin_memory": setting.device == "cuda",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": setting.seed,
    }


def run(trainer: Trainer, turnstile: Turnstile) -> None:
    """Train, with a stop at the turnstile at the end of every step."""
    losses: list[Tensor] = []
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = step(*args, **kwargs)
        losses.append(loss.detach())
        return loss

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turnstile(losses.pop())

    trainer.training_step = training_step
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Stop())
    trainer.train()


@dataclass(frozen=True)
class Ours:
    """RobustDPOTrainer.

    Args:
        options: fields of RobustDPOConfig besides those that the setting decides.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def train(self, setting: Setting, rows: list[Row], turnstile: Turnstile) -> PreTrainedModel:
        """All steps; the trained model."""
        transformers.logging.set_verbosity_error()
        model = setting.policy()
        objective: dict[str, Any] = {"loss_type": "sigmoid", "mode": "erm"}
        if not setting.pairs:
            objective = {"loss_type": "plackett_luce", "mode": "dora", "lam": LAM}
        with tempfile.TemporaryDirectory() as folder:
            trainer = RobustDPOTrainer(
                model,
                setting.reference_model(),
                RobustDPOConfig(**{**common_arguments(setting, folder), **objective, **self.options}),
                train_dataset=Dataset.from_list(rows),
                processing_class=padding_tokenizer(),
            )
            run(trainer, turnstile)
        return model


class TRL:
    """DPOTrainer of TRL, for pairs."""

    def train(self, setting: Setting, rows: list[Row], turnstile: Turnstile) -> PreTrainedModel:
        """All steps; the trained model."""
        from trl import DPOConfig, DPOTrainer

        class Tokenised(DPOTrainer):
            """Takes rows that are token ids already, so that its tokens are those of the others."""

            def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
                return dataset

        transformers.logging.set_verbosity_error()
        model = setting.policy()
        pairs = [
            {
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": row["response_ids"][0],
                "rejected_ids": row["response_ids"][1],
            }
            for row in rows
        ]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Tokenised(
                model,
                setting.reference_model(),
                # Its default is to trade time for memory; ours is not.
                args=DPOConfig(
                    **common_arguments(setting, folder), loss_type=["sigmoid"], gradient_checkpointing=False
                ),
                train_dataset=Dataset.from_list(pairs),
                processing_class=padding_tokenizer(),
            )
            run(trainer, turnstile)
        return model
