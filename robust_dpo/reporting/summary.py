"""The summary of a run in a few numbers, and tables that put several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from robust_dpo.reporting.plots import Curves

if TYPE_CHECKING:
    from robust_dpo.evaluation import Ranking

# metric in metrics.jsonl -> what the reader sees; the last logged value counts.
METRICS: dict[str, str] = {
    "eval_rewards/accuracies": "accuracy, evaluation",
    "eval_rewards/margins": "margin, evaluation",
    "eval_loss": "loss, evaluation",
    "rewards/accuracies": "accuracy, training",
    "rewards/margins": "margin, training",
    "loss": "loss, training",
    "robust/ess": "effective sample size",
    "robust/max_weight": "largest robust weight",
    "robust/lambda": "λ",
    "train_runtime": "seconds",
}

# field of evaluation.Ranking -> what the reader sees
RANKING: dict[str, str] = {
    "groups": "groups",
    "accuracy": "accuracy by implicit reward",
    "accuracy_se": "± standard error",
    "margin": "margin of the implicit reward",
    "loss": "loss",
    "logp_accuracy": "accuracy by log-prob",
    "token_logp_accuracy": "accuracy by log-prob per token",
    "chosen_logp": "log-prob, chosen",
    "rejected_logp": "log-prob, rejected",
}


def summarise(curves: Curves) -> dict[str, float]:
    """Steps, and the last value of each metric that the run logged."""
    summary: dict[str, float] = {"steps": max((record.get("step", 0) for record in curves.records), default=0)}
    for key in METRICS:
        _, values = curves.series(key)
        if values:
            summary[key] = values[-1]
    return summary


def number(value: object) -> str:
    """A number for a table: four significant digits, integers as they are, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value)}" if isinstance(value, (int, float)) else str(value)


def comparison_table(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row per metric, one column per run; metrics that no run has are left out."""
    table = Table(title="Runs" if len(names) > 1 else f"Run {names[0]}", title_justify="left", title_style="bold")
    table.add_column("last value of")
    for name in names:
        table.add_column(name, justify="right")
    for key, label in {"steps": "optimizer steps", **METRICS}.items():
        values = [summary.get(key) for summary in summaries]
        if any(value is not None for value in values):
            table.add_row(label, *(number(value) for value in values))
    return table


def ranking_table(overall: Ranking, by_source: Mapping[str, Ranking]) -> Table:
    """One column for all groups and one for each source; measures that need a reference are left out without one."""
    table = Table(title="Ranking of the responses", title_justify="left", title_style="bold")
    table.add_column("")
    columns = {"all": overall, **by_source}
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in RANKING.items():
        values = [getattr(ranking, key) for ranking in columns.values()]
        if values[0] is not None:
            table.add_row(label, *(number(value) for value in values))
    return table
