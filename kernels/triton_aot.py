"""Ahead-of-time compilation of Triton kernels, and what the compiler made of them.

Needs no GPU. Triton decides when it is imported whether kernels are interpreted: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelInterface

from robust_dpo.errors import argument_error
from robust_dpo.kernels.triton_assembly import AMDGCN, PTX, Access, global_accesses

# What one request of a thread can move at most on sm_80 and sm_90; narrower ones need more instructions for the bytes.
FULL_WIDTH = 16
MAX_THREADS = 1024


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel that a launcher can use.

    Args:
        name: for people, such as "row_logprob bf16, gradient in place, softcap".
        kernel: the `@triton.jit` function.
        arguments: runtime parameter -> Triton type ("*bf16", "i64", "fp32").
        constants: constexpr parameter -> value; None for absent pointers too.
        divisible: runtime parameters that are multiples of 16 (aligned pointers, strides).
        options: num_warps, num_stages, ….
        hot: must not spill, and its loops must load at least 16 bytes at a time.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    divisible: frozenset[str]
    options: Mapping[str, int]
    hot: bool


@dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Args:
        name: "sm_90", "gfx942".
        backend: Triton's name of the compiler, "cuda" or "hip".
        arch: Triton's name of the chip.
        warp_size: threads that run in step.
        shared_limit: bytes of shared memory that one program may have.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("sm_120", "cuda", 120, 32, 99 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one variant for one target.

    Args:
        kernel: name of the function.
        variant: name of the variant.
        target: name of the target.
        hot: of the variant.
        num_warps: of a program.
        registers: of a thread (on AMD vector registers, accumulators included).
        scalar_registers: of a wavefront on AMD, 0 elsewhere.
        local_bytes: off-chip memory of a thread, for spilled registers and stack.
        spill_bytes: that one pass through the code moves to and from there; on AMD the size of the spilled registers.
        shared_bytes: of a program.
        loop_loads: bytes of a load from global memory inside a loop -> number of such instructions.
        other_loads: the same outside of loops.
        loop_stores: of stores inside a loop.
        other_stores: of stores outside of loops.
        offset_bits: pointer argument -> bits of the narrowest integer that is added to it.
        seconds: that compilation took; little where Triton had it in its cache.
    """

    kernel: str
    variant: str
    target: str
    hot: bool
    num_warps: int
    registers: int
    scalar_registers: int
    local_bytes: int
    spill_bytes: int
    shared_bytes: int
    loop_loads: Mapping[int, int]
    other_loads: Mapping[int, int]
    loop_stores: Mapping[int, int]
    other_stores: Mapping[int, int]
    offset_bits: Mapping[str, int]
    seconds: float

    def problems(self) -> list[str]:
        """Why this must not ship; empty where all is well. Spills and narrow loads matter in hot kernels only."""
        found = []
        limit = TARGETS[self.target].shared_limit
        if self.shared_bytes > limit:
            found.append(f"needs {self.shared_bytes} bytes of shared memory, the chip gives {limit}")
        # The 512 × 32 (AMD: 512 × 64) registers of each of the four schedulers go to warps in units of 8 per thread.
        per_scheduler = -(-self.registers // 8) * 8 * -(-self.num_warps // 4)
        if per_scheduler > 512:
            found.append(f"{self.registers} registers × {self.num_warps} warps do not fit into a multiprocessor")
        if self.hot and (self.local_bytes or self.spill_bytes):
            found.append(f"spills: {self.local_bytes} bytes of local memory, {self.spill_bytes} bytes moved")
        narrow = {width: count for width, count in self.loop_loads.items() if width < FULL_WIDTH}
        if self.hot and narrow:
            loads = ", ".join(f"{count} of {width} bytes" for width, count in sorted(narrow.items()))
            found.append(f"loads narrower than {FULL_WIDTH} bytes in a loop: {loads}")
        return found


def kernel_modules() -> list[str]:
    """Names of the modules that hold Triton kernels."""
    folder = Path(__file__).parent
    return [f"robust_dpo.kernels.{path.stem}" for path in sorted(folder.glob("*_triton.py"))]


def variants_of(module: str) -> list[Variant]:
    """What a module's `aot_variants()` lists; modules without kernels (functions that kernels call) have none.

    Raises:
        ValueError: the list leaves out a kernel (a function named `…_kernel`) of the module, or names a variant twice.
    """
    loaded = importlib.import_module(module)
    kernels = {
        name
        for name, value in vars(loaded).items()
        if name.endswith("_kernel") and isinstance(value, KernelInterface) and value.fn.__module__ == module
    }
    variants: list[Variant] = getattr(loaded, "aot_variants", list)()
    if missing := kernels - {variant.kernel.__name__ for variant in variants}:
        raise argument_error(f"{module}.aot_variants", "at least one variant of every kernel", f"none of {missing}")
    if twice := [name for name, count in Counter(variant.name for variant in variants).items() if count > 1]:
        raise argument_error(f"{module}.aot_variants", "a name of its own for every variant", twice)
    return variants


def compile_variant(variant: Variant, target: Target) -> CompileReport:
    """Compile for a chip that need not be here, and read what came out.

    Raises:
        ValueError: the variant does not fit its kernel, or kernels are interpreted.
        triton.errors.TritonError, RuntimeError: it does not compile.
    """
    _check(variant)
    names = variant.kernel.arg_names
    num_warps = min(variant.options.get("num_warps", 4), MAX_THREADS // target.warp_size)
    source = ASTSource(
        variant.kernel,
        signature={name: variant.arguments.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    start = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        # Fused multiply-add is the default; newer versions warn where it is not asked for.
        options={"enable_fp_fusion": True, **variant.options, "num_warps": num_warps},
    )
    seconds = time.perf_counter() - start
    if target.backend == "hip":
        resources = _amd_resources(compiled.asm["amdgcn"])
        accesses = global_accesses(compiled.asm["amdgcn"], AMDGCN)
    else:
        resources = _nvidia_resources(compiled.asm["cubin"])
        accesses = global_accesses(compiled.asm["ptx"], PTX)
    return CompileReport(
        kernel=variant.kernel.__name__,
        variant=variant.name,
        target=target.name,
        hot=variant.hot,
        num_warps=num_warps,
        shared_bytes=compiled.metadata.shared,
        loop_loads=_widths(accesses, "load", in_loop=True),
        other_loads=_widths(accesses, "load", in_loop=False),
        loop_stores=_widths(accesses, "store", in_loop=True),
        other_stores=_widths(accesses, "store", in_loop=False),
        offset_bits=_offset_bits(compiled.asm["ttir"]),
        seconds=seconds,
        **resources,
    )


def _check(variant: Variant) -> None:
    if not isinstance(variant.kernel, JITFunction):
        raise argument_error(
            "variant.kernel", "a compiled @triton.jit function (unset TRITON_INTERPRET)", variant.kernel
        )
    given = sorted([*variant.arguments, *variant.constants])
    if given != sorted(variant.kernel.arg_names):
        raise argument_error(
            f"variant {variant.name!r}", f"each parameter once, {sorted(variant.kernel.arg_names)}", given
        )
    if not variant.divisible <= set(variant.arguments):
        raise argument_error(f"variant {variant.name!r}", "divisible ⊆ arguments", sorted(variant.divisible))


def _widths(accesses: list[Access], kind: str, *, in_loop: bool) -> dict[int, int]:
    counts = Counter(each.width for each in accesses if each.kind == kind and each.in_loop == in_loop)
    return dict(sorted(counts.items()))


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _cuobjdump("-res-usage", file.name))
        registers, stack, local = (max(map(int, column)) for column in zip(*usage, strict=True))
        spill_bytes = 0
        if stack + local:  # disassembly takes half a second, and there is nothing to find in most kernels
            moved = re.findall(r"\b(?:LDL|STL)([.\w]*) ", _cuobjdump("-sass", file.name))
            spill_bytes = sum(_sass_width(modifiers) for modifiers in moved)
    return {
        "registers": registers,
        "scalar_registers": 0,
        "local_bytes": stack + local,
        "spill_bytes": spill_bytes,
    }


def _sass_width(modifiers: str) -> int:
    """Bytes that an instruction with these modifiers (".LU.64") moves; one register where they do not say."""
    return next((int(bits) // 8 for bits in re.findall(r"\.[SU]?(8|16|64|128)(?!\d)", modifiers)), 4)


def _cuobjdump(*arguments: str) -> str:
    """Output of the tool that comes with Triton."""
    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_resources(assembly: str) -> dict[str, int]:
    found = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return {
        "registers": found["vgpr_count"],
        "scalar_registers": found["sgpr_count"],
        "local_bytes": found["private_segment_fixed_size"],
        "spill_bytes": 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"]),
    }


def _offset_bits(ttir: str) -> dict[str, int]:
    """Of each pointer argument, the narrowest offset that is added to it."""
    argument_of = {name: name for name in re.findall(r"%(\w+): !tt\.ptr", ttir)}
    bits: dict[str, int] = {}
    for result, operation, operands, types in re.findall(r"%(\w+) = tt\.(splat|addptr) (.*?) : (.*?) loc", ttir):
        pointer = argument_of.get(operands.split(",")[0].lstrip("%"))
        if pointer is None:
            continue
        if operation == "splat":
            argument_of[result] = pointer
        else:
            width = int(types.rstrip(">").rpartition("i")[2])
            bits[pointer] = min(width, bits.get(pointer, width))
    return bits
