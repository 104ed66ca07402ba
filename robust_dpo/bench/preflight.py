"""What runs before anything is timed on a GPU: the GPU tests, and the kernels under compute-sanitizer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robust_dpo.bench import package

_SANITIZER_ERRORS = 9
_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")
# For pytest to write its report after it was interrupted.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """Of one check.

    Args:
        status: "passed", "failed", "not finished" (in the time it had) or "not run".
        detail: counts, or why it did not run.
        output: the end of what it printed, where it did not pass.
    """

    status: str
    detail: str
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_settled(outcome: Mapping[str, Any] | None) -> bool:
    """Whether a stored outcome says something about the code, so that the check need not run again."""
    return outcome is not None and outcome["status"] in ("passed", "failed")


def _run(
    command: Sequence[str], folder: Path | None, timeout: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit code (None: out of time) and the end of the output.

    At the end of its time the command is interrupted, and soon after killed with all of its own processes: the program
    that a sanitizer watches is a child of it, and would go on with the GPU.
    """
    with subprocess.Popen(
        command,
        cwd=folder,
        env=package.child_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                printed, _ = process.communicate(timeout=timeout)
                return process.returncode, printed[-4000:]
            _signal_all(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GRACE_SECONDS)
        finally:
            _signal_all(process, signal.SIGKILL)
        printed, _ = process.communicate()
    return None, printed[-4000:]


def _signal_all(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To a process that began a session, and to what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run_tests(root: Path, timeout: float, *, marker: str = "gpu and not slow") -> Outcome:
    """`pytest -m "gpu and not slow" tests` in a checkout, in a process of its own, on the package of this process."""
    # An installed package may lie beside the tests of another.
    if not ((root / "tests").is_dir() and (root / "pyproject.toml").is_file()):
        return Outcome("not run", "not a checkout: there are no tests")
    if other := package.difference_from(root):
        why = f"the package that is measured, in {package.ROOT}, is not that of the checkout {root}: {other} differs"
        return Outcome("not run", f"{why}; install the checkout again")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = package.module_command("pytest", "-q", "-m", marker, f"--junitxml={report}", "tests")
        code, output = _run(command, root, timeout)
        counts = _counts(report)
    # Exit code 5: no test was collected, which is no proof of anything.
    if code == 5:
        return Outcome("failed", "no test is marked gpu", output)
    if counts is None and code is not None:
        return Outcome("failed", f"pytest ended with exit code {code} before any test", output)
    found = ", ".join(f"{count} {what}" for what, count in (counts or {}).items())
    if code is None:
        detail = f"not finished after {timeout:.0f} seconds" + (f", {found}" if found else "")
        broken = counts is not None and counts["failed"] + counts["errors"] > 0
        return Outcome("failed" if broken else "not finished", detail, output)
    return Outcome("passed" if code == 0 else "failed", found, "" if code == 0 else output)


def _counts(report: Path) -> dict[str, int] | None:
    """Tests by outcome in a report of pytest; None where there is none."""
    if not report.exists():
        return None
    suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    tests, failed, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    return {"passed": tests - failed - errors - skipped, "failed": failed, "errors": errors, "skipped": skipped}


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, if CUDA's tools are installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(_CUDA_FOLDERS))


def run_sanitizer(timeout: float, tool: str | None = None) -> Outcome:
    """Check memory in every operator at small shapes; each tensor has its own allocation: a step outside shows."""
    tool = find_sanitizer() if tool is None else tool
    if tool is None:
        return Outcome("not run", "compute-sanitizer: command not found")
    script = package.module_command("robust_dpo.bench.smoke", "--device", "cuda")
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(_SANITIZER_ERRORS), *script]
    code, output = _run(command, None, timeout, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if code is None:
        return Outcome("not finished", f"not finished after {timeout:.0f} seconds", output)
    if code == 0:
        return Outcome("passed", "no errors")
    found = "memcheck found errors" if code == _SANITIZER_ERRORS else f"exit code {code}"
    return Outcome("failed", found, output)
