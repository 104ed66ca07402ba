"""Which backend runs an operator, and what is said when it cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from robust_dpo import dispatch as module
from robust_dpo.dispatch import Backend, BackendStatus, backends, choose_backend, get_row_logprob, register_backend
from robust_dpo.kernels import row_logprob_torch

REQUIRED = os.environ.get("ROBUST_DPO_REQUIRE_BACKENDS", "").split()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that can be changed without consequences."""
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    yield
    module._status.cache_clear()


def fake(name: str, *, usable: bool = True, **options: object) -> Backend:
    launchers = {module.ROW_LOGPROB: "robust_dpo.kernels.row_logprob_torch:row_logprob"}
    status = BackendStatus(name, True, usable, "made for a test")
    return Backend(name, lambda: status, **({"launchers": launchers} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REQUIRED or ["torch"])
def test_required_backends_are_usable(name: str) -> None:
    # Continuous integration names those that must be there, so that a failed build cannot pass as skipped tests.
    status = backends()[name]
    assert status.usable, status


def test_report_has_a_line_for_each_backend_and_the_versions() -> None:
    report = backends()
    lines = str(report).splitlines()
    assert repr(report) == str(report)
    assert {line.split()[0] for line in lines[:-1]} == {"torch", "cpu", "triton", "cuda"}
    assert f"torch {torch.__version__}" in lines[-1]
    assert all(status.detail for status in report.backends)
    with pytest.raises(KeyError):
        report["tpu"]


def test_report_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not backends()["cpu"].built:
        pytest.skip("the native CPU extension is not built")
    module._status.cache_clear()
    monkeypatch.setenv("ROBUST_DPO_CPU_ISA", "generic")
    assert backends()["cpu"].detail.startswith("generic in use")
    module._status.cache_clear()
    monkeypatch.setenv("ROBUST_DPO_CPU_ISA", "vax")
    status = backends()["cpu"]
    assert status.built
    assert not status.usable
    assert "ROBUST_DPO_CPU_ISA" in status.detail
    with pytest.raises(
        RuntimeError, match=r"backend 'cpu' cannot run row_logprob .* not usable here: ROBUST_DPO_CPU_ISA"
    ):
        get_row_logprob("cpu", "cpu", torch.float32)
    assert get_row_logprob("auto", "cpu", torch.float32) is row_logprob_torch.row_logprob
    module._status.cache_clear()


def test_auto_prefers_the_native_kernel_on_cpu_and_plain_torch_elsewhere() -> None:
    best = "cpu" if backends()["cpu"].usable else "torch"
    assert choose_backend("row_logprob", "auto", "cpu", torch.bfloat16).name == best
    assert choose_backend("row_logprob", "auto", "meta", torch.bfloat16).name == "torch"


def test_later_backends_say_that_they_are_missing() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run row_logprob .*not part of this release"):
        get_row_logprob("cuda", "cpu", torch.float32)


def test_interpreter_is_never_chosen_by_auto() -> None:
    if not backends()["triton"].usable or torch.cuda.is_available():
        pytest.skip("Triton does not run in its interpreter here")
    assert "interpreted" in backends()["triton"].detail
    assert choose_backend("row_logprob", "auto", "cpu", torch.float32).name != "triton"
    assert choose_backend("row_logprob", "triton", "cpu", torch.float32).name == "triton"


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, cpu, cuda, torch, triton, got 'numpy'"):
        get_row_logprob("numpy", "cpu", torch.float32)


@pytest.mark.usefixtures("registry")
def test_registered_backend_is_chosen_by_priority() -> None:
    register_backend(fake("best", priority=99))
    assert choose_backend("row_logprob", "auto", "cpu", torch.float32).name == "best"
    assert backends().backends[0].name == "best"
    assert get_row_logprob("best", "cpu", torch.float32) is row_logprob_torch.row_logprob


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"usable": False}, "it is not usable here: made for a test"),
        ({"launchers": {}}, "it does not implement row_logprob"),
        ({"device_types": frozenset({"cuda", "xpu"})}, "it runs on cuda, xpu, not on cpu"),
        ({"dtypes": frozenset({torch.bfloat16})}, "it does not take torch.float32"),
    ],
    ids=["unusable", "operator", "device", "dtype"],
)
def test_explicit_backend_never_falls_back(options: dict[str, object], why: str) -> None:
    register_backend(fake("picky", priority=99, **options))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=f"backend 'picky' cannot run row_logprob with torch.float32 on cpu: {why}"):
        get_row_logprob("picky", "cpu", torch.float32)
    assert choose_backend("row_logprob", "auto", "cpu", torch.float32).name != "picky"


def test_nothing_can_run_shows_the_report() -> None:
    with pytest.raises(RuntimeError, match=r"no backend runs row_logprob with torch.int8 on cpu:\n(.*\n)*torch"):
        get_row_logprob("auto", "cpu", torch.int8)
