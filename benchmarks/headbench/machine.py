"""The machine and the library versions that a table of measurements must name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

LIBRARIES = ("robust_dpo", "torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


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


def describe_machine(threads: int) -> dict[str, object]:
    """CPU, cores, memory, load and versions; the load says whether the measurements were disturbed."""
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {
        "cpu": f"{name} ({family})" if family else name,
        "instructions": [flag for flag in _INSTRUCTIONS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {library: found for library in LIBRARIES if (found := _version(library))},
        "gemm_libraries": [
            name
            for name, present in {
                "MKL": torch.backends.mkl.is_available(),
                "oneDNN": torch.backends.mkldnn.is_available(),
            }.items()
            if present
        ],
    }


def machine_line(machine: dict[str, object]) -> str:
    """One sentence for a table's caption."""
    versions = machine["versions"]
    assert isinstance(versions, dict)
    libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
    instructions = machine["instructions"]
    assert isinstance(instructions, list)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {', '.join(instructions)}, "
        f"{machine['memory_gib']} GiB, {machine['system']}, load {machine['load_before']} before the run; "
        f"Python {machine['python']}, {libraries}."
    )
