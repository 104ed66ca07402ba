"""Options that several commands share, so that one name means one thing."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from robust_dpo.cli.config_file import apply_config
from robust_dpo.cli.failures import enable_debug

DATA_PANEL = "Data"
MODEL_PANEL = "Model"
OBJECTIVE_PANEL = "Objective"
TRAINING_PANEL = "Training"
CLASSIFIER_PANEL = "Classifier"
OUTPUT_PANEL = "Output"
GENERAL_PANEL = "General"


class OnBadRow(str, Enum):
    """What to do with a row that cannot be used."""

    error = "error"
    drop = "drop"


class Mode(str, Enum):
    """Which value over the groups is minimised."""

    erm = "erm"
    reweight = "reweight"
    dro = "dro"
    dora = "dora"
    dora_outside = "dora_outside"


class Form(str, Enum):
    """How a classifier probability becomes a density ratio."""

    paper = "paper"
    mixture = "mixture"
    official = "official"


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        exists=True,
        dir_okay=False,
        is_eager=True,
        callback=apply_config,
        help="YAML file of options; options on the command line override it.",
        rich_help_panel=GENERAL_PANEL,
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        is_eager=True,
        callback=enable_debug,
        help="Show the traceback of an error.",
        rich_help_panel=GENERAL_PANEL,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="Preference data: a .jsonl, .jsonl.gz or .parquet file, or a data set name on the Hub.",
        rich_help_panel=DATA_PANEL,
    ),
]
BadRow = Annotated[
    OnBadRow,
    typer.Option(
        help="Rows that cannot be used: stop at the first, or drop, count and explain them.", rich_help_panel=DATA_PANEL
    ),
]
DomainColumn = Annotated[
    str | None,
    typer.Option(
        help="Column that names the part of the data that a row belongs to, for --robust group_dro; kept as `domain`, "
        "which is the default there.",
        rich_help_panel=DATA_PANEL,
    ),
]
Seed = Annotated[int, typer.Option(help="Every random choice follows from it.", rich_help_panel=GENERAL_PANEL)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it is there.", rich_help_panel=OUTPUT_PANEL)
]
