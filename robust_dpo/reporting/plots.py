"""Plots of training runs. Every figure takes one run or several to compare, and is drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}


@dataclass(frozen=True)
class Curves:
    """What one run logged: `records` as in metrics.jsonl, `weights` G·q of recent groups (1 = average)."""

    name: str
    records: Sequence[Mapping[str, Any]]
    weights: Sequence[float] = ()

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric."""
        points = [(record["step"], record[key]) for record in self.records if record.get(key) is not None]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; the window shrinks at both ends."""
    half = window // 2
    return [
        sum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i - half) : min(len(values), i + half + 1)])
    ]


def _draw(axes: Axes, curves: Curves, key: str, colour: str, label: str, style: str = "-") -> bool:
    """One metric: a faint raw line under a smoothed one for training, markers for the few evaluations."""
    steps, values = curves.series(key)
    if not steps:
        return False
    if key.startswith("eval_"):
        axes.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=5, label=label)
        return True
    window = max(1, len(values) // 20)
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=1)
    axes.plot(steps, smoothed(values, window), color=colour, linestyle=style, label=label)
    return True


def figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure in the house style (call inside `rc_context(STYLE)`)."""
    drawing = Figure(figsize=(7, 4.2))
    axes = drawing.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return drawing, axes


def _metric_plot(
    title: str, ylabel: str, metrics: Sequence[tuple[str, str, str]], level: tuple[float, str] | None = None
) -> Callable[[Sequence[Curves]], Figure | None]:
    """A plot of metrics (key, label, line style) over optimizer steps; `level` is a horizontal line with its name."""

    def draw(runs: Sequence[Curves]) -> Figure | None:
        drawing, axes = figure(title, "optimizer step", ylabel)
        drawn = False
        # one run: every metric in its colour; several: the main metric and its evaluation, a colour for each run
        compared = [metric for metric in metrics if metric is metrics[0] or metric[0] == f"eval_{metrics[0][0]}"]
        for number, run in enumerate(runs):
            for place, (key, label, style) in enumerate(metrics if len(runs) == 1 else compared):
                colour = COLOURS[(place if len(runs) == 1 else number) % len(COLOURS)]
                name = label if len(runs) == 1 else f"{run.name}: {label}" if len(compared) > 1 else run.name
                drawn |= _draw(axes, run, key, colour, name, style)
        if not drawn:
            return None
        if level is not None:
            axes.axhline(level[0], color="grey", linestyle=":", linewidth=1.2, label=level[1])
        axes.legend()
        return drawing

    return draw


def weight_histogram(runs: Sequence[Curves]) -> Figure | None:
    """How unevenly the worst case weighs the groups: G·q, so 1 is the weight under the plain mean."""
    weighted = [run for run in runs if len(run.weights)]
    if not weighted:
        return None
    drawing, axes = figure(
        "Robust weights of the last steps",
        "robust weight × groups in the batch (1 = plain mean; the last bar is all beyond)",
        "groups (log scale)",
    )
    # a few weights far out would squeeze all others into one bar: they are counted in the last bin
    top = max(2.0, *(sorted(run.weights)[int(0.99 * (len(run.weights) - 1))] for run in weighted))
    edges = [top * i / 40 for i in range(41)]
    for number, run in enumerate(weighted):
        shown = [min(weight, top) for weight in run.weights]
        name = f"{run.name} (largest {max(run.weights):.1f})"
        axes.hist(shown, bins=edges, color=COLOURS[number % len(COLOURS)], alpha=0.55, label=name)
    axes.set_yscale("log")
    axes.axvline(1, color="grey", linestyle=":", linewidth=1.2, label="plain mean")
    axes.legend()
    return drawing


PLOTS: dict[str, Callable[[Sequence[Curves]], Figure | None]] = {
    "loss": _metric_plot("Loss", "loss", [("loss", "training", "-"), ("eval_loss", "evaluation", "--")]),
    "margins": _metric_plot(
        "Implicit reward",
        "β · log-ratio",
        [
            ("rewards/margins", "margin", "-"),
            ("rewards/chosen", "chosen", "-"),
            ("rewards/rejected", "rejected", "-"),
            ("eval_rewards/margins", "margin, evaluation", "--"),
        ],
        level=(0.0, "start"),
    ),
    "accuracy": _metric_plot(
        "Pairs ranked as labelled, by implicit reward",
        "share of pairs",
        [("rewards/accuracies", "training", "-"), ("eval_rewards/accuracies", "evaluation", "--")],
        level=(0.5, "chance"),
    ),
    "ess": _metric_plot(
        "Effective sample size of the robust weights", "1 / Σ q², groups", [("robust/ess", "effective groups", "-")]
    ),
    "weights": weight_histogram,
}


def draw_plots(runs: Sequence[Curves], directory: Path) -> list[Path]:
    """Draw every plot that the runs have data for; return the PNG paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in PLOTS.items():
        with rc_context(STYLE):
            drawing = draw(runs)
            if drawing is None:
                continue
            path = directory / f"{name}.png"
            drawing.savefig(path)
        paths.append(path)
    return paths
