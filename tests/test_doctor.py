"""`robust-dpo doctor`: its screen, its advice, and the checks behind it."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from robust_dpo import dispatch
from robust_dpo.calibration import density_ratio
from robust_dpo.cli import app, doctor, findings, live_checks
from robust_dpo.cli.exit_codes import ExitCode
from robust_dpo.cli.findings import Findings
from robust_dpo.cli.live_checks import HEAD, TOLERANCE, Health, ask, check_backend
from robust_dpo.dispatch import Backend, BackendReport, BackendStatus
from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.kernels.row_logprob_torch import row_logprob as right_row_logprob

SOUND = Health("torch", "cpu", {"row_logprob": 1e-7, HEAD: 2e-7})
FUSED = Health("cpu", "cpu", {"row_logprob": 1e-7, HEAD: 2e-7}, fused=True)
WRONG = Health("triton", "cuda", {"row_logprob": 0.3, "group_epilogue": 1e-7, HEAD: 2e-7})
CRASHED = Health("triton", "", {}, failure="killed by SIGILL")
REPORT = BackendReport(
    (
        BackendStatus("triton", True, True, "3.6.0 on a GPU"),
        BackendStatus("cpu", True, True, "avx2 in use"),
        BackendStatus("torch", True, True, "plain PyTorch"),
        BackendStatus("cuda", False, False, "not part of this release"),
    ),
    {},
)


def screen(found: Findings) -> list[list[str]]:
    """The cells of the table of operators, line by line."""
    console = Console(file=io.StringIO(), width=200)
    console.print(doctor.operator_table(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO of two lines above
    lines = [line.strip("┃│").replace("┃", "│").split("│") for line in text.splitlines() if line[0] in "┃│"]
    return [[cell.strip() for cell in line] for line in lines]


def run_doctor() -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["doctor"])


def test_command_checks_every_usable_backend() -> None:
    done = subprocess.run([sys.executable, "-m", "robust_dpo", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    assert done.stderr == ""
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    for operator in live_checks.CHECKS:
        assert operator in lines
    assert "✓" in lines["row_logprob"]
    assert "✓" in lines[HEAD]
    assert len(done.stdout.splitlines()) < 50, "one screen"


def test_table_of_operators() -> None:
    rows = screen(Findings(REPORT, {"triton": WRONG, "cpu": FUSED, "torch": SOUND}))
    assert rows[0] == ["", "triton", "cpu", "torch", "cuda"]
    assert rows[1] == ["state", "on cuda", "on cpu", "on cpu", "not built"]
    assert rows[2] == ["row_logprob", "✗ off by 3e-01", "✓ 1e-07", "✓ 1e-07", "·"]
    assert rows[3] == ["group_epilogue", "✓ 1e-07", "by torch", "by torch", "·"]
    assert rows[-1] == [HEAD, "✓ 2e-07", "✓ 2e-07 fused", "✓ 2e-07", "·"]


def test_table_of_a_backend_that_crashes() -> None:
    rows = screen(Findings(REPORT, {"triton": CRASHED, "torch": SOUND}))
    assert [row[1] for row in rows] == ["triton", "fails", *["?"] * len(live_checks.CHECKS)]


@pytest.mark.parametrize(
    ("healths", "code", "messages"),
    [
        pytest.param([SOUND, FUSED], ExitCode.OK, [], id="all-sound"),
        pytest.param([WRONG, SOUND], ExitCode.OK, ["triton failed the check", 'backend="torch"'], id="one-is-wrong"),
        pytest.param([CRASHED], ExitCode.FAILED, ["killed by SIGILL", "No backend is usable"], id="none-is-sound"),
        pytest.param([], ExitCode.FAILED, ["No backend is usable"], id="none-is-usable"),
    ],
)
def test_exit_code(monkeypatch: pytest.MonkeyPatch, healths: list[Health], code: ExitCode, messages: list[str]) -> None:
    monkeypatch.setattr(dispatch, "backends", lambda: REPORT)
    monkeypatch.setattr(live_checks, "ask", lambda names: {health.backend: health for health in healths})
    result = run_doctor()
    assert result.exit_code == code, result.output
    for message in messages:
        assert message in result.output


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    result = run_doctor()
    assert result.exit_code == ExitCode.FAILED
    assert "pip install torch" in result.output


QUIET = Findings(REPORT, {"torch": SOUND}, gpu=True, optional={"triton": "3.6.0", "flash-attn": "2.8"}, system="Linux")


def without_native_code() -> BackendReport:
    built, *others = (status for status in REPORT.backends if status.name != "triton")
    return BackendReport((dataclasses.replace(built, built=False, usable=False), *others), {})


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        pytest.param({}, None, id="nothing-to-do"),
        pytest.param({"missing": ("peft", "scipy")}, "pip install peft scipy", id="missing-packages"),
        pytest.param({"healths": {"triton": CRASHED}}, "triton failed the check", id="unsound"),
        pytest.param({"report": without_native_code()}, "install g++", id="no-native-code"),
        pytest.param(
            {"report": without_native_code(), "hidden_build": Path("site-packages")},
            "leave this directory",
            id="source-tree-in-front",
        ),
        pytest.param({"gpu": False}, None, id="no-gpu-wanted"),
        pytest.param({"gpu": False, "driver_present": True}, "install a CUDA build", id="torch-without-cuda"),
        pytest.param({"gpu": False, "torch_has_gpu_code": True}, "CUDA_VISIBLE_DEVICES", id="no-gpu-visible"),
        pytest.param({"optional": {"flash-attn": "2.8"}}, "pip install triton", id="no-triton"),
        pytest.param(
            {"optional": {"flash-attn": "2.8"}, "system": "Windows"}, "no packages for Windows", id="no-triton-there"
        ),
        pytest.param({"optional": {"triton": "3.6.0"}}, "robust-dpo[flash]", id="no-flash-attention"),
    ],
)
def test_advice(change: dict[str, Any], advice: str | None) -> None:
    found = dataclasses.replace(QUIET, **change).advice()
    assert found == [] if advice is None else (len(found) == 1 and advice in found[0]), found


def test_required_packages_are_those_of_the_project() -> None:
    """What doctor calls required is installed with the package."""
    project = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert [name for name in findings.REQUIRED if f'    "{name}>=' not in project] == []


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_checks_find_backends_sound(name: str) -> None:
    if not dispatch.backends()[name].usable:
        pytest.skip(dispatch.backends()[name].detail)
    health = check_backend(name)
    assert health.sound
    assert {"row_logprob", HEAD} <= set(health.errors)


def _half(logits: Tensor, targets: Tensor, *, grad_out: Tensor | None = None, **options: Any) -> RowLogprob:
    """A backend with the right log-probs and half of the gradient."""
    result = right_row_logprob(logits, targets, grad_out=grad_out, **options)
    if grad_out is not None:
        grad_out /= 2
    return result


def _nan(logits: Tensor, targets: Tensor, **options: Any) -> RowLogprob:
    result = right_row_logprob(logits, targets, **options)
    return result._replace(logp=torch.full_like(result.logp, torch.nan))


@pytest.mark.parametrize("wrong", [_half, _nan], ids=["half-the-gradient", "nan"])
def test_checks_find_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    module = ModuleType(f"wrong_backend{wrong.__name__}")
    module.row_logprob = wrong  # type: ignore[attr-defined]  # a module made for this test
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "_REGISTRY", dict(dispatch._REGISTRY))
    status = BackendStatus("wrong", True, True, "for a test")
    dispatch.register_backend(Backend("wrong", lambda: status, {"row_logprob": f"{module.__name__}:row_logprob"}))
    health = check_backend("wrong")
    assert not health.sound
    assert all(health.errors[operator] > TOLERANCE for operator in ("row_logprob", HEAD))


def test_a_backend_that_cannot_run_says_why() -> None:
    health = ask(["cuda"])["cuda"]
    assert not health.sound
    assert health.failure is not None
    assert "cannot run row_logprob" in health.failure


def test_checks_the_package_that_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a clone the current directory has a package of the same name, which Python would find first.
    (tmp_path / "robust_dpo").mkdir()
    (tmp_path / "robust_dpo" / "__init__.py").write_text("raise RuntimeError('another package')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert ask(["torch"])["torch"].sound


def test_operators_without_code_are_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_REGISTRY", dict(dispatch._REGISTRY))
    status = BackendStatus("rows", True, True, "made for a test")
    launchers = {"row_logprob": "robust_dpo.kernels.row_logprob_torch:row_logprob"}
    dispatch.register_backend(dispatch.Backend("rows", lambda: status, launchers))
    health = check_backend("rows")
    assert "row_logprob" in health.errors and "calibration_weights" not in health.errors
    probs = torch.rand(9)
    assert torch.equal(density_ratio(probs, backend="rows"), density_ratio(probs, backend="torch"))


def _python(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_check_that_is_killed() -> None:
    health = live_checks._outcome("cpu", _python("import os, signal; os.kill(os.getpid(), signal.SIGILL)"))
    assert health.failure == "killed by SIGILL"


def test_a_check_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_checks, "_TIME_LIMIT", 0.2)
    health = live_checks._outcome("cpu", _python("import time; time.sleep(60)"))
    assert health.failure is not None
    assert health.failure.startswith("no answer")
