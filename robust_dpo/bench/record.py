"""What is kept of a measurement; every field goes into results.json as it is."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Role(str, Enum):
    """Where a row of a table stands: what is reported on, what it is compared with, and the physical limit."""

    OURS = "ours"
    PEER = "peer"
    FLOOR = "floor"
    PART = "part"


@dataclass
class Row:
    """What was measured of one implementation; fields stay empty where it failed or was not asked for.

    Args:
        name: of the implementation, or of the part that was timed.
        role: what it is in the comparison.
        seconds: of every round.
        first_seconds: of the first call, with compilation.
        extra_bytes: peak above the memory in use before the call: results count, inputs do not.
        memory_method: how that was taken.
        errors: relative L2 error of each result against the exact one.
        flops: operations of one call, where they are not those of the record.
        bytes: bytes that one call must move, where they are not those of the record.
        parameters: what makes this row differ from the others, such as {"chunk": 4096}.
        version: of the package.
        note: anything that the reader must know, such as another loss.
        failure: why there are no times.
    """

    name: str
    role: Role = Role.PEER
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    extra_bytes: int | None = None
    memory_method: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    flops: int | None = None
    bytes: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    note: str | None = None
    failure: str | None = None

    def __post_init__(self) -> None:
        self.role = Role(self.role)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Record:
    """One case: its rows, and what they are measured against.

    Args:
        name: the case, unique.
        group: kind of case, such as "head".
        title: for people.
        rows: in the order they were measured; the floor is one of them.
        dtype: of the inputs.
        sizes: of the problem.
        flops: operations that nobody can avoid.
        bytes: bytes that nobody can avoid to move.
        input_bytes: of the problem's tensors.
        bound_bytes: inputs, results, one chunk and the fp32 gradient of the head: what the peak is compared with.
        check: what correctness was checked against.
        details: anything else for the file, such as everything that the floor tried.
        complete: False where time ran out before every row was measured; measured again next time.
        wall_seconds: that the case took in all.
    """

    name: str
    group: str
    title: str
    rows: list[Row]
    dtype: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    bytes: int | None = None
    input_bytes: int | None = None
    bound_bytes: int | None = None
    check: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    wall_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Record:
        return Record(**{**values, "rows": [Row(**row) for row in values["rows"]]})

    def floor_of(self, row: Row) -> Row | None:
        """The floor with the row's own parameters, else the one without."""
        floors = [other for other in self.rows if other.role is Role.FLOOR and other.seconds]
        own = [other for other in floors if other.parameters and other.parameters == row.parameters]
        return next(iter(own + [other for other in floors if not other.parameters]), None)

    def ours_of(self, row: Row) -> Row | None:
        """Our first row that was timed; None for our own rows, the floor and parts."""
        if row.role is not Role.PEER:
            return None
        return next((other for other in self.rows if other.role is Role.OURS and other.seconds), None)

    def rate(self, row: Row) -> float | None:
        """Unavoidable operations (or, without any, bytes) per second."""
        work = row.flops or self.flops or row.bytes or self.bytes
        return None if row.median is None or not work else work / row.median

    def counts_flops(self, row: Row) -> bool:
        return bool(row.flops or self.flops)
