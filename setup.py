"""Builds robust_dpo and its native CPU extension.

The extension neither includes nor links torch, so an isolated build needs a C++17 compiler and pybind11 only.

ROBUST_DPO_BUILD chooses what is built:
    auto   (default) the CPU extension; if it cannot be compiled, go on without it and say so
    cpu    the CPU extension, or fail
    none   no native code; everything runs on the torch backend
    cuda   fails: this release has no CUDA kernels
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError

MODES = ("auto", "cpu", "cuda", "none")
CPU_EXTENSION = "robust_dpo._cpu"
# What became of the extension, beside the package, for robust_dpo.backends() to quote.
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


def build_mode() -> str:
    mode = os.environ.get("ROBUST_DPO_BUILD", "auto")
    if mode not in MODES:
        raise BaseError(f"ROBUST_DPO_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda":
        raise BaseError("ROBUST_DPO_BUILD=cuda: CUDA kernels are not part of this release; use auto, cpu or none")
    return mode


def cpu_extension(optional: bool) -> Pybind11Extension:
    with_isas = X86_64 and GNU_LIKE
    extension = Pybind11Extension(
        CPU_EXTENSION,
        CPU_SOURCES,
        depends=[str(path) for path in sorted(Path("csrc").glob("*")) if path.suffix in (".h", ".cpp")],
        cxx_std=17,
        define_macros=[("ROBUST_DPO_X86", "1")] if with_isas else [],
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"] if GNU_LIKE else [],
        libraries=["dl", "pthread"] if sys.platform == "linux" else [],
    )
    extension.optional = optional
    extension.isas = ISAS if with_isas else {}
    return extension


class BuildCpu(build_ext):
    """Compiles each instruction set with its own flags, and writes down what became of the extension."""

    def build_extension(self, ext: Any) -> None:
        report = {"cpu": "built"}
        try:
            known = [name for name, (flags, _) in ext.isas.items() if self.knows(flags)]
            unknown = [name for name in ext.isas if name not in known]
            if unknown:
                report["cpu"] += f" without {', '.join(unknown)}: the compiler does not know the flags"
                self.warn(f"{ext.name}: {report['cpu']}")
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
            super().build_extension(ext)
        except (BaseError, CompileError) as error:
            report["cpu"] = f"could not be compiled: {error}"
            raise CompileError(f"{CPU_EXTENSION} could not be compiled: {error}") from error
        finally:
            self.write_report(report)

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

    def write_report(self, report: dict[str, str]) -> None:
        folders = [Path(self.build_lib, "robust_dpo")]
        if self.editable_mode or self.inplace:
            folders.append(Path("robust_dpo"))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BUILD_REPORT).write_text(json.dumps(report) + "\n", encoding="utf-8")


mode = build_mode()
setup(
    # robust_dpo/kernels links to the top-level folder, which has no __init__.py: a top-level package named `kernels`
    # would shadow the one that transformers imports.
    packages=[*find_packages(include=["robust_dpo", "robust_dpo.*"]), "robust_dpo.kernels"],
    ext_modules=[] if mode == "none" else [cpu_extension(optional=mode == "auto")],
    cmdclass={"build_ext": BuildCpu},
)
