"""The CUDA kernels and their launchers on the CPU: csrc/*.cu compiled with tests/cuda_emulation.h."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from row_cases import through_gpu
from torch import Tensor

import robust_dpo
from robust_dpo.dispatch import backends
from robust_dpo.kernels.row_logprob import RowLogprob, RowLogprobLauncher
from robust_dpo.kernels.row_plan_cuda import RowPlan

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc/cuda_bindings.cpp", ROOT / "csrc/row_logprob_cuda.cpp"]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DROBUST_DPO_EMULATED"]
LAUNCHERS = ("row_logprob", "group_epilogue", "calibration_weights", "rescale")
EXTENSION = "robust_dpo._cuda"


def compiler() -> str:
    """The C++ compiler; without one the test is skipped."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or not sys.platform.startswith("linux"):
        pytest.skip("emulation of the CUDA kernels needs g++ on Linux")
    return found


@functools.cache
def build() -> Path:
    """The extension for the CPU; kept from run to run as long as no source changes."""
    pybind11 = pytest.importorskip("pybind11")
    cxx = compiler()
    contents = [path.read_bytes() for path in sorted((ROOT / "csrc").iterdir()) if path.is_file()]
    contents += [
        (ROOT / "tests/cuda_emulation.h").read_bytes(),
        sys.version.encode(),
        cxx.encode(),
        *map(str.encode, FLAGS),
    ]
    digest = hashlib.sha256(b"\0".join(contents)).hexdigest()[:20]
    folder = Path(tempfile.gettempdir(), f"robust_dpo_cuda_emulated_{os.getuid()}")
    target = folder / f"_cuda_{digest}.so"
    folder.mkdir(mode=0o700, exist_ok=True)
    with _locked(folder / "lock"):  # processes of the same test run build it once
        if not target.exists():
            _compile(cxx, pybind11.get_include(), target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Linux has it, where alone this runs

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(cxx: str, pybind11_include: str, target: Path) -> None:
    """The extension as `target`, in whose folder nothing older than a day is kept."""
    places = (ROOT / "csrc", ROOT / "tests", pybind11_include, sysconfig.get_path("include"))
    include = [f"-I{path}" for path in places]
    with tempfile.TemporaryDirectory(dir=target.parent) as objects:

        def compile_one(source: Path) -> str:
            output = f"{objects}/{source.name}.o"
            command = [cxx, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", output]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, SOURCES))
        linked = Path(objects, "_cuda.so")
        subprocess.run([cxx, "-shared", *compiled, "-o", str(linked)], check=True)
        linked.replace(target)
    for old in target.parent.glob("_cuda_*.so"):
        if time.time() - old.stat().st_mtime > 86_400:
            old.unlink(missing_ok=True)


@functools.cache
def launcher_module(operator: str) -> ModuleType:
    """kernels/<operator>_cuda.py, launching kernels on the CPU; who imports that name gets the real one still."""
    with _emulated_extension():
        return importlib.import_module(f"robust_dpo.kernels.{operator}_cuda")


@contextmanager
def _emulated_extension() -> Iterator[None]:
    names = [EXTENSION, "robust_dpo.kernels.cuda_target", *(f"robust_dpo.kernels.{name}_cuda" for name in LAUNCHERS)]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    attribute = vars(robust_dpo).get("_cuda")
    extension = _load_extension()
    sys.modules[EXTENSION] = extension
    robust_dpo._cuda = extension  # type: ignore[attr-defined]  # the import system sets it like this
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
        del robust_dpo._cuda  # type: ignore[attr-defined]
        if attribute is not None:
            robust_dpo._cuda = attribute  # type: ignore[attr-defined]


@functools.cache
def _load_extension() -> ModuleType:
    # Not by the name of the real one, for which pybind11 would give that one back.
    spec = importlib.util.spec_from_file_location("emulated._cuda", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def implementation(operator: str) -> ModuleType:
    """The launchers of an operator: on the GPU where there is one that the extension runs on, else emulated."""
    if backends()["cuda"].usable:
        return importlib.import_module(f"robust_dpo.kernels.{operator}_cuda")
    return launcher_module(operator)


# One block for a row, with and without keeping it on the chip; a cluster; two launches.
ROW_PLANS = {
    "cuda-row": RowPlan(128),
    "cuda-keep": RowPlan(256, keep=True),
    "cuda-cluster": RowPlan(128, 3, cluster=True, keep=True),
    "cuda-cluster-again": RowPlan(96, 4, cluster=True),
    "cuda-split": RowPlan(128, 5),
}
KEPT_BYTES = 200 << 10


def row_logprob(
    logits: Tensor, targets: Tensor, *, plan: RowPlan | None, grad_out: Tensor | None = None, **options: Any
) -> RowLogprob:
    """row_logprob of CPU tensors, by a plan where it may be used."""
    kept = plan is not None and plan.keep and options.get("known") is None
    if plan is not None and not kept and grad_out is not None and grad_out.itemsize < logits.itemsize:
        plan = RowPlan(plan.threads)  # several blocks would write what others have yet to read
    if plan is not None and plan.keep and logits.shape[1] * logits.itemsize > plan.segments * KEPT_BYTES:
        plan = RowPlan(plan.threads, 8, cluster=True, keep=True)
    launcher = implementation("row_logprob").row_logprob
    if backends()["cuda"].usable:
        launcher = functools.partial(through_gpu, launcher)
    result: RowLogprob = launcher(logits, targets, plan=plan, grad_out=grad_out, **options)
    return result


def row_launchers() -> dict[str, RowLogprobLauncher]:
    """`row_logprob` by every plan."""
    return {name: functools.partial(row_logprob, plan=plan) for name, plan in ROW_PLANS.items()}
