"""What setup.py decides about CUDA: the toolkit, the chips, the host compiler; what a build leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setup_module import ROOT, build_module

extensions, settings, toolkits = (build_module(name) for name in ("extensions", "settings", "toolkit"))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux only")
WORKS = "case $1 in --version) echo 'release 12.4, V12.4.131';; *) echo compute_80; echo compute_90;; esac"
NVIDIA = ("bin", "include", "lib64")
CONDA = ("bin", toolkits.CUDA_INCLUDES[-1], toolkits.CUDA_LIBRARIES[-1])
DEBIAN = ("bin", "include", toolkits.CUDA_LIBRARIES[2])


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def toolkit(home: Path, script: str = WORKS, layout: tuple[str, str, str] = NVIDIA) -> Path:
    """A toolkit whose compiler is a script."""
    binaries, include, libraries = (home / folder for folder in layout)
    executable(binaries / "nvcc", script)
    for file in (include / "cuda_runtime.h", libraries / "libcudart_static.a"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return home


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "ROBUST_DPO_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("layout", [NVIDIA, CONDA, DEBIAN], ids=["nvidia", "conda", "debian"])
def test_toolkits_of_every_maker_are_found(
    layout: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = toolkit(tmp_path / "home", layout=layout)
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = toolkits.find_toolkit()
    assert (found.nvcc, found.include, found.libraries) == (home / "bin/nvcc", home / layout[1], home / layout[2])
    assert (found.version, found.archs) == ("12.4.131", ("80", "90"))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'no libdevice' >&2; exit 3", "bin/nvcc fails with status 3: no libdevice"),
        ("echo 'release 11.8, V11.8.89'", r"bin/nvcc is of CUDA 11.8.89, 12.0 is the oldest that will do"),
        ("echo hello", "bin/nvcc --version names no release"),
    ],
    ids=["broken", "old", "another"],
)
def test_a_toolkit_that_will_not_do_gives_way_to_the_next(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = toolkit(tmp_path / "bad", script), toolkit(tmp_path / "good")
    monkeypatch.setattr(toolkits, "toolkit_homes", lambda: [bad, good])
    assert toolkits.find_toolkit().nvcc == good / "bin/nvcc"
    monkeypatch.setattr(toolkits, "toolkit_homes", lambda: [bad])
    with pytest.raises(toolkits.CompileError, match=why):
        toolkits.find_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(bad))  # nothing else will do where one is named
    with pytest.raises(toolkits.CompileError, match=f"CUDA_HOME={bad}: .*{why}"):
        toolkits.find_toolkit()


def test_a_compiler_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    home = toolkit(tmp_path)
    (home / "bin/nvcc").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(toolkits.CompileError, match=r"bin/nvcc cannot be run: .*Exec format error"):
        toolkits.toolkit_in(home)


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("bin/nvcc", "no nvcc"),
        ("include/cuda_runtime.h", "no cuda_runtime.h"),
        ("lib64/libcudart_static.a", "no libcudart_static.a"),
    ],
)
def test_what_is_missing_is_named(file: str, missing: str, tmp_path: Path) -> None:
    (toolkit(tmp_path) / file).unlink()
    with pytest.raises(toolkits.CompileError) as caught:
        toolkits.toolkit_in(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds {missing}"


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", None),
        (" ; ", None),
        ("90;80;", ("80", "90")),
        (" 9.0+PTX", ("90",)),
        ("8.0;9.0+PTX, sm_120", ("80", "90", "120")),
    ],
)
def test_chips_are_read_as_others_write_them(
    text: str, archs: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_DPO_CUDA_ARCHS", text)
    assert settings.wanted_archs() == archs


@pytest.mark.parametrize(
    ("cxx", "compiler"),
    [
        (None, None),
        ("", None),
        (" ", None),
        ("g++ -pthread", "g++"),
        ("ccache '/opt/my gcc/g++' -m64", "/opt/my gcc/g++"),
    ],
)
def test_nvcc_is_given_the_compiler_of_cxx(
    cxx: str | None, compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    assert settings.host_compiler() == compiler


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """setup.py over sources that are compiled in a moment, and a toolkit whose compiler writes its own version down."""
    source = tmp_path / "tree"
    (source / "csrc").mkdir(parents=True)
    (source / "robust_dpo").mkdir()
    (source / "robust_dpo/__init__.py").touch()
    (source / "robust_dpo/kernels").mkdir()
    shutil.copy(ROOT / "setup.py", source)
    shutil.copytree(ROOT / "build_support", source / "build_support")
    (source / "pyproject.toml").write_text('[project]\nname = "robust_dpo"\nversion = "0"\n', encoding="utf-8")
    of_isas = [file for _, sources in extensions.ISAS.values() for file in sources]
    for file in {*extensions.CPU_SOURCES, *extensions.CUDA_SOURCES, *of_isas}:
        (source / file).touch()
    module = "#include <Python.h>\nPyMODINIT_FUNC PyInit_{}() {{ return nullptr; }}\n"
    (source / "csrc/bindings.cpp").write_text(module.format("_cpu"), encoding="utf-8")
    (source / "csrc/cuda_bindings.cpp").write_text(
        module.format("_cuda") + 'extern "C" const char* const architectures = ROBUST_DPO_CUDA_ARCHITECTURES;\n',
        encoding="utf-8",
    )
    (source / "csrc/kernel.cu").touch()
    compiles = 'case $1 in --*) ;; *) for o; do :; done; : | ${CXX:-g++} -x c++ -c - -o "$o";; esac'
    home = toolkit(tmp_path / "toolkit", f"{WORKS}\n{compiles}")
    (home / "lib64/libcudart_static.a").unlink()
    subprocess.run(["ar", "rc", str(home / "lib64/libcudart_static.a")], check=True)
    return source


def run_build(tree: Path, **variables: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """What the report says, and the extensions in the folder that a wheel would be made of."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=tree,
        env=os.environ | {"CUDA_HOME": str(tree.parent / "toolkit")} | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (package,) = tree.glob("build/lib.*/robust_dpo")
    found = {path.name.partition(".")[0]: path.read_bytes() for path in package.glob("*.so")}
    return json.loads((package / "_build.json").read_text(encoding="utf-8")), found


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("ar") is None, reason="needs g++ and ar")
def test_nothing_of_an_earlier_build_is_packaged(tree: Path) -> None:
    for chip in ("90", "80", "90"):
        report, found = run_build(tree, ROBUST_DPO_CUDA_ARCHS=chip)
        assert report == {"cpu": "built", "cuda": f"built for sm_{chip}, compute_{chip}"}
        assert f"sm_{chip} compute_{chip}".encode() in found["_cuda"]
    report, found = run_build(tree, ROBUST_DPO_BUILD="cpu")
    assert report["cuda"] == "left out by ROBUST_DPO_BUILD" and set(found) == {"_cpu"}
    run_build(tree)
    report, found = run_build(tree, CUDA_HOME="/nowhere", CXX="")
    assert report["cpu"] == "built" and "CUDA_HOME=/nowhere: /nowhere holds no nvcc" in report["cuda"]
    assert set(found) == {"_cpu"}


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("ar") is None, reason="needs g++ and ar")
def test_what_cannot_be_linked_is_not_called_built(tree: Path) -> None:
    (tree.parent / "toolkit/lib64/libcudart_static.a").write_text("no archive", encoding="utf-8")
    report, found = run_build(tree)
    assert report["cpu"] == "built" and set(found) == {"_cpu"}
    assert report["cuda"].startswith("could not be compiled: ")
