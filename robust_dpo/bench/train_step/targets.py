"""What the whole step was built to reach on a CPU, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from robust_dpo.bench.record import Record, Row
from robust_dpo.bench.train_step.contestants import PLAIN
from robust_dpo.bench.train_step.ratios import best_simple, find, memory, ours, times


@dataclass(frozen=True)
class Verdict:
    """One target in one comparison.

    Args:
        comparison: title.
        target: in words.
        wanted, found: figures.
        at_least: whether more is better.
    """

    comparison: str
    target: str
    wanted: float
    found: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


def verdicts(records: Iterable[Record]) -> list[Verdict]:
    """Of every target whose contestants were measured."""
    return [verdict for record in records for verdict in _of(record)]


def _of(record: Record) -> list[Verdict]:
    us, plain = ours(record), find(record, PLAIN)
    if us is None:
        return []
    setting = record.details["setting"]
    pairs, live, small = setting["responses"] == 2, setting["reference"] == "live", setting["model"]["name"] == "small"
    found: list[Verdict] = []

    def faster_than(peer: Row | None, wanted: float, words: str) -> None:
        if peer is not None:
            found.append(Verdict(record.title, f"times as fast as {words}", wanted, times(peer, us).median))

    if record.dtype == "fp32":
        if pairs:
            faster_than(best_simple(record), 1.6 if live else 1.4, "the best simple baseline")
        else:
            faster_than(plain, 2.2, "the plain loop")
        if pairs and live and small:
            faster_than(find(record, "trl"), 6.0, "TRL")
        faster_than(find(record, "dora_authors"), 5.0, "the DoRA authors' way")
        if "loss" in us.errors:
            found.append(Verdict(record.title, "loss error", 1e-5, us.errors["loss"], at_least=False))
    if plain is not None and (share := memory(us, plain)) is not None:
        found.append(Verdict(record.title, "peak memory, times the plain loop's", 0.6, share, at_least=False))
    return found
