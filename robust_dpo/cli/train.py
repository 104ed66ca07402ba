"""`robust-dpo train`: calibrated worst-case preference training of a causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_dpo.cli.options import (
    DATA_PANEL,
    MODEL_PANEL,
    OBJECTIVE_PANEL,
    OUTPUT_PANEL,
    TRAINING_PANEL,
    BadRow,
    Config,
    Data,
    Debug,
    DomainColumn,
    Form,
    Mode,
    OnBadRow,
    Overwrite,
    Seed,
)


def train(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="Causal language model: directory or Hub name.", rich_help_panel=MODEL_PANEL)
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Run directory to make.", rich_help_panel=OUTPUT_PANEL)],
    eval_data: Annotated[
        str | None, typer.Option(help="Preference data to evaluate on during training.", rich_help_panel=DATA_PANEL)
    ] = None,
    on_bad_row: BadRow = OnBadRow.error,
    domain_column: DomainColumn = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of prompt and response together.", rich_help_panel=DATA_PANEL)
    ] = 1024,
    ref_model: Annotated[
        str | None,
        typer.Option(help="Reference model (default: the model as it is at the start).", rich_help_panel=MODEL_PANEL),
    ] = None,
    precompute_ref: Annotated[
        bool,
        typer.Option(help="Compute all reference log-probs once, before training.", rich_help_panel=MODEL_PANEL),
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory for what later runs can use again: token ids and reference log-probs (default: log-probs "
            "in the run directory, token ids nowhere).",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    num_proc: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenise the data.", rich_help_panel=DATA_PANEL)
    ] = None,
    lora_r: Annotated[
        int, typer.Option(min=0, help="Rank of a LoRA adapter; 0 trains all weights.", rich_help_panel=MODEL_PANEL)
    ] = 0,
    lora_alpha: Annotated[int, typer.Option(min=1, help="Its scale.", rich_help_panel=MODEL_PANEL)] = 16,
    mode: Annotated[
        Mode,
        typer.Option(
            help="erm: mean loss. reweight: mean h·loss. dro: worst case. dora: calibrated worst case. "
            "dora_outside: worst case times mean h. (RobustDPOConfig in Python has dro as its default.)",
            rich_help_panel=OBJECTIVE_PANEL,
        ),
    ] = Mode.dora,
    loss: Annotated[
        str, typer.Option(help="Preference loss: sigmoid (DPO), ipo, cdpo, simpo, …", rich_help_panel=OBJECTIVE_PANEL)
    ] = "sigmoid",
    beta: Annotated[
        float | None,
        typer.Option(help="Scale of the reward (default: the loss's own).", rich_help_panel=OBJECTIVE_PANEL),
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            help="Robustness λ: large is the mean, small the worst group (default: 1).", rich_help_panel=OBJECTIVE_PANEL
        ),
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(help="KL radius ρ; λ is then found for it at every step.", rich_help_panel=OBJECTIVE_PANEL),
    ] = None,
    robust: Annotated[
        str | None,
        typer.Option(
            help="Aggregation over groups by name, in place of the mode's: cvar, chi2, group_dro, …; parameters with "
            "--trainer-arg 'robust_options={…}'.",
            rich_help_panel=OBJECTIVE_PANEL,
        ),
    ] = None,
    form: Annotated[
        Form, typer.Option(help="How probabilities become density ratios h.", rich_help_panel=OBJECTIVE_PANEL)
    ] = Form.paper,
    reduce: Annotated[
        str,
        typer.Option(
            help="From h of responses to h of groups: mean, chosen, share, product or min.",
            rich_help_panel=OBJECTIVE_PANEL,
        ),
    ] = "mean",
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="calibration.json of `calibrate`: the proportions of the mixture that h is computed with "
            "(default: target and other responses in equal parts).",
            rich_help_panel=OBJECTIVE_PANEL,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING_PANEL)] = 1.0,
    max_steps: Annotated[
        int, typer.Option(help="Optimizer steps, instead of --epochs, if above 0.", rich_help_panel=TRAINING_PANEL)
    ] = -1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Groups per device and micro-batch.", rich_help_panel=TRAINING_PANEL)
    ] = 8,
    accumulation: Annotated[
        int, typer.Option(min=1, help="Micro-batches per optimizer step.", rich_help_panel=TRAINING_PANEL)
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING_PANEL)] = 1e-6,
    scheduler: Annotated[
        str, typer.Option(help="Learning-rate schedule: linear, cosine, constant, …", rich_help_panel=TRAINING_PANEL)
    ] = "linear",
    warmup_steps: Annotated[
        float,
        typer.Option(help="Steps of warm-up; a number below 1 is a share of all.", rich_help_panel=TRAINING_PANEL),
    ] = 0.03,
    logging_steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps between two logs.", rich_help_panel=TRAINING_PANEL)
    ] = 10,
    eval_steps: Annotated[
        int,
        typer.Option(
            min=1, help="Optimizer steps between two evaluations on --eval-data.", rich_help_panel=TRAINING_PANEL
        ),
    ] = 100,
    save_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Optimizer steps between two checkpoints, of which the last two are kept; 0: none.",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = 500,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.", rich_help_panel=TRAINING_PANEL)] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(help="Less memory, more time.", rich_help_panel=TRAINING_PANEL),
    ] = False,
    trainer_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other field of RobustDPOConfig; may be given several times.",
            rich_help_panel=TRAINING_PANEL,
        ),
    ] = None,
    seed: Seed = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    overwrite: Overwrite = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Train a model on preference data with the calibrated worst-case objective, or with one of its ablations.

    The modes reweight, dora and dora_outside need `probs` in the data: run calibrate first. The run directory gets
    config.yaml (give it to --config to repeat the run), metrics.jsonl, plots/, checkpoints/ and model/ with its
    tokenizer. A killed run goes on with --resume and ends with the same weights.

    **Example**: `robust-dpo train --model Qwen/Qwen3-0.6B --data calibrated.jsonl --lam 1 --out runs/robust`
    """
    from robust_dpo.cli.training import TrainingRun

    options = {key: value for key, value in ctx.params.items() if key not in ("config", "debug", "resume", "overwrite")}
    TrainingRun(options, resume=resume, overwrite=overwrite).start()
