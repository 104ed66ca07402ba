"""The native extensions, one for the CPU and one for NVIDIA GPUs: their sources and how these are compiled."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension

CPU_EXTENSION = "robust_dpo._cpu"
CUDA_EXTENSION = "robust_dpo._cuda"

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


def extensions(mode: str) -> list[Pybind11Extension]:
    found = []
    if mode != "none":
        found.append(cpu_extension(optional=mode == "auto"))
    if mode == "cuda" or (mode == "auto" and sys.platform == "linux"):
        found.append(cuda_extension(optional=mode == "auto"))
    return found


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


def headers() -> list[str]:
    return [str(path) for path in sorted(Path("csrc").glob("*")) if path.suffix in (".h", ".cuh")]
