"""Which backend runs an operator, and what is said when it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robust_dpo import dispatch as module
from robust_dpo import losses, probes
from robust_dpo.dispatch import Backend, BackendStatus, backends, choose_backend, get_row_logprob, register_backend
from robust_dpo.kernels import calibration_weights_torch, rescale_torch, row_logprob_torch

PLAIN = {"row_logprob": "robust_dpo.kernels.row_logprob_torch:row_logprob"}
REQUIRED = os.environ.get("ROBUST_DPO_REQUIRE_BACKENDS", "").split()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that can be changed without consequences."""
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    yield
    module._status.cache_clear()


def fake(name: str, *, usable: bool = True, **options: object) -> Backend:
    status = BackendStatus(name, True, usable, "made for a test")
    return Backend(name, lambda: status, **({"launchers": PLAIN} | options))  # type: ignore[arg-type]


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
    with pytest.raises(KeyError, match="expected one of cpu, cuda, torch, triton, got 'tpu'"):
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


def test_cuda_says_why_it_cannot_run() -> None:
    status = backends()["cuda"]
    why = "it runs on cuda, not on cpu" if status.usable else f"it is not {'usable' if status.built else 'built'} here"
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run row_logprob with .* on cpu: {why}"):
        get_row_logprob("cuda", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("chip", "capability", "runs"),
    [("sm_80", 80, True), ("sm_80", 89, True), ("sm_90", 80, False), ("sm_90", 100, False), ("sm_100", 103, True),
     ("sm_100", 120, False), ("compute_120", 120, True), ("compute_90", 121, True), ("compute_120", 100, False)],
)  # fmt: skip
def test_machine_code_runs_within_a_generation_and_ptx_on_later_ones(chip: str, capability: int, runs: bool) -> None:
    assert probes.runs_on(chip, capability) is runs


@pytest.mark.parametrize(
    "problem", ["", "cudaErrorInsufficientDriver, too old (CUDA of the driver 12.2, of the extension 13.0)"]
)
def test_cuda_needs_a_driver_for_its_own_runtime(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = SimpleNamespace(ARCHITECTURES="sm_90 compute_90", problem=lambda: problem)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib, "import_module", lambda _: extension)
    # PyTorch, with an older runtime of its own, is content with the driver.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    properties = SimpleNamespace(major=9, minor=0, name="a chip")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    status = probes.probe_cuda()
    assert status.built and status.usable is not bool(problem)
    assert status.detail == (problem or "sm_90 compute_90 on a chip")


def test_the_runtime_of_the_extension_says_what_is_wrong() -> None:
    cuda = pytest.importorskip("robust_dpo._cuda")
    if torch.cuda.is_available():
        assert backends()["cuda"].usable is (cuda.problem() == "")
    else:
        assert re.fullmatch(
            r"cudaError\w+, .+ \(CUDA of the driver \d+\.\d, of the extension 1[2-9]\.\d\)", cuda.problem()
        )


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


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("wrong", ["raises", "another-name", "no-status"])
def test_a_bad_probe_makes_its_backend_unusable_and_no_other(wrong: str) -> None:
    def probe() -> BackendStatus:
        if wrong == "raises":
            raise OSError("no such device")
        return BackendStatus("other", True, True, "") if wrong == "another-name" else "usable"  # type: ignore[return-value]

    register_backend(Backend("bad", probe, PLAIN, priority=99))
    why = {"raises": "OSError: no such device", "another-name": "a BackendStatus named 'bad'", "no-status": "'usable'"}
    assert why[wrong] in backends()["bad"].detail
    assert choose_backend("row_logprob", "auto", "cpu", torch.float32).name != "bad"
    with pytest.raises(RuntimeError, match=r"backend 'bad' cannot run row_logprob .* its probe"):
        get_row_logprob("bad", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"name": "auto"}, ValueError, "name: expected a name, and not 'auto'"),
        ({"name": None}, TypeError, "name: expected the name of the backend, got NoneType"),
        ({"probe": "here"}, TypeError, "probe of backend 'mine': expected a function"),
        ({"launchers": {"row_logprobs": "m:f"}}, ValueError, "launchers of backend 'mine': .*, got 'row_logprobs'"),
        ({"launchers": {"row_logprob": "m.f"}}, ValueError, """'mine': expected "module:function" .*, got 'm.f'"""),
        ({"launchers": {"row_logprob": print}}, TypeError, """'mine': expected "module:function" .*, got builtin"""),
        ({"device_types": {"cpu"}}, ValueError, "device_types of backend 'mine': expected a frozenset of str"),
        ({"dtypes": frozenset({"fp32"})}, ValueError, "dtypes of backend 'mine': expected a frozenset of dtype"),
        ({"priority": 1.5}, TypeError, "priority of backend 'mine': expected a whole number, got float"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_backends_are_checked(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Backend(**{"name": "mine", "probe": lambda: None, "launchers": PLAIN} | change)


def test_only_backends_are_registered() -> None:
    with pytest.raises(TypeError, match="backend: expected a Backend, got str"):
        register_backend("mine")  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("place", ["no_such_module:row", "robust_dpo.errors:row"])
def test_launchers_that_cannot_be_loaded_name_the_backend(place: str) -> None:
    register_backend(fake("mine", launchers={"row_logprob": place}))
    with pytest.raises(RuntimeError, match=f"backend 'mine': cannot load '{place}': "):
        get_row_logprob("mine", "cpu", torch.float32)


@pytest.mark.usefixtures("registry")
def test_an_epilogue_needs_supports_beside_it() -> None:
    register_backend(fake("mine", launchers=PLAIN | {"group_epilogue": "robust_dpo.errors:type_error"}))
    with pytest.raises(RuntimeError, match=r"backend 'mine': cannot load 'robust_dpo\.errors:supports'"):
        module.get_group_epilogue("mine", "cpu", torch.float32, losses.resolve("sigmoid"), 2)


@pytest.mark.usefixtures("registry")
def test_plain_torch_stands_in_for_all_but_row_logprob() -> None:
    register_backend(fake("mine"))
    assert module.get_rescale("mine", "cpu", torch.float32) is rescale_torch.rescale
    found = module.get_calibration_weights("mine", "cpu", torch.float32)
    assert found is calibration_weights_torch.calibration_weights
    assert module.get_group_epilogue("mine", "cpu", torch.float32, losses.resolve("sigmoid"), 2) is None
    assert not module.has_fused_head("mine", "cpu", torch.float32)


@pytest.mark.usefixtures("registry")
def test_backends_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed_backend.py").write_text(
        "from robust_dpo.dispatch import Backend, BackendStatus\n"
        'BACKEND = Backend("installed", lambda: BackendStatus("installed", True, True, "here"))\n',
        encoding="utf-8",
    )
    metadata = tmp_path / "installed_backend-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: installed_backend\nVersion: 1\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(
        "[robust_dpo.backends]\ninstalled = installed_backend:BACKEND\nbroken = installed_backend:NOTHING\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module._register_installed()
    assert backends()["installed"].detail == "here"
    assert "entry point 'installed_backend:NOTHING' raised AttributeError" in backends()["broken"].detail


def test_a_source_tree_says_what_it_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, installed = tmp_path / "clone" / "robust_dpo", tmp_path / "site-packages" / "robust_dpo"
    for folder in (tree, installed):
        folder.mkdir(parents=True)
    monkeypatch.setattr(probes, "__file__", str(tree / "probes.py"))
    monkeypatch.setattr(sys, "path", [str(tree.parent), str(installed.parent)])
    assert probes.hidden_build() is None
    (installed / f"_cpu{EXTENSION_SUFFIXES[0]}").touch()
    assert probes.hidden_build() == installed
    assert f"hides the installed {installed}" in probes._why_not_built("cpu")
    (tree / f"_cpu{EXTENSION_SUFFIXES[0]}").touch()
    assert probes.hidden_build() is None


@pytest.mark.parametrize("program", ["import triton, os; os.environ['TRITON_INTERPRET'] = '1'", "import os; {}"])
def test_a_late_wish_for_the_interpreter(program: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    late = "import robust_dpo.dispatch; os.environ['TRITON_INTERPRET'] = '1'"
    program = f"{program.format(late)}; import robust_dpo; print(robust_dpo.backends()['triton'])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "not usable" in done.stdout
    assert "set it before Python starts" in done.stdout
