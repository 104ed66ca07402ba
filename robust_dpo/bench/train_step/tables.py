"""Comparisons of whole steps, and the verdict, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robust_dpo.bench.record import Record, Row
from robust_dpo.bench.report import machine_sentence
from robust_dpo.bench.store import Store
from robust_dpo.bench.tables import COLUMNS, TERMINAL_COLUMNS, Cell, markdown_lines, markdown_table, number
from robust_dpo.bench.train_step.contestants import PLAIN
from robust_dpo.bench.train_step.ratios import Spread, cpu_times, find, memory, ours, rate, times
from robust_dpo.bench.train_step.setting import DTYPES, MODELS, REFERENCES
from robust_dpo.bench.train_step.targets import Verdict, verdicts

_VERDICT = ("comparison", "target", "wanted", "found", "met")


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}–{spread.high:.2f}]"


def _rate(amounts: Callable[[Record], list[float]]) -> Cell:
    def cell(row: Row, record: Record) -> str:
        return number(rate(row, amounts(record)).median) if row.seconds else ""

    return cell


def _groups(record: Record) -> list[float]:
    return [float(record.details["setting"]["groups"])] * len(record.details["tokens"])


def _tokens(record: Record) -> list[float]:
    return [float(count) for count in record.details["tokens"]]


def _times_ours(row: Row, record: Record) -> str:
    us = ours(record)
    return _spread(times(row, us)) if us is not None and row.seconds and row is not us else ""


def _cpu_times_ours(row: Row, record: Record) -> str:
    us = ours(record)
    return "" if us is None or not row.seconds or row is us else f"{cpu_times(record, row, us).median:.2f}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def _of_plain(row: Row, record: Record) -> str:
    plain = find(record, PLAIN)
    share = None if plain is None or row is plain else memory(row, plain)
    return "" if share is None else f"{share:.2f}"


STEP_COLUMNS: dict[str, Cell] = {
    "implementation": COLUMNS["implementation"],
    "step, ms: median [min–max]": COLUMNS["time, ms: median [min–max]"],
    "groups/s": _rate(_groups),
    "tokens/s": _rate(_tokens),
    "time, × ours: median [min–max]": _times_ours,
    "CPU time, × ours": _cpu_times_ours,
    "peak memory, GiB": lambda row, record: _gib(row.extra_bytes),
    "of it for a step": lambda row, record: _gib(record.details["step_bytes"].get(row.name)),
    "peak, × plain": _of_plain,
    "loss error": COLUMNS["loss error"],
    "weights error": lambda row, record: f"{row.errors['weights']:.1e}" if "weights" in row.errors else "",
    "update error": lambda row, record: f"{row.errors['update']:.1e}" if "update" in row.errors else "",
}
STEP_TERMINAL_COLUMNS: dict[str, Cell] = {
    **{name: TERMINAL_COLUMNS[name] for name in ("implementation", "ms", "spread")},
    "groups/s": STEP_COLUMNS["groups/s"],
    "tok/s": STEP_COLUMNS["tokens/s"],
    "time × ours": _times_ours,
    "CPU": _cpu_times_ours,
    "GiB": STEP_COLUMNS["peak memory, GiB"],
    "step": STEP_COLUMNS["of it for a step"],
    "× plain": _of_plain,
    "loss": STEP_COLUMNS["loss error"],
    "update": STEP_COLUMNS["update error"],
}


def _verdict_cells(verdict: Verdict) -> list[str]:
    sign = "≥" if verdict.at_least else "≤"
    wanted, found = f"{sign} {verdict.wanted:.3g}", f"{verdict.found:.3g}"
    return [verdict.comparison, verdict.target, wanted, found, "yes" if verdict.met else "no"]


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """For a terminal."""
    table = Table(*_VERDICT, box=SIMPLE_HEAD, title="Targets", title_justify="left", padding=0)
    for verdict in verdicts:
        table.add_row(*_verdict_cells(verdict), style="green" if verdict.met else "red")
    return table


def data_sentence(record: Record) -> str:
    """What was trained on."""
    details = record.details
    return (
        f"Data: {details['source']}; {details['prompt_share']:.0%} of the tokens are prompt, "
        f"{details['padding_share']:.0%} of a padded batch is padding."
    )


def results_markdown(store: Store) -> str:
    """Everything: machine, verdict, then one table for each comparison."""
    records = sorted(store.records.values(), key=_order)
    load = store.machine["load_before"]
    parts = [f"Measured on {machine_sentence(store)} Load of the machine before the last comparison: {load:.1f}."]
    if found := verdicts(records):
        parts.append(markdown_lines(list(_VERDICT), [_verdict_cells(each) for each in found]))
    for record in records:
        setting = record.details["setting"]
        rounds = (
            f"{setting['rounds']} rounds of {setting['groups']} groups, at most {setting['max_length']} tokens each."
        )
        parts += [f"### {record.title}", markdown_table(record, STEP_COLUMNS), f"{rounds} {data_sentence(record)}"]
    return "\n\n".join(parts) + "\n"


def _order(record: Record) -> tuple[int, ...]:
    """Small models first, pairs before lists, live before precomputed, fp32 before bf16."""
    setting = record.details["setting"]
    return (
        list(MODELS).index(setting["model"]["name"]),
        setting["responses"],
        REFERENCES.index(setting["reference"]),
        DTYPES.index(setting["dtype"]),
    )
