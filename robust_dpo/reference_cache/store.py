"""Finished log-probs of a data set: one memory-mapped file each, written as a whole and checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from robust_dpo.reference_cache.key import CacheKey

COLUMN = "ref_logps"
_SCHEMA = pa.schema([pa.field(COLUMN, pa.list_(pa.float64()))])
_KEY, _CHECKSUM = b"robust_dpo.key", b"robust_dpo.sha256"


class BrokenEntry(Exception):
    """A file of the cache cannot be used; the message says why."""


@dataclass(frozen=True)
class ReferenceCache:
    """A directory of reference log-probs.

    A file is named by the hash of its key and holds the key and a checksum of its values. It appears under its name by
    one rename: it is there as a whole or not at all, and processes that make the same one at the same time do no harm.
    """

    directory: Path

    def path(self, key: CacheKey) -> Path:
        """Where the log-probs of a key are, or would be."""
        return self.directory / f"ref_logps-{key.digest[:24]}.arrow"

    def journal_path(self, key: CacheKey) -> Path:
        """Where those are that were computed so far."""
        return self.path(key).with_suffix(".partial")

    def load(self, key: CacheKey, sizes: npt.NDArray[np.int64]) -> Dataset | None:
        """The column of a key, memory-mapped; None where there is none.

        Args:
            key: what the log-probs depend on.
            sizes: [G] responses of each group.

        Raises:
            BrokenEntry: the file is torn, damaged, or belongs to something else.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            metadata = _metadata(path)
            dataset = Dataset.from_file(str(path))
            lists = dataset.data[COLUMN].combine_chunks()
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise BrokenEntry(f"it cannot be read ({error})") from error
        if metadata.get(_KEY) != key.to_json().encode():
            raise BrokenEntry("it was made for another key")
        if not np.array_equal(pc.list_value_length(lists).to_numpy(), sizes):
            raise BrokenEntry(f"its {len(lists)} rows do not have the responses of the {len(sizes)} rows of data")
        if metadata.get(_CHECKSUM) != _checksum(lists.flatten().to_numpy()):
            raise BrokenEntry("its values do not have its checksum")
        return dataset

    def save(self, key: CacheKey, values: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]) -> Path:
        """Write the log-probs of a key; a file that is there already is replaced.

        Args:
            key: what they depend on.
            values: [S] float64, responses of a group adjacent.
            sizes: [G] responses of each group.
        """
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        schema = _SCHEMA.with_metadata({_KEY: key.to_json().encode(), _CHECKSUM: _checksum(values)})
        table = pa.table([pa.ListArray.from_arrays(offsets, pa.array(values))], schema=schema)
        path = self.path(key)
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                with pa.ipc.new_stream(file, schema) as writer:
                    writer.write_table(table)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def why_missing(self, key: CacheKey) -> str:
        """What separates a key from the entry that shares most of its fields; empty where there is no entry."""
        differences = sorted((key.differences(stored) for stored in self._stored_keys()), key=len)
        return f"; the closest entry has another {', '.join(differences[0])}" if differences else ""

    def _stored_keys(self) -> list[dict[str, Any]]:
        keys = []
        for path in sorted(self.directory.glob("ref_logps-*.arrow")):
            try:
                key = _metadata(path).get(_KEY)
            except (pa.ArrowInvalid, OSError):
                continue  # a broken file has nothing to say about what is missing
            keys += [] if key is None else [json.loads(key)]
        return keys


def _metadata(path: Path) -> dict[bytes, bytes]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.schema.metadata or {}


def _checksum(values: npt.NDArray[np.float64]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values, "<f8").data).hexdigest().encode()
