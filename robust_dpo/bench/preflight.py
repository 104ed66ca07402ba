"""What runs before anything is timed on a GPU: the GPU tests, and the kernels under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SANITIZER_ERRORS = 9
_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")


@dataclass(frozen=True)
class Outcome:
    """Of one check.

    Args:
        status: "passed", "failed" or "not run".
        detail: counts, or why it did not run.
        output: the end of what it printed, where it failed.
    """

    status: str
    detail: str
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _run(
    command: Sequence[str], folder: Path | None, timeout: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit code (None: out of time) and the end of the output."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or ""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return None, text[-4000:]
    return done.returncode, done.stdout[-4000:]


def run_tests(root: Path, timeout: float, *, marker: str = "gpu") -> Outcome:
    """`pytest -m gpu tests` in a checkout, in a process of its own."""
    # An installed package may lie beside the tests of another.
    if not ((root / "tests").is_dir() and (root / "pyproject.toml").is_file()):
        return Outcome("not run", "not a checkout: there are no tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, f"--junitxml={report}", "tests"]
        code, output = _run(command, root, timeout)
        if code is None:
            return Outcome("failed", f"not finished after {timeout:.0f} seconds", output)
        if not report.exists():
            return Outcome("failed", f"pytest ended with exit code {code} before any test", output)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    detail = f"{passed} passed, {counts['failures']} failed, {counts['errors']} errors, {counts['skipped']} skipped"
    # Exit code 5: no test was collected, which is no proof of anything.
    if code == 5:
        return Outcome("failed", "no test is marked gpu", output)
    return Outcome("passed" if code == 0 else "failed", detail, "" if code == 0 else output)


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, if CUDA's tools are installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(_CUDA_FOLDERS))


def run_sanitizer(timeout: float, tool: str | None = None) -> Outcome:
    """Check memory in every operator at small shapes; each tensor has its own allocation: a step outside shows."""
    tool = find_sanitizer() if tool is None else tool
    if tool is None:
        return Outcome("not run", "compute-sanitizer: command not found")
    script = [sys.executable, "-m", "robust_dpo.bench.smoke", "--device", "cuda"]
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(_SANITIZER_ERRORS), *script]
    code, output = _run(command, None, timeout, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if code is None:
        return Outcome("failed", f"not finished after {timeout:.0f} seconds", output)
    if code == 0:
        return Outcome("passed", "no errors")
    found = "memcheck found errors" if code == _SANITIZER_ERRORS else f"exit code {code}"
    return Outcome("failed", found, output)
