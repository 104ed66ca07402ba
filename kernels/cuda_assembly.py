"""What the compiler made of the CUDA kernels: registers, spills and the width of memory accesses, read from a binary.

Needs cuobjdump (of a CUDA toolkit, or the one that comes with Triton), no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What one request of a thread can move at most on sm_80 and sm_90; narrower ones need more instructions for the bytes.
FULL_WIDTH = 16
# Kernels that move most of the bytes must not spill, and their loops must load FULL_WIDTH bytes at a time. With a bias
# or a softcap (the second template argument) the row kernel also loads the bias, which begins anywhere.
HOT = re.compile(r"row_logprob_kernel<[^,]+, (?:\(bool\)0|false), |rescale_kernel<")

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_ARCH = re.compile(r"^arch = (sm_\d+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class KernelReport:
    """One kernel for one chip.

    Args:
        kernel: its name, without namespaces.
        chip: such as "sm_90".
        registers: of a thread.
        local_bytes: off-chip memory of a thread, for spilled registers and stack.
        spill_instructions: that move registers to and from there.
        loop_loads: bytes of a load from global memory inside a loop -> number of such instructions.
        other_loads: the same outside of loops.
    """

    kernel: str
    chip: str
    registers: int
    local_bytes: int
    spill_instructions: int
    loop_loads: Mapping[int, int]
    other_loads: Mapping[int, int]

    @property
    def hot(self) -> bool:
        """Whether it moves most of the bytes."""
        return HOT.search(self.kernel) is not None

    def problems(self) -> list[str]:
        """Why this must not ship; empty where all is well. Spills and narrow loads matter in hot kernels only."""
        found = []
        if self.hot and (self.local_bytes or self.spill_instructions):
            moved = f"{self.spill_instructions} instructions move it"
            found.append(f"spills: {self.local_bytes} bytes of local memory, {moved}")
        if self.hot and not self.loop_loads:
            found.append("no loads in a loop, where there must be some")
        narrow = {width: count for width, count in self.loop_loads.items() if width < FULL_WIDTH}
        if self.hot and narrow:
            loads = ", ".join(f"{count} of {width} bytes" for width, count in sorted(narrow.items()))
            found.append(f"loads narrower than {FULL_WIDTH} bytes in a loop: {loads}")
        return found


def find_cuobjdump() -> str | None:
    """The tool: on the PATH, in a CUDA toolkit, or in Triton's package."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [str(Path(home, "bin")) for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))


def reports_of(binary: Path) -> list[KernelReport]:
    """Of every kernel in an extension or object file, for every chip that it has machine code for.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        subprocess.CalledProcessError: it cannot read the file.
    """
    usage = {
        (chip, name): (int(registers), int(stack) + int(local))
        for chip, text in _by_chip(_cuobjdump("-res-usage", binary))
        for name, registers, stack, local in _USAGE.findall(text)
    }
    names = _readable([name for _, name in usage])
    return [
        read_kernel(names[name], chip, code, *usage[chip, name])
        for chip, text in _by_chip(_cuobjdump("-sass", binary))
        for name, code in _functions(text)
    ]


def read_kernel(name: str, chip: str, code: str, registers: int, local_bytes: int) -> KernelReport:
    """From a disassembled function and the numbers that the compiler left with it."""
    instructions = [(int(address, 16), opcode, rest) for address, opcode, rest in _INSTRUCTION.findall(code)]
    loops = [
        (int(target[1], 16), address)
        for address, opcode, rest in instructions
        if opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) <= address
    ]
    # A kernel ends with a jump to itself behind its last instruction; that is no loop.
    loops = [(first, last) for first, last in loops if first < last]
    inside: Counter[int] = Counter()
    outside: Counter[int] = Counter()
    for address, opcode, _ in instructions:
        if opcode.startswith("LDG"):
            in_loop = any(first <= address <= last for first, last in loops)
            (inside if in_loop else outside)[_width(opcode)] += 1
    spilled = sum(opcode.startswith(("LDL", "STL")) for _, opcode, _ in instructions)
    return KernelReport(name, chip, registers, local_bytes, spilled, dict(inside), dict(outside))


def _width(opcode: str) -> int:
    """Bytes that an instruction ("LDG.E.128.CONSTANT") moves; one register where it does not say."""
    return next((int(bits) // 8 for bits in re.findall(r"\.[SU]?(8|16|64|128|256)(?!\d)", opcode)), 4)


def _by_chip(text: str) -> Iterator[tuple[str, str]]:
    pieces = _ARCH.split(text)[1:]
    return zip(pieces[::2], pieces[1::2], strict=True)


def _functions(text: str) -> Iterator[tuple[str, str]]:
    pieces = _FUNCTION.split(text)[1:]
    return zip(pieces[::2], pieces[1::2], strict=True)


def _cuobjdump(option: str, binary: Path) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on the PATH, nor in CUDA_HOME, nor does Triton bring it")
    return subprocess.run([tool, option, str(binary)], capture_output=True, text=True, check=True).stdout


def _readable(names: list[str]) -> dict[str, str]:
    """Mangled names -> as C++ writes them, without namespaces and parameters; as they are where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _short(text) for name, text in zip(names, done.stdout.splitlines(), strict=True)}


def _short(text: str) -> str:
    text = re.sub(r"\w+::|\(anonymous namespace\)::", "", text).removeprefix("void ")
    end = text.rfind(">(") + 1 or text.find("(")
    return text[:end]
