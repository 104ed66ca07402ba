"""Runs the repetitions of the demo."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from robust_dpo.calibration import CalibrationResult, calibrate_dataset
from robust_dpo.data import tokenize_groups
from robust_dpo.demo.corpus import Corpus, load_corpus
from robust_dpo.demo.settings import PRETRAINED_LEARNING_RATE, PRETRAINED_WARMUP_EPOCHS, Budget, DemoSettings
from robust_dpo.demo.start import build_model, build_tokenizer, load_pretrained, texts_of, warm_up
from robust_dpo.evaluation import Evaluation, evaluate_ranking
from robust_dpo.reporting import RunDirectory
from robust_dpo.reporting.callback import MetricsCallback
from robust_dpo.reporting.report import rebuild
from robust_dpo.robust import from_mode
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

START = "start"
Log = Callable[[str], None]


@dataclass(frozen=True)
class ArmResult:
    """One model of one repetition.

    Args:
        mode: of the training, or "start" for the model before it.
        seed: of the repetition.
        held_out: ranking of the clean held-out pairs, as `evaluation.Ranking` by name.
        by_source: the same by source, where sources are known.
        correct: for each held-out group, whether (or for more than two responses, to which share) it is ranked right by
            implicit reward; empty for the start, which has none.
        corrupted_accuracy: share of corrupted training pairs that are ranked by their true labels; None for the start.
        ess: mean effective sample size of the robust weights of a batch; None for the start.
        seconds: of the training.
        run: its run directory; None for the start.
    """

    mode: str
    seed: int
    held_out: dict[str, Any]
    by_source: dict[str, dict[str, Any]]
    correct: tuple[float, ...] = ()
    corrupted_accuracy: float | None = None
    ess: float | None = None
    seconds: float | None = None
    run: Path | None = None


@dataclass(frozen=True)
class DemoResult:
    """Everything that came out.

    Args:
        settings: what was asked for.
        description: the data, in words.
        batch_size: groups of a batch, the upper bound of the effective sample size.
        steps: optimizer steps of each arm.
        arms: one result for each model and repetition.
        calibrations: the classifier's report of each repetition.
        seconds: of everything.
    """

    settings: DemoSettings
    description: str
    batch_size: int
    steps: int
    arms: tuple[ArmResult, ...]
    calibrations: tuple[dict[str, Any], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, without the parts of the classifier's report that are only for its plot."""
        kept = ("auc", "brier", "expected_calibration_error", "ess_fraction", "corruption")
        return {
            "settings": asdict(self.settings),
            "description": self.description,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "arms": [asdict(replace(arm, correct=())) for arm in self.arms],
            "calibrations": [{name: report[name] for name in kept} for report in self.calibrations],
            "seconds": self.seconds,
        }


def run_demo(settings: DemoSettings, log: Log = print) -> DemoResult:
    """Run all repetitions; the same settings give the same numbers on the same machine.

    Writes a run directory for each arm, the start model and the calibration report under `settings.out`.

    Args:
        settings: what to do.
        log: takes one line for every stage.

    Raises:
        FileExistsError: `settings.out` holds files already.
        DataError: the data cannot be used.
    """
    started = time.perf_counter()
    if settings.out.is_file() or (settings.out.is_dir() and any(settings.out.iterdir())):
        raise FileExistsError(f"{settings.out}: already holds files; choose another --out")
    arms: list[ArmResult] = []
    reports: list[dict[str, Any]] = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        folder = settings.out if settings.seeds == 1 else settings.out / f"seed-{seed}"

        def stage(text: str, seed: int = seed) -> None:
            log(f"[{time.perf_counter() - started:5.0f} s] seed {seed}: {text}")

        repetition = _Repetition.prepare(settings, seed, folder, stage)
        reports.append(repetition.calibration.report.to_dict())
        arms.append(repetition.evaluate_start())
        arms += [repetition.train(mode) for mode in settings.modes]
        description, steps = repetition.corpus.description, repetition.steps
    batch_size = settings.budget.batch_size
    seconds = time.perf_counter() - started
    return DemoResult(settings, description, batch_size, steps, tuple(arms), tuple(reports), seconds)


@dataclass(frozen=True)
class _Repetition:
    """One seed: data, start model and everything that all arms share."""

    settings: DemoSettings
    budget: Budget
    seed: int
    folder: Path
    stage: Log
    corpus: Corpus
    calibration: CalibrationResult
    start: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset

    @staticmethod
    def prepare(settings: DemoSettings, seed: int, folder: Path, stage: Log) -> _Repetition:
        """Data, start model, calibration, and the reference log-probs of the start model."""
        corpus = load_corpus(settings, seed)
        stage(corpus.description)
        budget = settings.budget
        set_seed(seed)
        if settings.model is None:
            tokenizer: PreTrainedTokenizerBase = build_tokenizer(
                texts_of(corpus.train), budget.vocab_size, budget.max_length
            )
            start: PreTrainedModel = build_model(tokenizer, budget, seed)
        else:
            start, tokenizer = load_pretrained(settings.model)
            budget = replace(
                budget,
                learning_rate=min(budget.learning_rate, PRETRAINED_LEARNING_RATE),
                warmup_learning_rate=min(budget.warmup_learning_rate, PRETRAINED_LEARNING_RATE),
                warmup_epochs=min(budget.warmup_epochs, PRETRAINED_WARMUP_EPOCHS),
            )
        loss = warm_up(
            start,
            tokenizer,
            corpus.train,
            max_length=budget.max_length,
            epochs=budget.warmup_epochs,
            batch_size=budget.batch_size,
            learning_rate=budget.warmup_learning_rate,
            seed=seed,
        )
        millions = sum(parameter.numel() for parameter in start.parameters()) / 1e6
        stage(f"warm-up of a model of {millions:.2f} M parameters, {loss:.2f} nats per token at the end")
        start.save_pretrained(folder / START)
        tokenizer.save_pretrained(folder / START)

        calibration = calibrate_dataset(
            corpus.train, target=corpus.target, seed=seed, form="mixture", reduce=corpus.reduce
        )
        calibration.report.save(folder / "calibration")
        stage(f"classifier: AUC {calibration.report.auc:.3f}, cross-fitted")

        rows = calibration.dataset.add_column("calibration", _group_calibration(calibration))
        rows = tokenize_groups(rows, tokenizer, max_length=budget.max_length, on_bad_row="drop")
        repetition = _Repetition(settings, budget, seed, folder, stage, corpus, calibration, start, tokenizer, rows)
        # the reference is the same for all arms, so it runs over the data only once
        with tempfile.TemporaryDirectory() as scratch:
            trainer = RobustDPOTrainer(
                repetition.fresh_start(),
                None,
                repetition.trainer_config("erm", Path(scratch), precompute_ref_log_probs=True),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        return replace(repetition, rows=trainer.train_dataset)

    @property
    def steps(self) -> int:
        """Optimizer steps of each arm."""
        per_epoch = -(-len(self.rows) // self.budget.batch_size)
        return max(1, round(self.budget.epochs * per_epoch))

    def fresh_start(self) -> PreTrainedModel:
        """A trainable copy of the start model: as a reference it is frozen in place."""
        return copy.deepcopy(self.start).requires_grad_(True)

    def trainer_config(self, mode: str, folder: Path, **more: Any) -> RobustDPOConfig:
        """The arguments of every arm; only the mode differs."""
        return RobustDPOConfig(
            output_dir=str(folder / "checkpoints"),
            mode=mode,
            lam=self.budget.lam,
            beta=self.budget.beta,
            max_length=self.budget.max_length,
            max_steps=self.steps,
            per_device_train_batch_size=self.budget.batch_size,
            learning_rate=self.budget.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=max(1, self.steps // 40),
            save_strategy="no",
            seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **more,
        )

    def evaluate_start(self) -> ArmResult:
        """The model before preference training: it has no implicit reward yet, so it ranks by log-prob."""
        evaluation = evaluate_ranking(
            self.start, self.tokenizer, self.corpus.held_out, max_length=self.budget.max_length
        )
        self.stage(f"start: {evaluation.overall.token_logp_accuracy:.3f} of held-out pairs by log-prob per token")
        return ArmResult(START, self.seed, **_rankings(evaluation))

    def train(self, mode: str) -> ArmResult:
        """Train one arm from the start, with its own run directory, and evaluate it on clean pairs."""
        run = RunDirectory.create(self.folder / mode)
        config = self.trainer_config(mode, run.path)
        run.write_config({"mode": mode, "seed": self.seed, **asdict(self.budget)})
        began = time.perf_counter()
        trainer = RobustDPOTrainer(
            self.fresh_start(), None, config, train_dataset=self.rows, processing_class=self.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(MetricsCallback(run, trainer.worst_groups))
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.save_model(str(run.model))
        self.tokenizer.save_pretrained(str(run.model))
        rebuild(run)

        model = trainer.model
        held_out = self._rank(model, self.corpus.held_out)
        corrupted = self.corpus.corrupted
        result = ArmResult(
            mode,
            self.seed,
            **_rankings(held_out),
            correct=tuple(held_out.per_group["accuracy"].tolist()),
            corrupted_accuracy=self._rank(model, corrupted).overall.accuracy if len(corrupted) else None,
            ess=_mean([log["robust/ess"] for log in trainer.state.log_history if "robust/ess" in log]),
            seconds=seconds,
            run=run.path,
        )
        weighting = "calibrated" if from_mode(mode)[1] else "not calibrated"
        self.stage(f"{mode} ({weighting}): {held_out.overall.accuracy:.3f} of held-out pairs, {seconds:.0f} s")
        return result

    def _rank(self, model: PreTrainedModel, rows: Dataset) -> Evaluation:
        return evaluate_ranking(
            model,
            self.tokenizer,
            rows,
            ref_model=self.start,
            beta=self.budget.beta,
            max_length=self.budget.max_length,
            batch_size=self.budget.batch_size,
        )


def _group_calibration(calibration: CalibrationResult) -> list[float]:
    """Calibration of each group; where the label is trusted it is not estimated: K, the `share` of a certain label."""
    rows = calibration.dataset
    if "trusted" not in rows.column_names:
        return calibration.group_h
    sizes = [len(responses) for responses in rows["responses"]]
    known = zip(rows["trusted"], sizes, calibration.group_h, strict=True)
    return [float(size) if trusted else h for trusted, size, h in known]


def _rankings(evaluation: Evaluation) -> dict[str, Any]:
    plain = evaluation.to_dict()
    return {"held_out": plain["overall"], "by_source": plain["by_source"]}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
