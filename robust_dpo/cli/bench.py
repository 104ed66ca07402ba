"""`robust-dpo bench`: this package on this machine, against the physical limit and against its peers."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robust_dpo.cli.exit_codes import ExitCode
from robust_dpo.cli.options import OUTPUT_PANEL, Config, Debug

MEASUREMENT_PANEL = "Measurement"


class Device(str, Enum):
    """What to measure on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def bench(
    out: Annotated[
        Path,
        typer.Option(help="Directory of the results; called again, the run goes on.", rich_help_panel=OUTPUT_PANEL),
    ] = Path("runs/bench"),
    device: Annotated[
        Device, typer.Option(help="auto takes a GPU where there is one.", rich_help_panel=MEASUREMENT_PANEL)
    ] = Device.auto,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop after this long (default: 8 on a GPU, 5 on a CPU).", rich_help_panel=MEASUREMENT_PANEL),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Comma-separated: ceilings, head, chunks, products, rows, logits, epilogue, calibration, or parts of "
            "the names of cases (default: all).",
            rich_help_panel=MEASUREMENT_PANEL,
        ),
    ] = "",
    compare: Annotated[
        str,
        typer.Option(
            help="Comma-separated: plain, plain_compiled, trl, liger, liger_compiled, cce, … (default: all that are "
            "installed).",
            rich_help_panel=MEASUREMENT_PANEL,
        ),
    ] = "all",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny shapes, to see that everything runs.", rich_help_panel=MEASUREMENT_PANEL),
    ] = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Time the operators on this machine, each checked against float64 first.

    Every table shows time, achieved rate, the ratio to the floor (bare matrix products, or a copy of the same traffic,
    timed in the same rounds), peak memory, and the ratio to each peer that is installed. Results are written after
    every case; what there was no time for is measured when the command is called again with the same directory.

    **Example**: `robust-dpo bench --minutes 5 --compare plain,trl,liger`
    """
    from robust_dpo.bench.main import run_and_write, words
    from robust_dpo.bench.options import Options
    from robust_dpo.bench.tables import rich_table

    console = Console()

    def log(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    options = Options(out, minutes, device.value, words(only), words(compare), quick, preflight=False)
    written = run_and_write(options, log)
    if written.result is not None:
        for record in written.result.store.records.values():
            console.print()
            console.print(rich_table(record))
    for path in written.paths:
        log(f"wrote: {path}")
    if written.exit_code:
        raise typer.Exit(ExitCode.FAILED)
