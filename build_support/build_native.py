"""The command that compiles the extensions and writes down what became of them."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError
from setuptools.modified import newer_group

from build_support.extensions import CPU_EXTENSION, CUDA_EXTENSION
from build_support.settings import host_compiler, wanted_archs
from build_support.toolkit import Toolkit, find_toolkit, run_nvcc

# What became of the extensions, beside the package, for robust_dpo.backends() to quote.
BUILD_REPORT = "_build.json"

DEFAULT_CUDA_ARCHS = ("80", "90", "100", "120")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]


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
