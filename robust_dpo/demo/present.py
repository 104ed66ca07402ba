"""The demo's table, plots and files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from rich.table import Table

from robust_dpo.demo.pipeline import START, ArmResult, DemoResult
from robust_dpo.reporting import RunDirectory
from robust_dpo.reporting.plots import COLOURS, STYLE, draw_plots, figure
from robust_dpo.reporting.report import read_curves
from robust_dpo.reporting.run_directory import write_json

NAMES = {
    START: "start",
    "erm": "plain DPO",
    "reweight": "calibrated mean",
    "dro": "worst case",
    "dora": "DoRA",
    "dora_outside": "worst case × mean h",
}
COLUMNS = (
    "model",
    "held-out accuracy",
    "margin",
    "corrupted pairs",
    "ESS",
    "seconds",
)


@dataclass(frozen=True)
class Row:
    """One line of the table, as texts in the order of COLUMNS."""

    cells: tuple[str, ...]


def table_rows(result: DemoResult) -> list[Row]:
    """One row per model; with several seeds mean ± standard deviation over them, else accuracy ± standard error."""
    return [_row(result, mode) for mode in (START, *result.settings.modes)]


def _row(result: DemoResult, mode: str) -> Row:
    arms = [arm for arm in result.arms if arm.mode == mode]
    if mode == START:
        # no implicit reward before training: the log-prob per token is what ranks
        accuracy = _spread([arm.held_out["token_logp_accuracy"] for arm in arms], 3) + " *"
        return Row((NAMES[mode], accuracy, "–", "–", "–", "–"))
    accuracies = [arm.held_out["accuracy"] for arm in arms]
    single = f"{accuracies[0]:.3f} ± {arms[0].held_out['accuracy_se']:.3f}"
    return Row(
        (
            NAMES[mode],
            single if len(arms) == 1 else _spread(accuracies, 3),
            _spread([arm.held_out["margin"] for arm in arms], 3),
            _spread([arm.corrupted_accuracy for arm in arms], 3),
            f"{_mean([arm.ess for arm in arms], 1)} of {result.batch_size}",
            _mean([arm.seconds for arm in arms], 0),
        )
    )


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else "–"


def notes(result: DemoResult) -> list[str]:
    """What a reader needs to know to judge the table."""
    settings, budget = result.settings, result.settings.budget
    seeds = f"{settings.seeds} seeds, mean ± standard deviation" if settings.seeds > 1 else f"seed {settings.seed}"
    auc = statistics.fmean(report["auc"] for report in result.calibrations)
    lines = [
        f"Data: {result.description}.",
        f"Each arm: {result.steps} steps of {budget.batch_size} pairs from the same start, same order, learning rate, "
        f"β = {budget.beta:g}; DoRA is the calibrated worst case, λ = {budget.lam:g}. {seeds[:1].upper()}{seeds[1:]}.",
        f"Classifier, cross-fitted: AUC {auc:.3f} (0.5 is chance).{_separation(result)}",
        "Held-out pairs are clean and of other prompts. Accuracy and margin are of the implicit reward β·(log-ratio to "
        "the start); * the start has none and ranks by log-prob per token.",
        "Corrupted pairs: share of the training pairs with a reversed label that the model ranks by the true one. ESS: "
        "effective sample size of the robust weights of a batch.",
    ]
    if len(settings.modes) > 1:
        lines.append(verdict(result))
    return lines


def _separation(result: DemoResult) -> str:
    known = [report["corruption"] for report in result.calibrations if report["corruption"]]
    if not known:
        return ""
    auc = statistics.fmean(report["auc"] for report in known)
    return f" A clean pair has a higher h than a corrupted one with probability {auc:.3f}."


def verdict(result: DemoResult) -> str:
    """What the numbers say, whichever arm is ahead: the paired difference of the last mode and the first."""
    first, last = result.settings.modes[0], result.settings.modes[-1]
    by_seed = [
        [
            new - old
            for new, old in zip(_correct(result.arms, last, seed), _correct(result.arms, first, seed), strict=True)
        ]
        for seed in sorted({arm.seed for arm in result.arms})
    ]
    if len(by_seed) > 1:
        differences, basis = [statistics.fmean(each) for each in by_seed], f"over {len(by_seed)} seeds"
    else:
        differences, basis = by_seed[0], "over the same pairs"
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    size = "more than two standard errors" if abs(mean) > 2 * error else "within two standard errors: no clear winner"
    return f"{NAMES[last]} minus {NAMES[first]}: {mean:+.3f} ± {error:.3f} held-out accuracy (paired, {basis}), {size}."


def _correct(arms: Sequence[ArmResult], mode: str, seed: int) -> tuple[float, ...]:
    return next(arm.correct for arm in arms if arm.mode == mode and arm.seed == seed)


def rich_table(result: DemoResult) -> Table:
    """The table for a terminal."""
    table = Table(
        title="Clean held-out pairs after training on corrupted ones", title_justify="left", title_style="bold"
    )
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in table_rows(result):
        table.add_row(*row.cells)
    return table


def markdown(result: DemoResult, plots: Sequence[Path]) -> str:
    """The table, the notes and the plots as a page."""
    lines = ["# Demo", "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(row.cells) + " |" for row in table_rows(result)]
    lines += ["", *(f"- {note}" for note in notes(result)), ""]
    lines += [f"![{path.stem}]({path.relative_to(result.settings.out)})" for path in plots]
    return "\n".join(lines) + "\n"


def draw(result: DemoResult) -> list[Path]:
    """Curves of the arms of the first seed in one figure each, and the accuracies of all."""
    folder = result.settings.out / "plots"
    first = [arm for arm in result.arms if arm.seed == result.settings.seed and arm.run is not None]
    curves = [read_curves(RunDirectory(arm.run), NAMES[arm.mode]) for arm in first if arm.run is not None]
    return [_draw_accuracies(result, folder), *draw_plots(curves, folder)]


def _draw_accuracies(result: DemoResult, folder: Path) -> Path:
    """Held-out accuracy of every arm: bars of the mean, a dot for every seed, standard errors for a single one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "held_out.png"
    with rc_context(STYLE):
        drawing, axes = figure("Clean held-out pairs ranked right", "", "share of pairs")
        for place, mode in enumerate(result.settings.modes):
            arms = [arm for arm in result.arms if arm.mode == mode]
            accuracies = [arm.held_out["accuracy"] for arm in arms]
            error = arms[0].held_out["accuracy_se"] if len(arms) == 1 else statistics.stdev(accuracies)
            mean = statistics.fmean(accuracies)
            axes.bar(place, mean, yerr=error, capsize=5, width=0.55, color=COLOURS[place], alpha=0.85)
            axes.annotate(f"{mean:.3f}", (place, mean + error), (0, 5), textcoords="offset points", ha="center")
            if len(arms) > 1:
                axes.scatter([place] * len(arms), accuracies, color="black", s=14, zorder=3)
        axes.axhline(0.5, color="grey", linestyle=":", linewidth=1.2, label="chance")
        axes.set_xticks(range(len(result.settings.modes)), [NAMES[mode] for mode in result.settings.modes])
        axes.set_ylim(0, 1)
        axes.legend(loc="upper left")
        drawing.savefig(path)
    return path


def write(result: DemoResult) -> list[Path]:
    """Plots, demo.md and results.json; returns their paths."""
    plots = draw(result)
    page, numbers = result.settings.out / "demo.md", result.settings.out / "results.json"
    page.write_text(markdown(result, plots), encoding="utf-8")
    write_json(numbers, result.to_dict())
    return [*plots, page, numbers]
