"""The machine and the library versions that a table of measurements must name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("robust_dpo", "torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured.

    Args:
        cpu: model name, family and model number.
        instructions: vector extensions that matter for matrix products.
        cores: that this process may use.
        threads: used by every measured process.
        memory_gib: physical memory.
        load_before: one-minute load average before the run; above 1, other work disturbed the measurements.
        system: operating system and architecture.
        python: version.
        versions: of the measured libraries.
    """

    cpu: str
    instructions: list[str]
    cores: int
    threads: int
    memory_gib: float
    load_before: float
    system: str
    python: str
    versions: dict[str, str]

    @property
    def sentence(self) -> str:
        """Everything, for a table's caption."""
        libraries = ", ".join(f"{library} {version}" for library, version in self.versions.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, {', '.join(self.instructions)}, "
            f"{self.memory_gib:.1f} GiB, {self.system}, load {self.load_before:.2f} before the run; "
            f"Python {self.python}, {libraries}."
        )


def _cpu_fields() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(threads: int) -> Machine:
    """This machine, now."""
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Machine(
        cpu=f"{name} ({family})" if family else name,
        instructions=[flag for flag in _INSTRUCTIONS if flag in flags],
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        load_before=os.getloadavg()[0],
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={library: found for library in LIBRARIES if (found := _version(library))},
    )
