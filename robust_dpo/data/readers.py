"""Files, folders, hub names and objects in memory as streams of records that know where they came from."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow
import pyarrow.parquet

from robust_dpo.data.rows import BadRow, Reason
from robust_dpo.errors import DataError, argument_error, type_error

_GZIP_MAGIC = b"\x1f\x8b"
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Record:
    """One row as read: `line` counts from 1 (the row's number where the file has no lines); `value` may be a BadRow."""

    line: int
    value: Any


@dataclass(frozen=True)
class Table:
    """A named stream of records: a file, or one split of a data set.

    Args:
        label: how messages name it (the path of a file).
        prefix: how the ids of its rows begin.
        read: opens it and yields its records; raises DataError if it cannot be read to its end.
    """

    label: str
    prefix: str
    read: Callable[[], Iterator[Record]]


def open_source(source: object, split: str | None, name: str | None) -> list[Table]:
    """The tables behind a source; see `load_preferences` for what a source may be.

    Raises:
        TypeError, ValueError: arguments that do not fit the source.
        DataError: there is nothing to read there.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.exists():
            if name is not None:
                raise argument_error("name", "None: only Hub data sets have configurations", repr(name))
            return _open_path(path, split)
        return [_open_hub(str(source), split, name)]
    if isinstance(source, Mapping):
        return [_one_split(source, split, "in-memory data")]
    if isinstance(source, Iterable):
        if split is not None:
            raise argument_error("split", "None: data in memory has no splits", repr(split))
        return [Table("in-memory data", "row", lambda: _read_rows(source))]
    raise type_error("source", "a path, a Hub name, a datasets.Dataset or a list of rows", source)


def _open_path(path: Path, split: str | None) -> list[Table]:
    if path.is_dir():
        if any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
            return [_open_saved(path, split)]
        return _open_folder(path, split)
    if split is not None:
        raise argument_error("split", f"None: the file {path} has no splits", repr(split))
    return [_file_table(path, path.name)]


def _open_folder(path: Path, split: str | None) -> list[Table]:
    """Every data file below a folder, by name; with a split, those whose name or folder begins with it."""
    relative = {file: file.relative_to(path) for file in sorted(path.rglob("*"))}
    hidden = {file for file, below in relative.items() if any(part.startswith(".") for part in below.parts)}
    files = [file for file in relative if file.is_file() and _suffix(file) in _READERS and file not in hidden]
    if not files:
        raise DataError(f"no data file in this folder (looked for {', '.join(_READERS)})", path=path)
    if split is not None:
        begins = re.compile(rf"{re.escape(split)}(?![A-Za-z0-9])")
        files = [file for file in files if any(begins.match(part) for part in relative[file].parts)]
        if not files:
            raise DataError(f"no file or folder in it is named after the split {split!r}", path=path)
    return [_file_table(file, relative[file].as_posix()) for file in files]


def _file_table(path: Path, prefix: str) -> Table:
    return Table(str(path), prefix, lambda: _reader(path)(path))


def _open_saved(path: Path, split: str | None) -> Table:
    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"not a readable data set of save_to_disk: {error}", path=path) from error
    if isinstance(saved, Mapping):
        return _one_split(saved, split, str(path))
    if split is not None:
        raise argument_error("split", f"None: the data set in {path} has no splits", repr(split))
    return Table(str(path), path.name, lambda: _read_rows(saved))


def _open_hub(source: str, split: str | None, name: str | None) -> Table:
    if not _HUB_NAME.fullmatch(source) or _suffix(Path(source)) in _READERS:
        raise DataError("no such file or folder", path=source)
    try:
        found = datasets.load_dataset(source, name, split=split)
    # OSError: not found, no connection; ValueError: no such split or configuration; DatasetsError: damaged files
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"neither a path here nor a data set that the Hub gives: {error}", path=source) from error
    if isinstance(found, Mapping):
        return _one_split(found, None, source)
    return Table(f"{source}[{split}]", f"{source}[{split}]", lambda: _read_rows(found))


def _one_split(splits: Mapping[str, Any], split: str | None, label: str) -> Table:
    """The named split; unnamed, the only one or `train`."""
    names = list(splits)
    chosen = split or (names[0] if len(names) == 1 else "train")
    if chosen not in splits:
        raise DataError(f"there is no split {chosen!r}; choose one of {', '.join(map(repr, names))}", path=label)
    return Table(f"{label}[{chosen}]", chosen, lambda: _read_rows(splits[chosen]))


def _read_rows(rows: Iterable[Any]) -> Iterator[Record]:
    plain = rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows
    for number, row in enumerate(plain, 1):
        yield Record(number, row)


def _suffix(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def _reader(path: Path) -> Callable[[Path], Iterator[Record]]:
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise DataError(f"unknown file type {suffix!r}; known: {', '.join(_READERS)} (JSON also as .gz)", path=path)
    return _READERS[suffix]


def _open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where they begin as gzip does, whatever the name says."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def _read_json(path: Path) -> Iterator[Record]:
    """JSON lines, or one JSON array, told apart by the first character."""
    line, begun = 0, False
    try:
        with _open_bytes(path) as file:
            for line, raw in enumerate(file, 1):
                text = (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).strip()
                if not begun and text.startswith(b"["):
                    yield from _read_array(path, raw[raw.index(b"[") :] + file.read(), line)
                    return
                if text:
                    begun = True
                    yield Record(line, _parse(text))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"damaged or truncated gzip after line {line}: {error}", path=path) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error}", path=path) from error


def _parse(raw: bytes) -> Any:
    """The value of a line, or the BadRow that says why it has none."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(Reason.NOT_UTF8, f"byte 0x{raw[error.start]:02x} at column {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return BadRow(Reason.INVALID_JSON, _explain(error))


def _explain(error: Exception) -> str:
    """What json found wrong, without the line number that it counts from the start of the text that it was given."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_array(path: Path, raw: bytes, line: int) -> Iterator[Record]:
    """The elements of a JSON array that begins on `line`, each with the line that it begins on.

    A syntax error stops the whole file: what follows it cannot be told apart, so it cannot be counted either.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        raise DataError(f"{Reason.NOT_UTF8.value}: byte 0x{raw[error.start]:02x}", path=path, line=at) from error
    decoder, counted = json.JSONDecoder(), 0
    position = _skip_blank(text, 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{Reason.INVALID_JSON.value}: {_explain(error)}", path=path, line=line) from error
        yield Record(line, value)
        position = _skip_blank(text, position)
        closed = text[position : position + 1] == "]"
        if not closed and text[position : position + 1] != ",":
            raise DataError(f"{Reason.INVALID_JSON.value}: no ',' or ']' after this element", path=path, line=line)
        position = _skip_blank(text, position + 1)


def _skip_blank(text: str, position: int) -> int:
    found = _NOT_BLANK.search(text, position)
    return found.start() if found else len(text)


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _read_rows(rows)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"not a readable Parquet file: {error}", path=path) from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "jsonl": _read_json,
    "ndjson": _read_json,
    "json": _read_json,
    "parquet": _read_parquet,
}
