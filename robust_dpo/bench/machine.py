"""The machine and the library versions that a table of measurements must name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

LIBRARIES = (
    "robust_dpo",
    "torch",
    "triton",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "transformers",
)
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Accelerator:
    """A GPU.

    Args:
        name: as the driver calls it.
        architecture: such as sm_90 or gfx942.
        driver: version of the kernel driver, "unknown" where nothing tells.
        runtime: CUDA or ROCm that torch was built for.
        memory_gib: of the device.
        processors: streaming multiprocessors or compute units.
    """

    name: str
    architecture: str
    driver: str
    runtime: str
    memory_gib: float
    processors: int

    @property
    def sentence(self) -> str:
        return (
            f"{self.name} ({self.architecture}, {self.processors} multiprocessors, {self.memory_gib:.0f} GiB), driver "
            f"{self.driver}, {self.runtime}"
        )


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured.

    Args:
        accelerator: the GPU that was measured, None for the CPU.
        cpu: model name, family and model number.
        instructions: vector extensions that matter for matrix products.
        cores: that this process may use.
        threads: used by every measured process.
        memory_gib: physical memory.
        load_before: one-minute load average before the run.
        system: operating system and architecture.
        python: version.
        versions: of the measured libraries.
    """

    accelerator: Accelerator | None
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
        gpu = "" if self.accelerator is None else f"{self.accelerator.sentence}; "
        return (
            f"{gpu}{self.cpu}, {self.cores} cores, {self.threads} threads, {', '.join(self.instructions)}, "
            f"{self.memory_gib:.1f} GiB, {self.system}, load {self.load_before:.2f} before the run; "
            f"Python {self.python}, {libraries}."
        )

    @property
    def busy(self) -> str | None:
        """What to say about measurements that other work disturbed: more than half of the cores had something to do."""
        if not self.load_before > self.cores / 2:
            return None
        return f"the machine was busy when the run began, load {self.load_before:.1f} on {self.cores} cores"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def why_no_gpu() -> str | None:
    """In torch's own words where it has some; None where there is a GPU."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"no GPU can be used: {str(error).strip().splitlines()[0]}"
    return "no GPU is visible"


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


def _driver() -> str:
    if _DRIVER.exists():
        # "… Kernel Module  550.54.15  …", or "… Open Kernel Module for x86_64  565.57.01  …"
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _DRIVER.read_text())
        if found:
            return found[1]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.split("\n")[0].strip() or "unknown"


def describe_accelerator(device: torch.device) -> Accelerator | None:
    """The GPU behind a torch device; None for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    rocm = torch.version.hip is not None
    return Accelerator(
        name=properties.name,
        architecture=properties.gcnArchName if rocm else f"sm_{properties.major}{properties.minor}",
        driver=_driver(),
        runtime=f"ROCm {torch.version.hip}" if rocm else f"CUDA {torch.version.cuda}",
        memory_gib=properties.total_memory / 2**30,
        processors=properties.multi_processor_count,
    )


def _memory_gib() -> float:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return float("nan")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe_machine(threads: int, device: torch.device | str = "cpu") -> Machine:
    """This machine, now."""
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Machine(
        accelerator=describe_accelerator(torch.device(device)),
        cpu=f"{name} ({family})" if family else name,
        instructions=[flag for flag in _INSTRUCTIONS if flag in flags],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        memory_gib=_memory_gib(),
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={library: found for library in LIBRARIES if (found := _version(library))},
    )
