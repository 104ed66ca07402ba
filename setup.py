"""Builds robust_dpo and its native extensions, one for the CPU and one for NVIDIA GPUs.

They neither include nor link torch, so an isolated build needs a C++17 compiler and pybind11, and for the second one
a CUDA toolkit (nvcc 12.0 or newer; no GPU, no driver). The CUDA runtime is linked statically.

ROBUST_DPO_BUILD chooses what is built:
    auto   (default) the CPU extension, and on Linux the CUDA extension where there is a toolkit; what cannot be
           compiled is left out, and backends() says why
    cpu    the CPU extension alone, or fail
    cuda   both, or fail
    none   no native code; everything runs on the torch and triton backends
CUDA_HOME names the toolkit; without it nvcc is looked for on the PATH and in /usr/local/cuda*, and the first toolkit is
taken that is complete and new enough.
ROBUST_DPO_CUDA_ARCHS chooses the chips, such as "80;90": by default those of 80, 90, 100 and 120 that nvcc knows. Code
for the newest of them is added in a form (PTX) that the driver compiles for chips that are newer still, so "9.0+PTX"
means the same as "90".
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError
from setuptools.modified import newer_group

MODES = ("auto", "cpu", "cuda", "none")
CPU_EXTENSION = "robust_dpo._cpu"
CUDA_EXTENSION = "robust_dpo._cuda"
# What became of the extensions, beside the package, for robust_dpo.backends() to quote.
BUILD_REPORT = "_build.json"

CPU_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/calibration_weights_cpu.cpp",
    "csrc/epilogue_bindings.cpp",
    "csrc/formulas_bindings.cpp",
    "csrc/group_epilogue_cpu.cpp",
    "csrc/head_bindings.cpp",
    "csrc/parallel.cpp",
    "csrc/row_logprob_generic.cpp",
]
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
GNU_LIKE = sys.platform != "win32"
# Instruction set -> flags and translation units of its own; the choice between them is made at run time.
# ROBUST_DPO_<NAME> is defined for those whose flags the compiler knows.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {
    "avx2": (AVX2, ["csrc/row_logprob_avx2.cpp"]),
    "avx512": (AVX512, ["csrc/row_logprob_avx512.cpp", "csrc/head_avx512.cpp"]),
    "avx512_bf16": (
        [*AVX512, "-mavx512bf16"],
        ["csrc/row_logprob_avx512_bf16.cpp", "csrc/head_avx512_bf16.cpp"],
    ),
}


CUDA_SOURCES = ["csrc/cuda_bindings.cpp", "csrc/row_logprob_cuda.cpp"]
DEFAULT_CUDA_ARCHS = ("80", "90", "100", "120")
OLDEST_NVCC = (12, 0)
# Where the toolkits of NVIDIA, of conda (targets) and of Debian (home /usr, multiarch) keep headers and libraries.
CUDA_TARGETS = {"x86_64": ("x86_64-linux",), "aarch64": ("sbsa-linux", "aarch64-linux")}.get(platform.machine(), ())
CUDA_INCLUDES = ("include", *(f"targets/{target}/include" for target in CUDA_TARGETS))
CUDA_LIBRARIES = (
    *("lib64", "lib", f"lib/{sysconfig.get_config_var('MULTIARCH')}"),
    *(f"targets/{target}/lib" for target in CUDA_TARGETS),
)
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]


def build_mode() -> str:
    mode = os.environ.get("ROBUST_DPO_BUILD", "auto")
    if mode not in MODES:
        raise BaseError(f"ROBUST_DPO_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def headers() -> list[str]:
    return [str(path) for path in sorted(Path("csrc").glob("*")) if path.suffix in (".h", ".cuh")]


def cpu_extension(optional: bool) -> Pybind11Extension:
    with_isas = X86_64 and GNU_LIKE
    extension = Pybind11Extension(
        CPU_EXTENSION,
        CPU_SOURCES,
        depends=headers(),
        cxx_std=17,
        define_macros=[("ROBUST_DPO_X86", "1")] if with_isas else [],
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"] if GNU_LIKE else [],
        libraries=["dl", "pthread"] if sys.platform == "linux" else [],
    )
    extension.optional = optional
    extension.isas = ISAS if with_isas else {}
    return extension


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


def host_compiler() -> str | None:
    """The C++ compiler of CXX, which may stand behind a launcher and before flags, such as "ccache g++ -pthread"."""
    words = itertools.takewhile(lambda word: not word.startswith("-"), shlex.split(os.environ.get("CXX", "")))
    return next(iter([*words][::-1]), None)


def version_of(folder: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", folder.name))


def wanted_archs() -> tuple[str, ...] | None:
    """What ROBUST_DPO_CUDA_ARCHS asks for, None where it is not set."""
    text = os.environ.get("ROBUST_DPO_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[;,\s]+", text) if name]
    if not names:
        return None
    archs = [name.removeprefix("sm_").removesuffix("+PTX").replace(".", "") for name in names]
    if not all(name.isdecimal() and int(name) >= 80 for name in archs):
        raise BaseError(f'ROBUST_DPO_CUDA_ARCHS: expected numbers from 80 on, such as "80;90", got {text!r}')
    return tuple(sorted(set(archs), key=int))


def cuda_extension(optional: bool) -> Pybind11Extension:
    extension = Pybind11Extension(
        CUDA_EXTENSION,
        CUDA_SOURCES,
        depends=headers(),
        cxx_std=17,
        extra_compile_args=["-O2"],
        # Static, so that importing needs neither a driver nor a CUDA runtime of a certain version.
        libraries=["cudart_static", "dl", "rt", "pthread"],
    )
    extension.optional = optional
    return extension


class BuildNative(build_ext):
    """Compiles what needs flags or a compiler of its own, and writes down what became of each extension."""

    def run(self) -> None:
        if not os.environ.get("CXX", "c++").strip():
            del os.environ["CXX"]  # no compiler has an empty name; setuptools would take it for one
        self.report = {"cpu": "left out by ROBUST_DPO_BUILD", "cuda": "left out by ROBUST_DPO_BUILD"}
        if sys.platform != "linux":
            self.report["cuda"] = "the CUDA kernels are built on Linux only"
        roots = [Path(self.build_lib), *([Path()] if self.editable_mode or self.inplace else [])]
        # What an earlier build left there may be for other chips, or of an extension that is now left out or fails.
        for root, name in itertools.product(roots, (CPU_EXTENSION, CUDA_EXTENSION)):
            (root / self.get_ext_filename(name)).unlink(missing_ok=True)
        try:
            if any(ext.name == CUDA_EXTENSION and not ext.optional for ext in self.extensions):
                find_toolkit()  # fails before the minutes that the CPU extension takes
            super().run()
        finally:
            for folder in (root / "robust_dpo" for root in roots):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / BUILD_REPORT).write_text(json.dumps(self.report) + "\n", encoding="utf-8")

    def build_extension(self, ext: Any) -> None:
        name = ext.name.rpartition("._")[2]
        build = {"cpu": self.compile_cpu, "cuda": self.compile_cuda}[name]
        try:
            details = build(ext)
            super().build_extension(ext)
            self.report[name] = f"built{details}"
        except (BaseError, CCompilerError) as error:  # the second: of compiling and of linking
            self.report[name] = f"could not be compiled: {error}"
            raise CompileError(f"{ext.name} could not be compiled: {error}") from error

    def compile_cpu(self, ext: Any) -> str:
        """Every instruction set with its own flags; says which are missing."""
        known = [name for name, (flags, _) in ext.isas.items() if self.knows(flags)]
        unknown = [name for name in ext.isas if name not in known]
        missing = f" without {', '.join(unknown)}: the compiler does not know the flags" if unknown else ""
        if missing:
            self.warn(f"{ext.name}: built{missing}")
        ext.define_macros += [(f"ROBUST_DPO_{name.upper()}", "1") for name in known]
        for flags, sources in (ext.isas[name] for name in known):
            ext.extra_objects += self.compiler.compile(
                sources,
                output_dir=self.build_temp,
                macros=ext.define_macros,
                debug=self.debug,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        return missing

    def compile_cuda(self, ext: Any) -> str:
        """The kernels by nvcc, side by side; says for which chips."""
        toolkit = find_toolkit()
        archs = wanted_archs() or tuple(arch for arch in DEFAULT_CUDA_ARCHS if arch in toolkit.archs)
        if unknown := [arch for arch in archs if arch not in toolkit.archs]:
            raise CompileError(f"{toolkit.nvcc} knows no {', '.join(f'sm_{arch}' for arch in unknown)}")
        if not archs:
            raise CompileError(f"{toolkit.nvcc} knows none of {', '.join(f'sm_{arch}' for arch in DEFAULT_CUDA_ARCHS)}")
        names = [*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"]
        ext.define_macros.append(("ROBUST_DPO_CUDA_ARCHITECTURES", f'"{" ".join(names)}"'))
        ext.include_dirs.append(str(toolkit.include))
        ext.library_dirs.append(str(toolkit.libraries))
        # Compiler and chips are part of the name, so that objects of others are not taken for these.
        folder = Path(self.build_temp, f"cuda-{toolkit.version}-{'-'.join(archs)}")
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*NVCC_FLAGS, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)]
        flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        if compiler := host_compiler():
            flags += ["-ccbin", compiler]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = sorted(Path("csrc").glob("*.cu"), key=lambda path: path.stat().st_size)
            objects = pool.map(lambda source: self.nvcc(toolkit, flags, source, folder, ext.depends), sources)
            ext.extra_objects += [str(path) for path in objects]
        return f" for {', '.join(names)}"

    def nvcc(self, toolkit: Toolkit, flags: Sequence[str], source: Path, folder: Path, depends: list[str]) -> Path:
        target = folder / f"{source.stem}.o"
        if self.force or newer_group([str(source), *depends], str(target)):
            target.unlink(missing_ok=True)  # neither a failure nor an interrupt may leave one that looks up to date
            try:
                run_nvcc(toolkit.nvcc, *flags, "-c", str(source), "-o", str(target))
            except CompileError as error:
                raise CompileError(f"{source}: {error}") from error
        return target

    def knows(self, flags: list[str]) -> bool:
        """Whether the compiler takes the flags (GCC 9 has no -mavx512bf16)."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text("#include <immintrin.h>\n", encoding="utf-8")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


def extensions(mode: str) -> list[Pybind11Extension]:
    found = []
    if mode != "none":
        found.append(cpu_extension(optional=mode == "auto"))
    if mode == "cuda" or (mode == "auto" and sys.platform == "linux"):
        found.append(cuda_extension(optional=mode == "auto"))
    return found


wanted_archs()  # a wrong value fails at once, whatever is built
setup(
    # robust_dpo/kernels links to the top-level folder, which has no __init__.py: a top-level package named `kernels`
    # would shadow the one that transformers imports.
    packages=[*find_packages(include=["robust_dpo", "robust_dpo.*"]), "robust_dpo.kernels"],
    ext_modules=extensions(build_mode()),
    cmdclass={"build_ext": BuildNative},
)
