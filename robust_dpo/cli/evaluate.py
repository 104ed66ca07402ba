"""`robust-dpo evaluate`: how well a model ranks the responses of preference data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_dpo.cli.options import (
    DATA_PANEL,
    MODEL_PANEL,
    OBJECTIVE_PANEL,
    OUTPUT_PANEL,
    BadRow,
    Config,
    Data,
    Debug,
    OnBadRow,
    Overwrite,
)


def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="Model to evaluate: directory (such as runs/x/model) or Hub name.", rich_help_panel=MODEL_PANEL
        ),
    ],
    data: Data,
    ref_model: Annotated[
        str | None,
        typer.Option(
            help="Reference of the implicit reward, usually the model that training started from.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    on_bad_row: BadRow = OnBadRow.error,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of prompt and response together.", rich_help_panel=DATA_PANEL)
    ] = 1024,
    loss: Annotated[
        str, typer.Option(help="Loss whose mean is reported (with --ref-model).", rich_help_panel=OBJECTIVE_PANEL)
    ] = "sigmoid",
    beta: Annotated[
        float | None,
        typer.Option(help="Scale of the reward (default: the loss's own).", rich_help_panel=OBJECTIVE_PANEL),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Groups at a time.", rich_help_panel=MODEL_PANEL)] = 8,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.", rich_help_panel=OUTPUT_PANEL)] = None,
    overwrite: Overwrite = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Measure how often a model ranks the preferred response first, with and without its reference.

    With --ref-model: accuracy, margin and loss by implicit reward (β · log-ratio). Always: accuracy by log-prob, by
    log-prob per token, and mean log-probs. Where the data names sources, everything is repeated by source.

    **Example**: `robust-dpo evaluate --model runs/robust/model --ref-model start --data held_out.jsonl`
    """
    from robust_dpo.cli.models import load_causal_lm, load_tokenizer
    from robust_dpo.data import load_preferences
    from robust_dpo.evaluation import evaluate_ranking
    from robust_dpo.reporting.run_directory import write_json
    from robust_dpo.reporting.summary import ranking_table

    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"{out}: is already there; choose another --out, or give --overwrite")
    console = Console()
    loaded = load_preferences(data, on_bad_row=on_bad_row.value)
    console.print(str(loaded.report), highlight=False, markup=False)
    evaluation = evaluate_ranking(
        load_causal_lm(model),
        load_tokenizer(model),
        loaded.dataset,
        ref_model=None if ref_model is None else load_causal_lm(ref_model),
        loss=loss,
        beta=beta,
        max_length=max_length,
        batch_size=batch_size,
    )
    console.print(ranking_table(evaluation.overall, evaluation.by_source))
    if out is not None:
        write_json(out, {"model": model, "ref_model": ref_model, "data": data, **evaluation.to_dict()})
        console.print(f"wrote: {out}", highlight=False, soft_wrap=True)
