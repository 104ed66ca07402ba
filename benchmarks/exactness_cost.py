"""What does it cost that weights span the global batch? Steps of the same trainer, in turns, against plain DPO.

    python benchmarks/exactness_cost.py --docs docs/exactness.md

Every contestant takes steps of 16 pairs in 4 micro-batches, a few at a time, round after round. The table has medians
of all steps but the first of each turn, as ratios to plain DPO: a mean over each micro-batch by itself. CPU time is
that of all threads, and says more than the clock where others use the same cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from robust_dpo.bench.tables import replace_between
from robust_dpo.bench.train_step.data import Row, make_workload, padding_tokenizer
from robust_dpo.bench.train_step.setting import MODELS, Setting
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

GROUPS, MICRO_BATCHES = 16, 4
PLAIN = "plain DPO, each micro-batch by itself"
CONTESTANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"mode": "erm", "robust_scope": "micro_batch"},
    "plain DPO, mean over the global batch": {"mode": "erm"},
    "robust, one pass": {"mode": "dora", "lam": 0.1},
    "robust, two passes": {"mode": "dora", "lam": 0.1, "robust_route": "two_pass"},
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step, by the clock and of the CPU, from the end of the one before in the same turn."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.seconds.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def make(options: dict[str, Any], chosen: Setting, rows: list[Row], folder: str, steps: int) -> tuple[Any, Clock]:
    clock = Clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the scope
        args = RobustDPOConfig(
            output_dir=folder,
            per_device_train_batch_size=GROUPS // MICRO_BATCHES,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_steps=steps + 1,
            learning_rate=1e-5,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=chosen.device == "cpu",
            **options,
        )
    trainer = RobustDPOTrainer(
        chosen.policy(),
        chosen.reference_model(),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=padding_tokenizer(),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def table(seconds: dict[str, list[tuple[float, float]]], chosen: Setting) -> str:
    base = [statistics.median(values) for values in zip(*seconds[PLAIN], strict=True)]
    lines = [
        f"{chosen.model.name} model ({chosen.model.vocab:,} × {chosen.model.hidden}, {chosen.model.layers} layers), "
        f"{GROUPS} pairs in {MICRO_BATCHES} micro-batches, fp32, {chosen.device}, threads: {torch.get_num_threads()}, "
        f"{len(seconds[PLAIN])} steps of each, in turns; ratios of medians, and of their quartiles:",
        "",
        "| | CPU time of a step | time of a step |",
        "|---|---:|---:|",
    ]
    for name, steps in seconds.items():
        clock, cpu = (
            "{1:.3f} ({0:.3f} to {2:.3f})".format(*(each / of_plain for each in statistics.quantiles(values, n=4)))
            for values, of_plain in zip(zip(*steps, strict=True), base, strict=True)
        )
        lines.append(f"| {name} | {cpu} | {clock} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--docs", type=Path, help="Markdown file to put the table into, between its markers")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    chosen = Setting(
        model=MODELS[options.model],
        dtype="fp32",
        reference="live",
        responses=2,
        groups=GROUPS,
        max_length=256,
        warmups=0,
        rounds=options.steps + 1,
        device=options.device,
        attention="sdpa",
        seed=0,
    )
    rows = make_workload(chosen, None).rows
    with tempfile.TemporaryDirectory() as folder:
        made = {name: make(fields, chosen, rows, folder, options.steps) for name, fields in CONTESTANTS.items()}
        for _ in range(options.rounds):
            for trainer, _clock in made.values():
                trainer.train()
    text = table({name: clock.seconds for name, (_, clock) in made.items()}, chosen)
    print(text)
    if options.docs is not None:
        replace_between(options.docs, "cost", text)


if __name__ == "__main__":
    main()
