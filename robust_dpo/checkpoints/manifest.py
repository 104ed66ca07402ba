"""The list of a checkpoint's files with their sizes and hashes, written last: what it names is on the disk."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE_NAME = "robust_dpo_manifest.json"
_FORMAT = 1
# Of the files that this package adds to those of transformers.
_PREFIX = "robust_dpo_"
# The last file that transformers writes into a checkpoint: without it even one that has no manifest is not whole.
_LAST_OF_TRANSFORMERS = "trainer_state.json"
_BLOCK_BYTES = 1 << 20
_MOST_THREADS = 8


class BrokenCheckpoint(Exception):
    """A checkpoint cannot be used; the message says why."""


def write_manifest(folder: Path) -> None:
    """Bring all files of a checkpoint to the disk, then list them in its manifest, and bring that there too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_NAME)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        files = dict(pool.map(lambda path: (path.relative_to(folder).as_posix(), _stored(path)), paths))
    for directory in {path.parent for path in paths}:
        sync_directory(directory)
    with (folder / FILE_NAME).open("w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(folder)


def check(folder: Path) -> bool:
    """Whether a checkpoint could be checked: False where it has no manifest, as it was not written by this package.

    Raises:
        BrokenCheckpoint: files are missing or are not what was written.
    """
    try:
        files = _listed(folder / FILE_NAME)
    except FileNotFoundError:
        if not (folder / _LAST_OF_TRANSFORMERS).is_file():
            raise BrokenCheckpoint(f"it has neither {FILE_NAME} nor {_LAST_OF_TRANSFORMERS}") from None
        if any(folder.glob(f"{_PREFIX}*")):
            raise BrokenCheckpoint(f"its {FILE_NAME} is gone: it was being deleted") from None
        return False
    # Sizes first: they tell of nearly everything, at once.
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise BrokenCheckpoint(f"{name} has {path.stat().st_size} bytes and had {expected['bytes']}")
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for name, digest in pool.map(lambda name: (name, _digest(folder / name)), files):
            if digest != files[name]["sha256"]:
                raise BrokenCheckpoint(f"the content of {name} has changed")
    return True


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk. Windows has no such call, and does so by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(manifest: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest, by name."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenCheckpoint(f"{manifest.name} is torn ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise BrokenCheckpoint(f"{manifest.name} is not of format {_FORMAT}; a newer version wrote it")
    files: dict[str, dict[str, Any]] = content["files"]
    return files


def _stored(path: Path) -> dict[str, Any]:
    """Size and hash of a file that is on the disk by then."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
