"""Records to tables: one list of columns feeds the terminal, Markdown and the generated part of the docs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from robust_dpo.bench.machine import Machine
from robust_dpo.bench.record import Record, Role, Row

Cell = Callable[[Row, Record], str]


def _ratio(top: float | None, bottom: float | None) -> str:
    return "" if not top or not bottom else f"{top / bottom:.2f}"


def number(value: float) -> str:
    """Four digits, without an exponent where there are more of them."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _name(row: Row, record: Record) -> str:
    return row.name if row.note is None else f"{row.name} ({row.note})"


def _time(row: Row, record: Record) -> str:
    if row.failure:
        return f"failed: {row.failure}"
    if row.median is None:
        return ""
    low, middle, high = (number(1e3 * seconds) for seconds in (min(row.seconds), row.median, max(row.seconds)))
    return f"{middle} [{low}–{high}]"


def _floor_ratio(row: Row, record: Record) -> str:
    floor = record.floor_of(row)
    return "" if floor is None else _ratio(row.median, floor.median)


def _rate(row: Row, record: Record) -> str:
    rate = record.rate(row)
    if rate is None:
        return ""
    if not record.counts_flops(row):
        return f"{number(rate / 1e9)} GB/s"
    return f"{number(rate / 1e12)} TFLOP/s" if rate >= 1e12 else f"{number(rate / 1e9)} GFLOP/s"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.3g}"


def _peak(row: Row, record: Record) -> str:
    if row.extra_bytes is None or record.input_bytes is None:
        return ""
    return _gib(row.extra_bytes + record.input_bytes)


def _bound_ratio(row: Row, record: Record) -> str:
    if row.role is not Role.OURS or row.extra_bytes is None or record.input_bytes is None:
        return ""
    return _ratio(row.extra_bytes + record.input_bytes, record.bound_bytes)


def _versus_ours(value: Callable[[Row], float | None]) -> Cell:
    def cell(row: Row, record: Record) -> str:
        ours = record.ours_of(row)
        return "" if ours is None else _ratio(value(row), value(ours))

    return cell


def _error(name: str) -> Cell:
    def cell(row: Row, record: Record) -> str:
        return f"{row.errors[name]:.1e}" if name in row.errors else ""

    return cell


COLUMNS: dict[str, Cell] = {
    "implementation": _name,
    "time, ms: median [min–max]": _time,
    "× floor": _floor_ratio,
    "rate": _rate,
    "extra memory, GiB": lambda row, record: _gib(row.extra_bytes),
    "peak, GiB": _peak,
    "× bound": _bound_ratio,
    "time, × ours": _versus_ours(lambda row: row.median),
    "memory, × ours": _versus_ours(lambda row: row.extra_bytes),
    "loss error": _error("loss"),
    "logp error": _error("logp"),
    "dhidden error": _error("dhidden"),
    "dweight error": _error("dweight"),
    "gradient error": _error("gradient"),
    "h error": _error("h"),
}
# A terminal is narrow: the spread is what lies between the fastest and the slowest round, in parts of the median, and
# reasons of failures stand below the table.
TERMINAL_COLUMNS: dict[str, Cell] = {
    "implementation": lambda row, record: row.name,
    "ms": lambda row, record: "failed" if row.failure else "" if row.median is None else number(1e3 * row.median),
    "spread": lambda row, record: f"{(max(row.seconds) - min(row.seconds)) / row.median:.0%}" if row.median else "",
    "× floor": _floor_ratio,
    "rate": _rate,
    "+ GiB": lambda row, record: "" if row.extra_bytes is None else f"{row.extra_bytes / 2**30:.3f}",
    "× ours": COLUMNS["time, × ours"],
    "error": lambda row, record: f"{max(row.errors.values()):.0e}" if row.errors else "",
}
UNFINISHED = "Time ran out before everything was measured; the next run goes on here."
# The first two columns stand in every table, the others where they say something.
_ALWAYS = 2


def ordered(record: Record) -> list[Row]:
    """The floor, then rows from fast to slow, failed ones last; parts, and rows of a sweep, stay in their order."""
    if all(row.role is Role.PART or row.parameters for row in record.rows):
        return record.rows
    return sorted(record.rows, key=lambda row: (row.role is not Role.FLOOR, row.median is None, row.median or 0.0))


def _grid(record: Record, choice: dict[str, Cell]) -> list[list[str]]:
    """Header and cells, without the columns that are empty in every row."""
    rows = ordered(record)
    columns = {name: [cell(row, record) for row in rows] for name, cell in choice.items()}
    kept = {name: cells for i, (name, cells) in enumerate(columns.items()) if i < _ALWAYS or any(cells)}
    return [list(kept), *(list(cells) for cells in zip(*kept.values(), strict=True))]


def rich_table(record: Record, columns: dict[str, Cell] = TERMINAL_COLUMNS) -> Table:
    """The record for a terminal."""
    header, *body = _grid(record, columns)
    table = Table(title=Text(record.title, style="bold"), title_justify="left", box=SIMPLE_HEAD, padding=0)
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row, cells in zip(ordered(record), body, strict=True):
        table.add_row(*cells, style="bold green" if row.role is Role.OURS else "")
    below = [f"{row.name}: {remark}" for row in record.rows if (remark := row.failure or row.note)]
    below += remarks(record)
    table.caption, table.caption_justify = Text("\n".join(below)) if below else None, "left"
    return table


def markdown_table(record: Record, columns: dict[str, Cell] = COLUMNS) -> str:
    """The record for Markdown."""
    header, *body = _grid(record, columns)
    return markdown_lines(header, body)


def markdown_lines(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, all others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in [header, rule, *body]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in safe)


def floor_sentence(record: Record) -> str | None:
    """The routes of the floor and what the data look like; None where the record has no floor of products."""
    choices = record.details.get("floor_choices")
    if not choices:
        return None
    found = "; ".join(
        f"{choice['product']}: {choice['route']}, {choice['chunk']} rows, {choice['gflops']:.0f} GFLOP/s"
        for choice in choices
    )
    data = record.details.get("data", {})
    logp = f" Mean log-prob of a target token {data['token_logp_mean']:.2f}, loss {data['loss']:.4f}." if data else ""
    return f"Floor (`gemms`): {found}.{logp}"


def remarks(record: Record) -> list[str]:
    """What the reader of any table of a record must know: who is not in it, and whether other work disturbed it."""
    absent = [f"Not in it: {name} ({why})." for name, why in record.details.get("absent", {}).items()]
    busy = record.details.get("busy")
    return absent if busy is None else [*absent, f"{busy[0].upper()}{busy[1:]}."]


def section(record: Record, level: str = "###") -> str:
    """Heading, table, and the lines below it."""
    parts = [f"{level} {record.title}", markdown_table(record)]
    below = [floor_sentence(record), f"Checked against {record.check}." if record.check else None]
    below += [*remarks(record), None if record.complete else UNFINISHED]
    return "\n\n".join([*parts, *(line for line in below if line)])


def head_markdown(machine: Machine, sizes: dict[str, int], rounds: int, records: list[Record]) -> str:
    """The whole generated text of the CPU comparison: machine, problem, then one table for each dtype."""
    parts = [
        f"Measured on {machine.sentence}",
        f"Problem: V = {sizes['vocab']}, H = {sizes['width']}, {sizes['sequences']} sequences of {sizes['tokens']} "
        f"tokens, {sizes['response_rows']} response rows; {rounds} interleaved rounds.",
        *(section(record) for record in records),
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
