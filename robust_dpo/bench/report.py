"""results.md of a run: what it ran on, what was checked, the headline, then every case."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from robust_dpo.bench.record import Record, Role
from robust_dpo.bench.store import Store
from robust_dpo.bench.tables import COLUMNS, number, section

GROUPS = {
    "ceilings": "Ceilings",
    "head": "LM head, forward and backward",
    "chunks": "Chunk size",
    "products": "Products of the head",
    "rows": "row_logprob",
    "shapes": "Launch shapes of row_logprob",
    "logits": "Logits route",
    "epilogue": "group_epilogue",
    "calibration": "calibration_weights",
}


def machine_sentence(store: Store) -> str:
    """Device, driver and versions of a run."""
    machine = store.machine
    gpu = machine["accelerator"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = f"{machine['cpu']}, {machine['threads']} threads"
    if gpu is not None:
        device = (
            f"{gpu['name']} ({gpu['architecture']}, {gpu['memory_gib']:.0f} GiB), driver {gpu['driver']}, "
            f"{gpu['runtime']}; {machine['cpu']}"
        )
    return f"{device}; Python {machine['python']}, {libraries}; code {store.key['code']}."


@dataclass(frozen=True)
class Line:
    """One line of the headline, ready to print.

    Args:
        case: title.
        milliseconds: median of ours.
        floor: in times the floor.
        bound: peak memory in times the bound.
        peer: time of the fastest peer that computes the same, in times ours.
    """

    case: str
    milliseconds: str
    floor: str
    bound: str
    peer: str


def headline(records: dict[str, Record]) -> list[Line]:
    """Ours in the cases that have targets."""
    found = []
    for record in records.values():
        ours = next((row for row in record.rows if row.role is Role.OURS and row.median), None)
        if ours is None or ours.median is None or record.group not in ("head", "logits", "rows"):
            continue
        peers = [row for row in record.rows if row.role is Role.PEER and row.median and row.note is None]
        best = min(peers, key=lambda row: row.median or 0.0, default=None)
        versus = "" if best is None or best.median is None else f"{best.median / ours.median:.2f} ({best.name})"
        floor, bound = (COLUMNS[name](ours, record) for name in ("× floor", "× bound"))
        found.append(Line(record.title, number(1e3 * ours.median), floor, bound, versus))
    return found


def _failures(records: dict[str, Record]) -> list[str]:
    return [
        f"- **{record.title}**: {row.name}: {row.failure}"
        for record in records.values()
        for row in record.rows
        if row.failure and row.role is not Role.PEER
    ]


def results_markdown(store: Store) -> str:
    """The whole file."""
    records = store.records
    parts = ["# Benchmark results", f"Measured on {machine_sentence(store)}"]
    checks = [f"- {name}: **{each['status']}** ({each['detail']})" for name, each in store.preflight.items()]
    if checks:
        parts.append("Before anything was timed:\n\n" + "\n".join(checks))
    if wrong := _failures(records):
        parts.append("**Failures**\n\n" + "\n".join(wrong))
    if rows := headline(records):
        header = (
            "| case | ours, ms | × floor | peak memory, × bound | time of the fastest peer, × ours |\n"
            "| --- | ---: | ---: | ---: | ---: |\n"
        )
        lines = ("| " + " | ".join(astuple(row)) + " |" for row in rows)
        parts.append("## Headline\n\n" + header + "\n".join(lines))
    for group, title in GROUPS.items():
        members = [record for record in records.values() if record.group == group]
        if members:
            parts += [f"## {title}", *(section(record) for record in members)]
    others = [record for record in records.values() if record.group not in GROUPS]
    parts += [section(record, "##") for record in others]
    if store.skipped:
        left = (f"- {name}" + (f": --minutes {minutes}" if minutes else "") for name, minutes in store.skipped.items())
        parts.append("## Not finished, out of time\n\n" + "\n".join(left))
    return "\n\n".join(parts) + "\n"
