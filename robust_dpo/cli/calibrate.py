"""`robust-dpo calibrate`: how much each response looks like the target distribution."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from robust_dpo.cli.options import (
    CLASSIFIER_PANEL,
    DATA_PANEL,
    OUTPUT_PANEL,
    BadRow,
    Config,
    Data,
    Debug,
    DomainColumn,
    Form,
    OnBadRow,
    Overwrite,
    Seed,
)


class Probability(str, Enum):
    """How decision values become probabilities."""

    platt = "platt"
    isotonic = "isotonic"


def calibrate(
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            help="File for the data with probabilities: .jsonl, .jsonl.gz or .parquet. The report goes beside it.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ],
    report_dir: Annotated[
        Path | None,
        typer.Option(help="Where the report goes (default: OUT.calibration/).", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="The source whose responses are the target; or 'chosen': the preferred responses of --golden.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = "human",
    golden: Annotated[
        str | None,
        typer.Option(help="More data to learn from that is known to be right; not scored.", rich_help_panel=DATA_PANEL),
    ] = None,
    on_bad_row: BadRow = OnBadRow.error,
    domain_column: DomainColumn = None,
    classifier: Annotated[
        str,
        typer.Option(
            help="'tfidf' (nothing to download), or the name or directory of an encoder such as bert-base-uncased.",
            rich_help_panel=CLASSIFIER_PANEL,
        ),
    ] = "tfidf",
    folds: Annotated[
        int, typer.Option(min=2, help="Folds of the cross-fitting, by prompt.", rich_help_panel=CLASSIFIER_PANEL)
    ] = 5,
    probability: Annotated[
        Probability, typer.Option(help="Probability calibration.", rich_help_panel=CLASSIFIER_PANEL)
    ] = Probability.platt,
    include_prompt: Annotated[
        bool,
        typer.Option(help="The classifier reads the prompt too.", rich_help_panel=CLASSIFIER_PANEL),
    ] = False,
    form: Annotated[
        Form, typer.Option(help="Form of the density ratio in the report.", rich_help_panel=CLASSIFIER_PANEL)
    ] = Form.paper,
    reduce: Annotated[
        str,
        typer.Option(
            help="From responses to groups: mean, chosen, share, product or min.", rich_help_panel=CLASSIFIER_PANEL
        ),
    ] = "mean",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Give every response the probability that it is from the target distribution.

    A classifier learns the responses of the target source (by default "human") against all others. It is cross-fitted:
    no response is scored by a model that saw its prompt. The data comes back with `probs`, and a report says how good
    they are: AUC, Brier score, calibration error, reliability diagram, and the density ratio h by source.

    **Example**: `robust-dpo calibrate --data mixed.jsonl --target human --out mixed.calibrated.jsonl`
    """
    from robust_dpo.calibration import calibrate_dataset
    from robust_dpo.data import load_preferences, save_preferences

    folder = report_dir or out.with_name(out.name + ".calibration")
    for path in (out, folder):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path}: is already there; choose another --out, or give --overwrite")
    console = Console()
    loaded = load_preferences(data, on_bad_row=on_bad_row.value, domain_column=domain_column)
    console.print(str(loaded.report), highlight=False, markup=False)
    result = calibrate_dataset(
        loaded.dataset,
        target=target,
        golden=None if golden is None else load_preferences(golden, on_bad_row=on_bad_row.value).dataset,
        classifier=classifier,
        include_prompt=include_prompt,
        probability=probability.value,
        folds=folds,
        seed=seed,
        form=form.value,
        reduce=reduce,
        overwrite=overwrite,
    )
    save_preferences(result.dataset, out)
    saved = result.report.save(folder)

    report = result.report
    table = Table(title="Calibration", title_justify="left", title_style="bold", show_header=False)
    table.add_row("AUC (0.5 is chance)", f"{report.auc:.3f}")
    table.add_row("Brier score", f"{report.brier:.3f}")
    table.add_row("expected calibration error", f"{report.expected_calibration_error:.3f}")
    for kind, spread in report.h_by_kind.items():
        table.add_row(f"mean h of {kind}", f"{spread.mean:.2f} ({spread.count} responses)")
    table.add_row("effective groups under h", f"{report.ess:.0f} of {report.num_groups}")
    console.print(table)
    for path in (out, *saved):
        console.print(f"wrote: {path}", highlight=False, soft_wrap=True)
    console.print(
        f"next: robust-dpo train --data {out} --calibration {saved[0]} --form {form.value} --reduce {reduce} "
        "--mode dora --model MODEL --out runs/robust",
        highlight=False,
        soft_wrap=True,
    )
