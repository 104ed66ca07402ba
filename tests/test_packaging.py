"""The package that ships: source distribution, wheel built from it in isolation, and the modes of the build."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("build_support", "csrc", "kernels", "robust_dpo", "docs", "tests", "benchmarks")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile", "CHANGELOG.md")

pytestmark = pytest.mark.slow


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        capture_output=True,
        timeout=1500,  # nvcc for four chips, on a machine that does something else as well
        stdin=subprocess.DEVNULL,
        check=False,
    )


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without anything that was built in it."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for folder in COPIED:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in FILES:
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    succeed(python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), cwd=source))
    (archive,) = out.glob("robust_dpo-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution in an isolated environment: setuptools and pybind11, no torch."""
    out = tmp_path_factory.mktemp("wheel")
    succeed(python("-m", "pip", "wheel", "--no-deps", "-w", str(out), str(sdist), cwd=out, ROBUST_DPO_BUILD="cpu"))
    (archive,) = out.glob("robust_dpo-*.whl")
    return archive


def build_wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without isolation and from a copy of its own, so that builds do not see each other's objects."""
    copy = out / "copy"
    shutil.copytree(source, copy, symlinks=True)
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)]
    return python(*command, cwd=out, **environment)


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def modules(source: Path) -> set[str]:
    names = {path.relative_to(source).as_posix() for path in (source / "robust_dpo").rglob("*.py")}
    return names | {f"robust_dpo/kernels/{path.name}" for path in (source / "kernels").glob("*.py")}


def run_installed(installed: Path, code: str, *flags: str) -> list[str]:
    """Lines printed by `code` with the unpacked wheel in front.

    The finder of an editable install of this tree is taken out: it would supply what the wheel lacks.
    """
    prelude = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
    code = prelude + textwrap.dedent(code)
    return succeed(python(*flags, "-c", code, cwd=installed, PYTHONPATH=str(installed))).splitlines()


def test_wheel_holds_every_module_and_nothing_else(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if name.endswith(".py")}
    assert inside == modules(source)
    assert {"robust_dpo/py.typed", "robust_dpo/_cpu.pyi", "robust_dpo/_build.json"} <= names
    # A top-level package `kernels` would shadow the one that transformers imports.
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"robust_dpo"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.startswith("robust_dpo/_cpu.") and name.endswith(".so") for name in names)


def test_extension_does_not_know_torch(wheel: Path, tmp_path: Path) -> None:
    (extension,) = unpack(wheel, tmp_path).glob("robust_dpo/_cpu.*.so")
    content = extension.read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp", b"at6Tensor"):
        assert library not in content
    assert extension.stat().st_size < 2_000_000


def test_wheel_imports_without_a_warning(wheel: Path, tmp_path: Path) -> None:
    installed = unpack(wheel, tmp_path)
    code = "import robust_dpo; print(robust_dpo.__file__); print(robust_dpo.backends())"
    out = run_installed(installed, code, "-W", "error")
    assert out[0].startswith(str(installed))
    assert [line.split()[:2] for line in out if line.startswith("cpu")] == [["cpu", "usable"]]


def test_metadata(wheel: Path, tmp_path: Path) -> None:
    (metadata,) = unpack(wheel, tmp_path).glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text
    for requirement in ("torch>=", "transformers>=", "datasets>=", "peft>=", "scikit-learn>=", "rich>=", "typer>="):
        assert f"Requires-Dist: {requirement}" in text
    assert re.search(r"Requires-Dist: triton>=[\d.]+; platform_system == .Linux.", text)
    for extra in ("flash", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in text
    (scripts,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert "robust-dpo = robust_dpo.cli:main" in scripts.read_text(encoding="utf-8")


def test_sdist_holds_the_sources(source: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {f"csrc/{path.name}" for path in (source / "csrc").iterdir()}
    build = {"setup.py", *(f"build_support/{path.name}" for path in (source / "build_support").glob("*.py"))}
    assert native | modules(source) | build | {"pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json")) or "__pycache__" in name]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("gpu", "expected one of auto, cpu, cuda, none, got 'gpu'"),
    ],
)
def test_impossible_modes_fail_loudly(source: Path, mode: str, message: str) -> None:
    done = python("setup.py", "--version", cwd=source, ROBUST_DPO_BUILD=mode)
    assert done.returncode != 0
    assert message in done.stderr


def test_cuda_without_a_toolkit_fails_at_once(source: Path) -> None:
    done = python("setup.py", "build_ext", cwd=source, ROBUST_DPO_BUILD="cuda", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert "CUDA_HOME=/nowhere: /nowhere holds no nvcc and no cuda_runtime.h and no libcudart_static.a" in done.stderr


@pytest.mark.parametrize("archs", ["70", "sm_9x", "90a;", "native"])
def test_wrong_chips_fail_at_once(source: Path, archs: str) -> None:
    done = python("setup.py", "--version", cwd=source, ROBUST_DPO_CUDA_ARCHS=archs)
    assert done.returncode != 0
    assert 'ROBUST_DPO_CUDA_ARCHS: expected numbers from 80 on, such as "80;90", got' in done.stderr


def test_none_builds_a_pure_package(source: Path, tmp_path: Path) -> None:
    succeed(build_wheel(source, tmp_path, ROBUST_DPO_BUILD="none"))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    check_without_extension(unpack(wheel, tmp_path / "installed"), "installed without native code")


def test_auto_goes_on_without_a_compiler_and_says_so(source: Path, tmp_path: Path) -> None:
    done = build_wheel(source, tmp_path, CC="false", CXX="false", CUDA_HOME="/nowhere")
    succeed(done)
    (wheel,) = tmp_path.glob("*.whl")
    assert report_of(tmp_path)["cpu"].startswith("could not be compiled: ")
    assert report_of(tmp_path)["cuda"].startswith("could not be compiled: CUDA_HOME=/nowhere: /nowhere holds no nvcc")
    check_without_extension(unpack(wheel, tmp_path / "installed"), "could not be compiled")


@pytest.fixture
def old_toolkit(tmp_path: Path) -> Path:
    """A toolkit that knows no chips after sm_90, whose compiler writes down its arguments and fails."""
    home = tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
        if [ "$1" = --list-gpu-arch ]; then printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit; fi
        if [ "$1" = --version ]; then echo 'Cuda compilation tools, release 12.0, V12.0.140'; exit; fi
        echo "$*" >> {home}/calls; echo "out of order" >&2; exit 1
    """)
    nvcc.chmod(0o755)
    return home


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux only")
@pytest.mark.parametrize("through", ["CUDA_HOME", "PATH"])
def test_cuda_is_compiled_for_the_chips_that_nvcc_knows(
    source: Path, tmp_path: Path, old_toolkit: Path, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    path = f"{old_toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}"
    found = {"CUDA_HOME": str(old_toolkit)} if through == "CUDA_HOME" else {"PATH": path}
    succeed(build_wheel(source, tmp_path, CC="false", CXX="false", **found))
    assert report_of(tmp_path)["cuda"].startswith("could not be compiled: csrc/")
    assert report_of(tmp_path)["cuda"].endswith("out of order")
    for call in (old_toolkit / "calls").read_text(encoding="utf-8").splitlines():
        assert re.findall(r"-gencode=(\S+)", call) == [
            *(f"arch=compute_{chip},code=sm_{chip}" for chip in (80, 90)), "arch=compute_90,code=compute_90",
        ]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux only")
def test_chips_that_nvcc_does_not_know_are_named(source: Path, tmp_path: Path, old_toolkit: Path) -> None:
    chosen = {"CUDA_HOME": str(old_toolkit), "ROBUST_DPO_CUDA_ARCHS": "9.0 sm_120"}
    succeed(build_wheel(source, tmp_path, CC="false", CXX="false", **chosen))
    assert report_of(tmp_path)["cuda"] == f"could not be compiled: {old_toolkit}/bin/nvcc knows no sm_120"


def report_of(folder: Path) -> dict[str, str]:
    """What became of the extensions, from the one wheel in a folder."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        report: dict[str, str] = json.loads(archive.read("robust_dpo/_build.json"))
    return report


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize(
    ("unknown", "left"),
    [("-mavx512bf16", ["generic", "avx2", "avx512"]), ("-mavx2", ["generic"])],
)
def test_a_flag_that_the_compiler_does_not_know_costs_its_instruction_sets_only(
    source: Path, tmp_path: Path, unknown: str, left: list[str]
) -> None:
    old_compiler = tmp_path / "old-c++"
    old_compiler.write_text(f'#!/bin/sh\ncase " $* " in *" {unknown} "*) exit 1;; esac\nexec c++ "$@"\n')
    old_compiler.chmod(0o755)
    succeed(build_wheel(source, tmp_path, CC=str(old_compiler), CXX=str(old_compiler), ROBUST_DPO_BUILD="cpu"))
    (wheel,) = tmp_path.glob("*.whl")
    installed = unpack(wheel, tmp_path / "installed")
    report = json.loads((installed / "robust_dpo" / "_build.json").read_text(encoding="utf-8"))
    missing = [name for name in ("avx2", "avx512", "avx512_bf16") if name not in left]
    assert report["cpu"] == f"built without {', '.join(missing)}: the compiler does not know the flags"
    code = """
    import torch
    from robust_dpo.kernels.row_logprob_cpu import row_logprob, usable_isas
    from robust_dpo.kernels.linear_head_cpu import unsupported_reason
    print(*usable_isas())
    print(row_logprob(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)).logp.item())
    print(unsupported_reason(torch.bfloat16))
    """
    isas, logp, reason = run_installed(installed, code)
    # this machine may lack some of those that were built
    assert isas.split() == left[: len(isas.split())]
    assert float(logp) == pytest.approx(-1.3862944)
    assert reason.startswith("it ")


def check_without_extension(installed: Path, reason: str) -> None:
    code = """
    import torch
    from robust_dpo.dispatch import backends, get_row_logprob
    report = backends()
    print(report["cpu"])
    assert report["torch"].usable and not report["cpu"].usable
    launcher = get_row_logprob("auto", "cpu", torch.float32)
    assert launcher.__module__.endswith("row_logprob_torch")
    print(launcher(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)).logp.item())
    try:
        get_row_logprob("cpu", "cpu", torch.float32)
    except RuntimeError as error:
        print(error)
    """
    out = run_installed(installed, code)
    assert "not built" in out[0]
    assert reason in out[0]
    assert float(out[1]) == pytest.approx(-1.3862944)
    assert out[2].startswith("backend 'cpu' cannot run row_logprob with torch.float32 on cpu: it is not built here")


def test_cpu_without_a_compiler_fails_loudly(source: Path, tmp_path: Path) -> None:
    done = build_wheel(source, tmp_path, CC="false", CXX="false", ROBUST_DPO_BUILD="cpu")
    assert done.returncode != 0
    assert "robust_dpo._cpu could not be compiled: " in done.stdout + done.stderr
