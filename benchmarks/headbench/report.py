"""Measurements to tables: one list of columns feeds the terminal, Markdown and the generated part of the docs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from headbench.machine import Machine

OURS = "ours"


@dataclass
class Row:
    """What was measured of one implementation at one dtype; None where it failed or was not asked for."""

    name: str
    dtype: str
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    memory_method: str | None = None
    loss_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    first_seconds: float | None = None
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Section:
    """All rows of one dtype, in the order they were measured, with the floor's."""

    dtype: str
    rows: list[Row]
    floor: Row
    floor_choices: list[dict[str, Any]]
    floor_tried: list[dict[str, Any]]
    product_flops: int
    data: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.rows if row.name == OURS and row.seconds), None)

    @property
    def by_time(self) -> list[Row]:
        """The floor, then rows from fast to slow, failed ones last."""
        ranked = sorted(self.rows, key=lambda row: (row.median is None, row.median or 0.0))
        return [self.floor, *ranked]


def _ratio(top: float | None, bottom: float | None, form: str = "{:.2f}") -> str:
    return "" if not top or not bottom else form.format(top / bottom)


def _time(row: Row, section: Section) -> str:
    if row.failure:
        return f"failed ({row.failure})"
    if row.median is None:
        return ""
    return f"{row.median:.3f} [{min(row.seconds):.3f}–{max(row.seconds):.3f}]"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _ours(section: Section, row: Row, value: Callable[[Row], float | None]) -> str:
    """Ours divided by the row; nothing for our own rows and the floor."""
    if section.ours is None or row is section.floor or row.name.startswith(OURS):
        return ""
    return _ratio(value(section.ours), value(row))


COLUMNS: dict[str, Callable[[Row, Section], str]] = {
    "implementation": lambda row, section: row.name,
    "time, s: median [min–max]": _time,
    "× floor": lambda row, section: _ratio(row.median, section.floor.median),
    "GFLOP/s": lambda row, section: "" if not row.median else f"{4 * section.product_flops / row.median / 1e9:.0f}",
    "extra memory, GiB": lambda row, section: "" if row.extra_bytes is None else f"{row.extra_bytes / 2**30:.2f}",
    "ours ÷ it, time": lambda row, section: _ours(section, row, lambda r: r.median),
    "ours ÷ it, memory": lambda row, section: _ours(section, row, lambda r: r.extra_bytes),
    "loss error": lambda row, section: _error(row.loss_error),
    "dhidden error": lambda row, section: _error(row.dhidden_error),
    "dweight error": lambda row, section: _error(row.dweight_error),
}


def _cells(section: Section) -> list[list[str]]:
    return [[cell(row, section) for cell in COLUMNS.values()] for row in section.by_time]


def rich_table(section: Section) -> Table:
    table = Table(title=f"{section.dtype}: forward + backward", title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row, cells in zip(section.by_time, _cells(section), strict=True):
        table.add_row(*cells, style="bold green" if row.name.startswith(OURS) else "")
    return table


def markdown_table(section: Section) -> str:
    rule = ["---"] + ["---:"] * (len(COLUMNS) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(COLUMNS), rule, *_cells(section)])


def markdown(machine: Machine, shape: dict[str, int], rounds: int, sections: list[Section]) -> str:
    """The whole generated text: machine, problem, then one table for each dtype."""
    parts = [
        f"Measured on {machine.sentence}",
        f"Problem: V = {shape['vocab']}, H = {shape['width']}, {shape['sequences']} sequences of {shape['tokens']} "
        f"tokens, {shape['response_rows']} response rows; {rounds} interleaved rounds.",
    ]
    for section in sections:
        routes = "; ".join(
            f"{choice['product']}: {choice['route']}, {choice['chunk']} rows, {choice['gflops']:.0f} GFLOP/s"
            for choice in section.floor_choices
        )
        logp = section.data["token_logp_mean"]
        parts += [
            f"### {section.dtype}",
            markdown_table(section),
            f"Floor (`gemms`): {routes}. Mean log-prob of a target token {logp:.2f}, loss {section.data['loss']:.4f}.",
        ]
    return "\n\n".join(parts) + "\n"


def replace_between(path: Path, marker: str, text: str) -> None:
    """Put `text` between `<!-- marker:begin -->` and `<!-- marker:end -->` of a file.

    Raises:
        ValueError: the file does not have both markers, once each and in this order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{path}: expected {begin} followed by {end}, once each")
    before, after = content.split(begin)[0], content.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
