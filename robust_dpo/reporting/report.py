"""Rebuilds plots and summary from what a run directory holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from robust_dpo.reporting.plots import Curves, draw_plots
from robust_dpo.reporting.run_directory import RunDirectory, write_json
from robust_dpo.reporting.summary import summarise


def read_curves(run: RunDirectory, name: str | None = None) -> Curves:
    """What a run logged.

    Raises:
        DataError: metrics.jsonl is damaged.
    """
    weights = json.loads(run.weights.read_text(encoding="utf-8"))["weights"] if run.weights.is_file() else []
    return Curves(name or run.name, run.read_metrics(), weights)


def rebuild(run: RunDirectory) -> tuple[dict[str, float], list[Path]]:
    """Draw the plots of one run and write its summary.json; returns the summary and the PNG paths."""
    curves = read_curves(run)
    summary = summarise(curves)
    write_json(run.summary, summary)
    return summary, draw_plots([curves], run.plots)


def compare(runs: Sequence[RunDirectory], directory: Path) -> tuple[list[str], list[dict[str, float]], list[Path]]:
    """Plots of several runs in one; returns names, summaries and PNG paths. Runs of the same name show their parent."""
    plain = [run.name for run in runs]
    names = [
        name if plain.count(name) == 1 else f"{run.path.resolve().parent.name}/{name}"
        for run, name in zip(runs, plain, strict=True)
    ]
    curves = [read_curves(run, name) for run, name in zip(runs, names, strict=True)]
    return names, [summarise(item) for item in curves], draw_plots(curves, directory)
