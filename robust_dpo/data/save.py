"""Canonical rows to files, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import datasets

from robust_dpo.data.domains import DOMAIN
from robust_dpo.data.load import PreferenceData
from robust_dpo.data.rows import COLUMNS
from robust_dpo.errors import DataError, argument_error, type_error

# JSON allows these as they are, but many readers of lines take them for line ends.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def save_preferences(data: PreferenceData | datasets.Dataset, path: str | Path) -> Path:
    """Write canonical rows to a file that `load_preferences` reads back as they are.

    The rows go to a temporary file in the same folder, which takes the name when it is complete: a run that is killed
    leaves the old file or the new one, never half of one. Equal rows give equal bytes (JSON lines).

    Args:
        data: what `load_preferences` returned, or a `datasets.Dataset` with canonical columns; others are not written,
            but for `domain`, which `domain_column="domain"` reads back.
        path: a name that ends in .jsonl, .jsonl.gz or .parquet; the folder is made if needed.

    Returns:
        The path.

    Raises:
        DataError: the file cannot be written.
        TypeError, ValueError: no such columns, no rows, or another kind of file.
    """
    dataset = data.dataset if isinstance(data, PreferenceData) else data
    if not isinstance(dataset, datasets.Dataset):
        raise type_error("data", "PreferenceData or a datasets.Dataset", data)
    columns = [column for column in (*COLUMNS, DOMAIN) if column in dataset.column_names]
    if not {"prompt", "responses"} <= set(columns):
        raise argument_error("data", "the canonical columns prompt and responses", dataset.column_names)
    if not len(dataset):
        raise argument_error("data", "at least one row", 0)
    path = Path(path)
    write = next((write for ending, write in _WRITERS.items() if path.name.endswith(ending)), None)
    if write is None:
        raise argument_error("path", f"a name that ends in {' or '.join(_WRITERS)}", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            write(dataset.select_columns(columns), file)
    except OSError as error:
        raise DataError(f"cannot be written: {error}", path=path) from error
    return path


def _write_lines(dataset: datasets.Dataset, file: BinaryIO) -> None:
    for row in dataset:
        present = {column: value for column, value in row.items() if value is not None}
        line = json.dumps(present, ensure_ascii=False, allow_nan=False)
        file.write(line.translate(_LINE_ENDS).encode() + b"\n")


def _write_packed_lines(dataset: datasets.Dataset, file: BinaryIO) -> None:
    # no name and no time in the header, so that equal rows give equal bytes
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        _write_lines(dataset, packed)  # type: ignore[arg-type]  # GzipFile writes bytes as a BinaryIO does


def _write_parquet(dataset: datasets.Dataset, file: BinaryIO) -> None:
    dataset.to_parquet(file)


_WRITERS: dict[str, Callable[[datasets.Dataset, BinaryIO], None]] = {
    ".jsonl": _write_lines,
    ".jsonl.gz": _write_packed_lines,
    ".parquet": _write_parquet,
}


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that becomes `path` if the block ends well, and is removed if not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
