"""What `robust-dpo train` does once its options are known. Imports torch and transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from robust_dpo.calibration.report import Mixture
from robust_dpo.checkpoints import anything_to_resume
from robust_dpo.cli.config_file import nearest
from robust_dpo.cli.models import load_causal_lm, load_tokenizer
from robust_dpo.data import load_preferences, tokenize_groups
from robust_dpo.data.domains import DOMAIN
from robust_dpo.errors import DataError, argument_error
from robust_dpo.reporting import RunDirectory
from robust_dpo.reporting.callback import MetricsCallback
from robust_dpo.reporting.report import rebuild
from robust_dpo.reporting.summary import comparison_table
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

# Fields without effect here, as the command loads models and data itself, and what to do instead.
_LOADING_FIELDS = {
    "domain_column": "give the column to --domain-column",
    "model_init_kwargs": "save the model as it shall be loaded and give its folder to --model",
    "ref_model_init_kwargs": "save the reference as it shall be loaded and give its folder to --ref-model",
}
# Options of the command under the names that RobustDPOConfig has for them.
_FIELDS = {
    "mode": "mode",
    "loss": "loss_type",
    "beta": "beta",
    "lam": "lam",
    "radius": "radius",
    "robust": "robust",
    "form": "calibration_form",
    "reduce": "calibration_reduce",
    "max_length": "max_length",
    "on_bad_row": "on_bad_row",
    "precompute_ref": "precompute_ref_log_probs",
    "cache_dir": "cache_dir",
    "num_proc": "dataset_num_proc",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "logging_steps": "logging_steps",
    "bf16": "bf16",
    "seed": "seed",
}


@dataclass(frozen=True)
class TrainingRun:
    """One training run.

    Args:
        options: of the command, by parameter name.
        resume: go on from the last checkpoint.
        overwrite: replace an earlier run.
    """

    options: Mapping[str, Any]
    resume: bool
    overwrite: bool

    def start(self) -> None:
        """Train, save the model, draw the plots.

        Raises:
            DataError, ModelError, FileExistsError, ValueError: something that was asked for cannot be used.
        """
        if self.resume:
            self._refuse_to_resume()
        console = Console()
        config = self._trainer_config()
        domain_column = (self.options["domain_column"] or DOMAIN) if config.objective().needs_domains else None
        rows = self._rows("data", domain_column, console)
        eval_rows = None
        if self.options["eval_data"] is not None:
            eval_rows = self._rows("eval_data", domain_column, console)
        tokenizer = load_tokenizer(self.options["model"])
        eval_rows = None if eval_rows is None else _with_calibration(eval_rows, config, tokenizer)
        model = load_causal_lm(self.options["model"])
        ref_model = None if self.options["ref_model"] is None else load_causal_lm(self.options["ref_model"])

        run = RunDirectory.create(self.options["out"], overwrite=self.overwrite, resume=self.resume)
        trainer = RobustDPOTrainer(
            model,
            ref_model,
            config,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=self._adapter(),
        )
        run.write_config(self.options)
        trainer.add_callback(MetricsCallback(run, trainer.worst_groups))
        trainer.train(resume_from_checkpoint=self.resume)
        trainer.save_model(str(run.model))
        tokenizer.save_pretrained(str(run.model))

        summary, plots = rebuild(run)
        console.print(comparison_table([run.name], [summary]))
        for path in (run.model, run.metrics, *plots):
            console.print(f"wrote: {path}", highlight=False, soft_wrap=True)

    def _trainer_config(self) -> RobustDPOConfig:
        chosen = {field: self.options[name] for name, field in _FIELDS.items()}
        plain = {field: getattr(value, "value", value) for field, value in chosen.items()}
        evaluates = self.options["eval_data"] is not None
        saves = self.options["save_steps"] > 0
        fields: dict[str, Any] = {
            "output_dir": str(RunDirectory(self.options["out"]).checkpoints),
            "per_device_eval_batch_size": self.options["batch_size"],
            "eval_strategy": "steps" if evaluates else "no",
            "eval_steps": self.options["eval_steps"] if evaluates else None,
            "save_strategy": "steps" if saves else "no",
            "save_steps": self.options["save_steps"] or 500,
            "save_total_limit": 2,
            "report_to": [],
            "dataloader_pin_memory": torch.cuda.is_available(),
            "calibration_options": self._mixture(),
            # only where asked for: newer versions of transformers warn about the name
            **({"gradient_checkpointing": True} if self.options["gradient_checkpointing"] else {}),
            **plain,
        }
        return RobustDPOConfig(**{**fields, **_extra_fields(self.options["trainer_arg"] or [])})

    def _mixture(self) -> dict[str, Any]:
        """Arguments of `density_ratio` from the report of the calibration stage."""
        path: Path | None = self.options["calibration"]
        if path is None:
            return {}
        try:
            mixture = json.loads(path.read_text(encoding="utf-8"))["mixture"]
            return dict(Mixture(**mixture).options(self.options["form"].value))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"not the calibration.json of `robust-dpo calibrate`: {error}", path=path) from error

    def _rows(self, option: str, domain_column: str | None, console: Console) -> Dataset:
        loaded = load_preferences(
            self.options[option],
            on_bad_row=self.options["on_bad_row"].value,
            domain_column=domain_column,
        )
        console.print(str(loaded.report), highlight=False, markup=False)
        return loaded.dataset

    def _adapter(self) -> LoraConfig | None:
        rank = self.options["lora_r"]
        if not rank:
            return None
        return LoraConfig(r=rank, lora_alpha=self.options["lora_alpha"], task_type="CAUSAL_LM")

    def _refuse_to_resume(self) -> None:
        """Before data and models are loaded; which checkpoint is whole, the trainer finds out."""
        run = RunDirectory(self.options["out"])
        if not anything_to_resume(run.checkpoints):
            raise argument_error("--resume", "a checkpoint to go on from", f"none in {run.checkpoints}")
        run.refuse_changes(self.options)


def _extra_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as fields of RobustDPOConfig; values are read as YAML, so numbers and lists have their type."""
    known = {field.name for field in dataclasses.fields(RobustDPOConfig) if field.init}
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not separator:
            raise argument_error("--trainer-arg", "NAME=VALUE", assignment)
        if name not in known:
            raise argument_error("--trainer-arg", f"a field of RobustDPOConfig{nearest(name, known)}", name)
        if name in _LOADING_FIELDS:
            instead = _LOADING_FIELDS[name]
            expected = f"no field for loading: the command loads the models itself, and the data; {instead}"
            raise argument_error("--trainer-arg", expected, name)
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):
            # YAML 1.1 reads 1e-5 as text: only 1.0e-5 is a number to it
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        fields[name] = parsed
    return fields


def _with_calibration(rows: Dataset, config: RobustDPOConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Evaluation rows without probabilities get h = 1 in a calibrated mode: all held-out groups count alike.

    Raises:
        DataError: some rows have probabilities and others have none.
    """
    if not config.calibrated:
        return rows
    known = sum(probs is not None for probs in rows["probs"]) if "probs" in rows.column_names else 0
    if known == len(rows):
        return rows
    if known:
        raise DataError(f"--eval-data: expected probs in all rows or in none, got them in {known} of {len(rows)}")
    tokenised = tokenize_groups(
        rows,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation_mode,
        on_bad_row=config.on_bad_row,
        num_proc=config.dataset_num_proc,
        cache_dir=config.cache_dir,
    )
    return tokenised.add_column("calibration", [1.0] * len(tokenised))
