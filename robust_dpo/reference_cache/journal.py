"""An append-only file of float64 values that a killed process leaves readable up to its last whole record."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

_MAGIC = b"robust_dpo journal 1\n"
_RECORD = struct.Struct("<II")  # values, and the CRC-32 of their bytes


class Journal:
    """Values in the order in which they were computed.

    Opening one reads what is there; a torn or damaged tail is cut off, as nothing after it can be trusted. One process
    writes.

    Args:
        path: of the file; made where it is not there.
        digest: of what the values belong to; a file that belongs to something else starts anew.

    Attributes:
        values: [n] float64, what was there on opening.
    """

    def __init__(self, path: Path, digest: str) -> None:
        header = _MAGIC + bytes.fromhex(digest)
        content = path.read_bytes() if path.exists() else b""
        if not content.startswith(header):
            content = b""
        records, end = _whole_records(content, len(header))
        self.values = np.concatenate([np.empty(0), *records])
        self._file = path.open("r+b" if content else "w+b")
        if content:
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._file.write(header)
            self._file.flush()

    def append(self, values: npt.NDArray[np.float64]) -> None:
        """Add values; once this returns, a killed process keeps them."""
        payload = values.astype("<f8").tobytes()
        self._file.write(_RECORD.pack(len(values), zlib.crc32(payload)) + payload)
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing can be appended any more."""
        self._file.close()


@contextmanager
def exclusive_journal(path: Path, digest: str) -> Iterator[Journal | None]:
    """The journal at `path`, or None where another living process writes it; removed once the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    with lock:
        journal = Journal(path, digest)
        try:
            yield journal
        finally:
            journal.close()
        path.unlink()
        Path(lock.lock_file).unlink(missing_ok=True)


def _whole_records(content: bytes, position: int) -> tuple[list[npt.NDArray[np.float64]], int]:
    """The records from `position` to the first that is torn or damaged, and where that begins."""
    records = []
    while position + _RECORD.size <= len(content):
        count, checksum = _RECORD.unpack_from(content, position)
        start = position + _RECORD.size
        payload = content[start : start + 8 * count]
        if len(payload) < 8 * count or zlib.crc32(payload) != checksum:
            break
        records.append(np.frombuffer(payload, "<f8"))
        position = start + 8 * count
    return records, position
