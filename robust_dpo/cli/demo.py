"""`robust-dpo demo`: the whole pipeline in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_dpo.cli.options import DATA_PANEL, MODEL_PANEL, OUTPUT_PANEL, TRAINING_PANEL, Config, Debug, Mode, Seed


def demo(
    data: Annotated[
        str | None,
        typer.Option(
            help="Preference data, file or Hub name (default: a generated world whose true quality is known).",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Causal language model, directory or Hub name (default: a small Llama from scratch).",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything.", rich_help_panel=OUTPUT_PANEL)] = Path(
        "runs/demo"
    ),
    corruption: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of training labels reversed.", rich_help_panel=DATA_PANEL)
    ] = 0.4,
    trusted: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Share of the training pairs known to be right, for data without sources.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = 0.2,
    modes: Annotated[
        list[Mode] | None,
        typer.Option(
            help="What to train; may be given several times (default: erm dora).", rich_help_panel=TRAINING_PANEL
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Repetitions; more than one give a spread.", rich_help_panel=TRAINING_PANEL)
    ] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller and shorter: about a minute.", rich_help_panel=TRAINING_PANEL)
    ] = False,
    seed: Seed = 0,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Run the whole pipeline, calibrated worst case against plain DPO on bad labels, and print one table.

    It warms a model up, reverses 40 % of the training labels, calibrates, trains plain DPO and its calibrated robust
    form from the same start with the same budget, and evaluates both on clean held-out pairs. The table prints what
    came out, whoever wins.

    **Example**: `robust-dpo demo --data Anthropic/hh-rlhf --model Qwen/Qwen3-0.6B --out runs/hh`
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    from robust_dpo.demo import DemoSettings, run_demo
    from robust_dpo.demo.present import notes, rich_table, write
    from robust_dpo.demo.settings import default_budget

    # one line per stage is what this command shows
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    console = Console()
    settings = DemoSettings(
        out=out,
        budget=default_budget(real=data is not None, quick=quick),
        data=data,
        model=model,
        seed=seed,
        seeds=seeds,
        corruption=corruption,
        trusted=trusted,
        modes=tuple(mode.value for mode in modes) if modes else ("erm", "dora"),
    )
    result = run_demo(settings, log=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    paths = write(result)
    console.print()
    console.print(rich_table(result))
    for note in notes(result):
        console.print(f"• {note}", highlight=False, markup=False)
    console.print(f"{result.seconds:.0f} seconds in all")
    for path in paths:
        console.print(f"wrote: {path}", highlight=False, soft_wrap=True)
