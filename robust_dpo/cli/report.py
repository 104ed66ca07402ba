"""`robust-dpo report`: plots and tables of finished or running runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_dpo.cli.options import OUTPUT_PANEL, Debug


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, as `train --out` made them.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the comparison of several runs goes (default: comparison/ beside the first run).",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Rebuild the plots and the summary table of a run, or put several runs beside each other.

    It reads only metrics.jsonl and weights.json, so it also works on a run that is still going or was killed. One run:
    its plots/ and summary.json are written anew. Several: every metric is drawn in one plot for all.

    **Example**: `robust-dpo report runs/plain runs/robust --out runs/comparison`
    """
    from robust_dpo.reporting import RunDirectory
    from robust_dpo.reporting.report import compare, rebuild
    from robust_dpo.reporting.summary import comparison_table

    directories = [RunDirectory.open(path) for path in runs]
    if len(directories) == 1 and out is None:
        summary, plots = rebuild(directories[0])
        names, summaries = [directories[0].name], [summary]
    else:
        names, summaries, plots = compare(directories, out or directories[0].path.resolve().parent / "comparison")
    console = Console()
    console.print(comparison_table(names, summaries))
    for path in plots:
        console.print(f"plot: {path}", highlight=False, soft_wrap=True)
