"""Preference data from anywhere to checked canonical rows, with an account of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Value

from robust_dpo.data.domains import DOMAIN, domain_of
from robust_dpo.data.formats import FORMATS, Format, detect_format
from robust_dpo.data.readers import Record, Table, open_source
from robust_dpo.data.rows import COLUMNS, DROP_HINT, BadRow, Reason, Row, features, kind_of
from robust_dpo.errors import DataError, argument_error, type_error

_PROBE = 64
"""Rows of a table that vote on its format."""
_EXAMPLES = 3
"""Bad rows per reason that the report shows."""
_CHUNK = 4096
"""Rows that are Python objects at one time; the rest is Arrow already."""


@dataclass(frozen=True)
class LoadReport:
    """What the loader read, what it left out and why.

    Args:
        source: what was loaded.
        rows_read: rows met, good or bad (blank lines do not count).
        rows_kept: rows of the data set.
        dropped: rows left out, by reason.
        examples: up to three messages "file:line: reason" for every reason.
        formats: the format of each file or split.
        ignored_columns: columns that the format has no use for.
        renamed_ids: rows whose id another row had before; theirs end in "#2", "#3", ….
    """

    source: str
    rows_read: int
    rows_kept: int
    dropped: Mapping[str, int]
    examples: tuple[str, ...]
    formats: Mapping[str, str]
    ignored_columns: tuple[str, ...]
    renamed_ids: int

    def __str__(self) -> str:
        kinds = ", ".join(sorted(set(self.formats.values())))
        lines = [f"{self.source}: kept {self.rows_kept} of {self.rows_read} rows ({kinds})"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.items()]
        lines += [f"    {example}" for example in self.examples]
        if self.ignored_columns:
            lines.append(f"  ignored columns: {', '.join(self.ignored_columns)}")
        if self.renamed_ids:
            lines.append(f"  repeated ids: {self.renamed_ids}, made unique by a suffix")
        return "\n".join(lines)


@dataclass(frozen=True)
class PreferenceData:
    """Checked preference data.

    Args:
        dataset: columns id, prompt (text or messages), responses, scores, probs, sources; the last three may be null.
            With a `domain_column` also domain.
        report: how it was read.
    """

    dataset: datasets.Dataset
    report: LoadReport

    def __len__(self) -> int:
        return len(self.dataset)


def load_preferences(
    source: object,
    *,
    split: str | None = None,
    on_bad_row: str = "error",
    limit: int | None = None,
    name: str | None = None,
    domain_column: str | None = None,
) -> PreferenceData:
    """Read preference data of any supported format into canonical rows.

    Args:
        source: a file (.jsonl, .ndjson, .json: lines or an array, plain or .gz; .parquet), a folder of such files, a
            data set saved with `save_to_disk`, the name of a data set on the Hub, a `datasets.Dataset` or
            `DatasetDict`, or an iterable of dicts. The format is found per file; docs/data.md shows them all.
        split: the split to read, where the source has splits; None is the only one, or `train`.
        on_bad_row: "error" stops at the first row that cannot be used; "drop" leaves such rows out and counts them.
        limit: stop when this many rows are kept.
        name: the configuration of a Hub data set.
        domain_column: the column that names the domain of each row, a part of the data that an aggregation over domains
            weighs. Text or an integer is the name; of a list of texts, the different ones joined by "+". `sources` or
            `source` is where the responses came from, however the rows spell it. A row without a value cannot be used.

    Returns:
        The rows in the order of the source, and the report.

    Raises:
        DataError: nothing to read there, a damaged file, an unknown format, a file without one usable row (under
            either setting of `on_bad_row`); or a row that cannot be used, as "file:line: reason".
        TypeError, ValueError: an argument that cannot be used.
    """
    if on_bad_row not in ("error", "drop"):
        raise argument_error("on_bad_row", "'error' or 'drop'", repr(on_bad_row))
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise type_error("limit", "an integer or None", limit)
    if limit is not None and limit < 1:
        raise argument_error("limit", "at least 1", limit)
    if domain_column is not None and not isinstance(domain_column, str):
        raise type_error("domain_column", "the name of a column, or None", domain_column)
    tables = open_source(source, split, name)
    loading = _Loading(drop=on_bad_row == "drop", limit=limit, domain_column=domain_column)
    rows = chain.from_iterable(loading.rows_of(table) for table in tables)
    parts = []
    while chunk := list(islice(rows, _CHUNK)):
        parts.append(datasets.Dataset.from_list(chunk, features=loading.features))
    label = str(source) if isinstance(source, (str, Path)) else tables[0].label
    return PreferenceData(datasets.concatenate_datasets(parts), loading.report(label))


@dataclass
class _Loading:
    """The running account of one call of `load_preferences`."""

    drop: bool
    limit: int | None
    domain_column: str | None
    conversational: bool | None = None
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    renamed: int = 0

    @property
    def features(self) -> Features:
        """Types of the columns that `rows_of` gives."""
        domain = {} if self.domain_column is None else {DOMAIN: Value("string")}
        return Features({**features(bool(self.conversational)), **domain})

    def rows_of(self, table: Table) -> Iterator[dict[str, Any]]:
        """The usable rows of one table in canonical columns."""
        if self.kept == self.limit:
            return
        records = table.read()
        head = list(islice(records, _PROBE))
        if not head:
            raise DataError("empty: not one row", path=table.label)
        fmt = _format_of(table, head)
        self.formats[table.label] = fmt.name
        before = self.read, self.kept
        for record in chain(head, records):
            self.read += 1
            try:
                row = self._convert(record.value, fmt)
                domain = self._domain(record.value, row)
            except BadRow as bad:
                self._refuse(bad, table, record.line)
                continue
            self.kept += 1
            identifier = self._unique(row.id or f"{table.prefix}:{record.line}")
            yield {column: identifier if column == "id" else getattr(row, column) for column in COLUMNS} | domain
            if self.kept == self.limit:
                return
        if self.kept == before[1]:
            examples = "; ".join(self.examples[-_EXAMPLES:])
            raise DataError(f"not one of its {self.read - before[0]} rows can be used: {examples}", path=table.label)

    def _convert(self, value: Any, fmt: Format) -> Row:
        if not isinstance(value, Mapping):
            raise _not_a_row(value)
        row = fmt.convert(value)
        self.ignored.update(column for column in value if column not in {*fmt.columns, self.domain_column})
        conversational = not isinstance(row.prompt, str)
        if self.conversational not in (None, conversational):
            kinds = ("text", "messages")
            detail = f"this prompt is {kinds[conversational]}, those before are {kinds[not conversational]}"
            raise BadRow(Reason.MIXED_PROMPTS, detail)
        self.conversational = conversational
        return row

    def _domain(self, value: Mapping[str, Any], row: Row) -> dict[str, str]:
        """The column of the row's domain, where one is wanted."""
        return {} if self.domain_column is None else {DOMAIN: domain_of(value, self.domain_column, row.sources)}

    def _refuse(self, bad: BadRow, table: Table, line: int) -> None:
        """Count a bad row, or stop at it."""
        if not self.drop:
            raise DataError(f"{bad} ({DROP_HINT})", path=table.label, line=line)
        self.dropped[bad.reason.value] += 1
        if self.dropped[bad.reason.value] <= _EXAMPLES:
            self.examples.append(f"{table.label}:{line}: {bad}")

    def _unique(self, identifier: str) -> str:
        """The id itself, or with a suffix where it was there before: ids name groups in logs and caches."""
        unique, number = identifier, 1
        while unique in self.ids:
            number += 1
            unique = f"{identifier}#{number}"
        self.renamed += number > 1
        self.ids.add(unique)
        return unique

    def report(self, source: str) -> LoadReport:
        dropped = dict(self.dropped.most_common())
        ignored = tuple(sorted(self.ignored))
        return LoadReport(
            source, self.read, self.kept, dropped, tuple(self.examples), self.formats, ignored, self.renamed
        )


def _not_a_row(value: Any) -> BadRow:
    """Why a value that is not an object cannot be a row."""
    if isinstance(value, BadRow):
        return value
    return BadRow(Reason.WRONG_TYPE, f"a row must be a JSON object, got {kind_of(value)}")


def _format_of(table: Table, head: list[Record]) -> Format:
    """The format that the first rows of a table have; DataError if they have none."""
    rows = [record.value for record in head if isinstance(record.value, Mapping)]
    if not rows:
        reason = f"{_not_a_row(head[0].value)}; none of the first {len(head)} rows is a JSON object"
        raise DataError(reason, path=table.label, line=head[0].line)
    fmt = detect_format(rows)
    if fmt is None:
        columns = ", ".join(sorted({str(column) for row in rows for column in row})) or "none"
        known = "; ".join(f"{known.name} ({known.signature})" for known in FORMATS.values())
        raise DataError(f"unknown format: the columns are {columns}. Known: {known}", path=table.label)
    return fmt
