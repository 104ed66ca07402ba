"""CUDA toolkits: where they are, whether they will do, and their compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

OLDEST_NVCC = (12, 0)
# Where the toolkits of NVIDIA, of conda (targets) and of Debian (home /usr, multiarch) keep headers and libraries.
CUDA_TARGETS = {"x86_64": ("x86_64-linux",), "aarch64": ("sbsa-linux", "aarch64-linux")}.get(platform.machine(), ())
CUDA_INCLUDES = ("include", *(f"targets/{target}/include" for target in CUDA_TARGETS))
CUDA_LIBRARIES = (
    *("lib64", "lib", f"lib/{sysconfig.get_config_var('MULTIARCH')}"),
    *(f"targets/{target}/lib" for target in CUDA_TARGETS),
)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit.

    Args:
        nvcc: the compiler.
        include: folder of cuda_runtime.h.
        libraries: folder of libcudart_static.a.
        version: of the compiler, such as "13.0.88".
        archs: compute capabilities that the compiler knows, such as "90".
    """

    nvcc: Path
    include: Path
    libraries: Path
    version: str
    archs: tuple[str, ...]


def find_toolkit() -> Toolkit:
    """The toolkit to build with.

    Raises:
        CompileError: there is none, or none that can be used; says what is wrong with each.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wrong = []
    for home in [Path(named)] if named else toolkit_homes():
        try:
            return toolkit_in(home)
        except CompileError as error:
            wrong.append(f"CUDA_HOME={named}: {error}" if named else str(error))
    nothing = "no CUDA toolkit (nvcc) was found through CUDA_HOME, on the PATH or in /usr/local/cuda*"
    raise CompileError("; ".join(wrong) or nothing)


def toolkit_homes() -> list[Path]:
    """Folders of toolkits, those to be preferred first."""
    on_path = shutil.which("nvcc")
    # A link may lead from a toolkit to another folder, or from another folder to a toolkit.
    found = [nvcc.parents[1] for nvcc in (Path(on_path), Path(on_path).resolve())] if on_path else []
    newest_first = sorted(Path("/usr/local").glob("cuda-*"), key=version_of, reverse=True)
    homes = dict.fromkeys([*found, Path("/usr/local/cuda"), *newest_first])
    return [home for home in homes if (home / "bin" / "nvcc").exists()]


def toolkit_in(home: Path) -> Toolkit:
    """The toolkit of a folder.

    Raises:
        CompileError: something is missing, or the compiler cannot be run or is too old.
    """
    nvcc = home / "bin" / "nvcc"
    include = folder_with(home, CUDA_INCLUDES, "cuda_runtime.h")
    libraries = folder_with(home, CUDA_LIBRARIES, "libcudart_static.a")
    if include is None or libraries is None or not nvcc.exists():
        parts = {"nvcc": nvcc.exists(), "cuda_runtime.h": include, "libcudart_static.a": libraries}
        raise CompileError(f"{home} holds {' and '.join(f'no {part}' for part, there in parts.items() if not there)}")
    version = re.search(r"release [\d.]+, V([\d.]+)", run_nvcc(nvcc, "--version"))
    if version is None:
        raise CompileError(f"{nvcc} --version names no release")
    if tuple(map(int, version[1].split(".")[:2])) < OLDEST_NVCC:
        raise CompileError(
            f"{nvcc} is of CUDA {version[1]}, {'.'.join(map(str, OLDEST_NVCC))} is the oldest that will do"
        )
    archs = re.findall(r"compute_(\d+)", run_nvcc(nvcc, "--list-gpu-arch"))
    return Toolkit(nvcc, include, libraries, version[1], tuple(archs))


def folder_with(home: Path, folders: Sequence[str], file: str) -> Path | None:
    return next((home / folder for folder in folders if (home / folder / file).exists()), None)


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    """What the compiler prints.

    Raises:
        CompileError: it cannot be run, or it fails; the message ends with what it said.
    """
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise CompileError(f"{nvcc} cannot be run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()[-2000:]
        raise CompileError(f"{nvcc} fails with status {done.returncode}: {said}")
    return done.stdout


def version_of(folder: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", folder.name))
