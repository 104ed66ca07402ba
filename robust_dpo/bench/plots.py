"""Plots of a run: time against floor and peers, bandwidth of kernels that memory bounds, chunk sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.tables import ordered

_COLOURS = {Role.OURS: "#1b7837", Role.PEER: "#9aa5b1", Role.FLOOR: "#2b2d42", Role.PART: "#4575b4"}
_PANELS = 8


def draw(records: dict[str, Record], folder: Path) -> list[Path]:
    """Write the plots that there are measurements for; returns their paths."""
    plots = {"head.png": _head(records), "bandwidth.png": _bandwidth(records), "chunks.png": _chunks(records)}
    written = []
    for name, figure in plots.items():
        if figure is not None:
            path = folder / name
            FigureCanvasAgg(figure)
            figure.savefig(path, dpi=140)
            written.append(path)
    return written


def _timed(record: Record) -> list[tuple[Row, float]]:
    return [(row, row.median) for row in ordered(record) if row.median is not None]


def _of_group(records: dict[str, Record], *groups: str) -> list[Record]:
    return [record for record in records.values() if record.group in groups and _timed(record)]


def _wrap(title: str) -> str:
    return title.replace(": ", "\n", 1)


def _panels(records: list[Record], value: Callable[[Record, Row], float | None], unit: str) -> Figure | None:
    """A panel of horizontal bars for each record, the floor's value as a line through them."""
    if not records:
        return None
    columns = min(2, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(7 * columns, 3.2 * rows), layout="constrained")
    for index, record in enumerate(records):
        axes = figure.add_subplot(rows, columns, index + 1)
        timed = [(row, value(record, row) or 0.0) for row, _ in _timed(record)]
        names = [row.name if row.role is not Role.PEER or row.note is None else f"{row.name} *" for row, _ in timed]
        bars = axes.barh(names, [size for _, size in timed], color=[_COLOURS[row.role] for row, _ in timed])
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        floor = next((size for row, size in timed if row.role is Role.FLOOR), None)
        if floor is not None:
            axes.axvline(floor, color=_COLOURS[Role.FLOOR], linestyle=":", linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"{unit} (* another loss)" if any(name.endswith("*") for name in names) else unit)
        axes.set_title(_wrap(record.title), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _head(records: dict[str, Record]) -> Figure | None:
    """Milliseconds of everybody, in the most important cases of the head."""
    chosen = _of_group(records, "head")[:_PANELS]
    return _panels(chosen, lambda record, row: 1e3 * (row.median or 0.0), "milliseconds")


def _bandwidth(records: dict[str, Record]) -> Figure | None:
    """Unavoidable bytes per second of the kernels that memory bounds, beside a copy of the same traffic."""
    chosen = [record for record in _of_group(records, "rows", "logits") if record.bytes]

    def rate(record: Record, row: Row) -> float | None:
        found = record.rate(row)
        return None if found is None else found / 1e9

    return _panels(chosen[:_PANELS], rate, "GB/s of unavoidable traffic")


def _chunks(records: dict[str, Record]) -> Figure | None:
    """Time by chunk size: ours and the bare products with the same chunks; peak memory on the other axis."""
    chosen = _of_group(records, "chunks")
    if not chosen:
        return None
    figure = Figure(figsize=(7 * len(chosen), 4.2), layout="constrained")
    for index, record in enumerate(chosen):
        axes = figure.add_subplot(1, len(chosen), index + 1)
        memory = axes.twinx()
        for role, label in ((Role.OURS, "ours"), (Role.FLOOR, "bare products")):
            points = [(row.parameters["chunk"], 1e3 * median) for row, median in _timed(record) if row.role is role]
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=_COLOURS[role], label=label)
        extra = [(row.parameters["chunk"], row.extra_bytes / 2**30) for row, _ in _timed(record) if row.extra_bytes]
        if extra:
            memory.plot(*zip(*sorted(extra), strict=True), "s--", color="#b2182b", label="extra memory", linewidth=1)
        memory.set_ylabel("extra memory, GiB", color="#b2182b")
        memory.set_ylim(bottom=0)
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        sizes = sorted({row.parameters["chunk"] for row, _ in _timed(record)})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("rows of a chunk")
        axes.set_ylabel("milliseconds")
        axes.set_title(_wrap(record.title), fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure
