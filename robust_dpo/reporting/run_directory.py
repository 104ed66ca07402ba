"""The layout of a run directory, and the rule that one is never overwritten silently."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from robust_dpo.errors import DataError, argument_error

CONFIG = "config.yaml"


def _plain(value: Any) -> Any:
    """A value that YAML and strict JSON can hold: paths and enums as text, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def _set_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that have a value, in the form that YAML holds."""
    return {key: value for key, value in _plain(options).items() if value is not None}


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    os.replace(partial, path)


@dataclass(frozen=True)
class RunDirectory:
    """Paths and files of one run.

    `config.yaml` (every option as resolved; `--config` takes it back), `metrics.jsonl` (one line per log),
    `weights.json` (robust weights of the last steps), `summary.json`, `plots/`, `checkpoints/`, `model/`.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        return self.path / "weights.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @staticmethod
    def create(path: Path, *, overwrite: bool = False, resume: bool = False) -> RunDirectory:
        """A directory to write into.

        Args:
            path: must not exist or be empty, unless one of the following is set.
            overwrite: delete an earlier run first. Only what is a run directory (has a config.yaml) is deleted.
            resume: go on with the run that is there.

        Raises:
            FileExistsError: something is there that may not be touched.
        """
        # empty folders are what a run leaves that was refused before it began
        occupied = path.is_file() or any(entry.is_file() for entry in path.rglob("*"))
        if occupied and not resume:
            if not overwrite:
                raise FileExistsError(f"{path}: already holds files; choose another --out, or give --overwrite")
            if not (path / CONFIG).is_file():
                raise FileExistsError(f"{path}: --overwrite replaces run directories only, and this has no {CONFIG}")
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        return RunDirectory(path)

    @staticmethod
    def open(path: Path) -> RunDirectory:
        """A finished or running run.

        Raises:
            DataError: there is no run at `path`.
        """
        run = RunDirectory(path)
        if not run.metrics.is_file():
            raise DataError("no metrics.jsonl here: not a run directory", path=path)
        return run

    def write_config(self, options: Mapping[str, Any]) -> None:
        """Every option as resolved, in the form that `--config` reads. Options that are not set are left out."""
        text = yaml.safe_dump(_set_options(options), sort_keys=False, allow_unicode=True)
        self.config.write_text(text, encoding="utf-8")

    def refuse_changes(self, options: Mapping[str, Any]) -> None:
        """A resumed run keeps its options: its record says what the weights came from.

        Raises:
            ValueError: an option is not what the run was started with.
        """
        before, now = self.read_config(), _set_options(options)
        if not before:
            return  # stopped before it could be written
        for key in sorted((before.keys() | now.keys()) - {"out"}):
            if before.get(key) != now.get(key):
                option = f"--{key.replace('_', '-')}"
                raise argument_error(option, f"{before.get(key)!r} as when the run began (--resume)", now.get(key))

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote, or {} where there is none."""
        if not self.config.is_file():
            return {}
        return yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl, in order.

        Raises:
            DataError: a line is not a JSON object (a last line cut short by a killed run is ignored).
        """
        return list(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        text = self.metrics.read_text(encoding="utf-8")
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines) and not text.endswith("\n"):
                    return
                raise DataError(f"not JSON: {error.msg}", path=self.metrics, line=number) from error
            if not isinstance(record, dict):
                raise DataError(f"expected a JSON object, got {type(record).__name__}", path=self.metrics, line=number)
            yield record

    def keep_metrics_until(self, step: int) -> None:
        """Drop the records after `step`: a resumed run writes them again."""
        if not self.metrics.is_file():
            return
        kept = [record for record in self._records() if record.get("step", 0) <= step]
        partial = self.metrics.with_name(self.metrics.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, self.metrics)
