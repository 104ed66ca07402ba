"""Times and memory of a row in terms of others of the same comparison."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from robust_dpo.bench.record import Record, Row
from robust_dpo.bench.train_step.contestants import OURS, PLAIN, PLAIN_CCE


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


def find(record: Record, name: str) -> Row | None:
    """The row of that name, if it was timed."""
    return next((row for row in record.rows if row.name == name and row.seconds), None)


def best_simple(record: Record) -> Row | None:
    """The faster of the two plain loops."""
    found = [row for row in (find(record, PLAIN), find(record, PLAIN_CCE)) if row is not None]
    return min(found, key=lambda row: statistics.median(row.seconds), default=None)


def ours(record: Record) -> Row | None:
    """Our trainer as it comes."""
    return find(record, OURS)


def times(slow: Row, fast: Row) -> Spread:
    """How many times as long a step of `slow` takes: both took the step of a round on the same groups."""
    return Spread.of([a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)])


def cpu_times(record: Record, slow: Row, fast: Row) -> Spread:
    """The same for the time of all threads."""
    slow_seconds, fast_seconds = (record.details["cpu_seconds"][row.name] for row in (slow, fast))
    return Spread.of([a / b for a, b in zip(slow_seconds, fast_seconds, strict=True)])


def rate(row: Row, amounts: list[float]) -> Spread:
    """Amount per second, from the amount in each round."""
    return Spread.of([amount / seconds for amount, seconds in zip(amounts, row.seconds, strict=True)])


def memory(row: Row, other: Row) -> float | None:
    """Peak memory of a row in times the other's."""
    return row.extra_bytes / other.extra_bytes if row.extra_bytes and other.extra_bytes else None
