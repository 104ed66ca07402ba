"""results.json: what was measured, for each machine and version that wrote into the folder; saved after every case."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import robust_dpo
from robust_dpo.bench.machine import Machine
from robust_dpo.bench.record import Record
from robust_dpo.errors import DataError, argument_error

FORMAT = 2
FILE = "results.json"
# What decides about the measurements; notes and results beside it do not.
_CODE = ("robust_dpo", "kernels", "csrc", "setup.py", "build_support")
# A process that dies this often at the same implementation was taken down by it.
_DEATHS = 2


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git in a checkout; None where there is none."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_version() -> str:
    """Version of the package, with the commit and a digest of uncommitted changes in a checkout."""
    root = Path(robust_dpo.__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return robust_dpo.__version__
    changes = _git(root, "diff", "HEAD", "--", *_CODE)
    dirty = f".{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
    return f"{robust_dpo.__version__}+{commit}{dirty}"


def run_key(machine: Machine) -> dict[str, str]:
    """What two runs must share for one to go on where the other ended."""
    gpu = machine.accelerator
    return {
        "code": code_version(),
        "device": machine.cpu if gpu is None else gpu.name,
        "driver": f"{machine.threads} threads" if gpu is None else gpu.driver,
        **{library: machine.versions.get(library, "none") for library in ("torch", "triton")},
    }


class Store:
    """The run of one key in a results.json.

    Args:
        folder: where the file is, or will be.
        key: of this run.
        machine: described in the file.

    Raises:
        ValueError: the folder cannot be made or written to.
        DataError: the file that is there is not ours.
    """

    def __init__(self, folder: Path, key: Mapping[str, str], machine: Machine) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise argument_error(
                "out", "a folder, or a path where one can be made", f"{folder}: {error.strerror}"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise argument_error("out", "a folder that can be written to", str(folder))
        self.path = folder / FILE
        self._content = self._read()
        found = next((run for run in self._content["runs"] if run["key"] == dict(key)), None)
        if found is None:
            found = {
                "key": dict(key),
                "started": _now(),
                "preflight": {},
                "cases": {},
                "skipped": {},
                "cut_short": {},
                "measuring": None,
                "deaths": [],
                "crashes": [],
            }
            self._content["runs"].append(found)
        self._run: dict[str, Any] = found
        self._run["machine"] = machine.as_dict()
        self._blame_last_death()
        self.save()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"format": FORMAT, "runs": []}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", path=self.path, line=error.lineno) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"expected results of format {FORMAT}; choose another folder", path=self.path)
        return content

    def save(self) -> None:
        """Replace the file in one step: who is killed in between leaves the old one."""
        self._run["updated"] = _now()
        draft = self.path.with_suffix(".json.new")
        draft.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)

    @property
    def records(self) -> dict[str, Record]:
        return {name: Record.from_dict(values) for name, values in self._run["cases"].items()}

    @property
    def preflight(self) -> dict[str, dict[str, Any]]:
        """Name of a check that ran before the measurements -> its outcome."""
        return dict(self._run["preflight"])

    @property
    def skipped(self) -> dict[str, int]:
        """Name of a case that there was no time for -> minutes that a run with it must be given, 0 if unknown."""
        return dict(self._run["skipped"])

    @property
    def cut_short(self) -> dict[str, float]:
        """Name of a case -> seconds that it had, and that were not enough."""
        return dict(self._run["cut_short"])

    @property
    def key(self) -> dict[str, str]:
        return dict(self._run["key"])

    @property
    def machine(self) -> dict[str, Any]:
        """As in `Machine`."""
        return dict(self._run["machine"])

    @property
    def crashes(self) -> dict[tuple[str, str], str]:
        """(case, row) -> why it is not tried again."""
        return {(case, row): why for case, row, why in self._run["crashes"]}

    def put(self, record: Record) -> None:
        self._run["cases"][record.name] = record.as_dict()
        self._run["measuring"] = None
        if record.complete:
            self._run["cut_short"].pop(record.name, None)
        self.save()

    def put_cut_short(self, case: str, seconds: float) -> None:
        self._run["cut_short"][case], self._run["measuring"] = seconds, None
        self.save()

    def put_preflight(self, name: str, outcome: Mapping[str, Any]) -> None:
        self._run["preflight"][name] = dict(outcome)
        self.save()

    def put_skipped(self, minutes: Mapping[str, int]) -> None:
        self._run["skipped"], self._run["measuring"] = dict(minutes), None
        self.save()

    def announce(self, case: str, row: str) -> None:
        """Write down what is about to run, for the case that it takes the process with it."""
        self._run["measuring"] = [case, row]
        self.save()

    def crash(self, case: str, row: str, why: str) -> None:
        self._run["crashes"].append([case, row, why])
        self._run["measuring"] = None
        self.save()

    def _blame_last_death(self) -> None:
        """A process that ended between `announce` and `put` died, or was killed, at what it had announced."""
        last, deaths = self._run["measuring"], self._run["deaths"]
        if last is None:
            return
        deaths.append(last)
        self._run["measuring"] = None
        if deaths.count(last) >= _DEATHS:
            self._run["crashes"].append([*last, f"the process died {_DEATHS} times while it was measured"])
            self._run["deaths"] = [death for death in deaths if death != last]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
