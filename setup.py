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

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))  # where an isolated build does not look

from build_support.build_native import BuildNative
from build_support.extensions import extensions
from build_support.settings import build_mode, wanted_archs

wanted_archs()  # a wrong value fails at once, whatever is built
setup(
    # robust_dpo/kernels links to the top-level folder, which has no __init__.py: a top-level package named `kernels`
    # would shadow the one that transformers imports.
    packages=[*find_packages(include=["robust_dpo", "robust_dpo.*"]), "robust_dpo.kernels"],
    ext_modules=extensions(build_mode()),
    cmdclass={"build_ext": BuildNative},
)
