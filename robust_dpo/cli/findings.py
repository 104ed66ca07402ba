"""What `robust-dpo doctor` found on this machine, and what to do about it."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robust_dpo.cli.live_checks import Health
    from robust_dpo.dispatch import BackendReport

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "scikit-learn",
    "scipy",
    "matplotlib",
    "rich",
    "typer",
    "numpy",
)
OPTIONAL = {
    "triton": "GPU kernels",
    "flash-attn": "packed attention on a GPU",
    "trl": "a peer in benchmarks",
    "liger-kernel": "a peer in benchmarks",
    "cut-cross-entropy": "a peer in benchmarks",
}


@functools.cache
def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def nvidia_driver_present() -> bool:
    """Whether an NVIDIA driver is installed, whatever torch makes of it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


@dataclass(frozen=True)
class Findings:
    """Everything that advice is drawn from.

    Args:
        report: of the backends.
        healths: of those that are usable, by name.
        gpu: whether torch can use a GPU.
        torch_has_gpu_code: whether this torch is built for one.
        driver_present: whether an NVIDIA driver is installed.
        missing: packages that are required and not there.
        optional: versions of the optional packages, None where not installed.
        system: operating system, as `platform.system()` has it.
        hidden_build: an installed package with native code that this one, a source tree without, stands in front of.
    """

    report: BackendReport
    healths: Mapping[str, Health]
    gpu: bool = False
    torch_has_gpu_code: bool = False
    driver_present: bool = False
    missing: tuple[str, ...] = ()
    optional: Mapping[str, str | None] = field(default_factory=dict)
    system: str = platform.system()
    hidden_build: Path | None = None

    @property
    def anything_runs(self) -> bool:
        """Whether one backend is usable and computes the right numbers."""
        return any(health.sound for health in self.healths.values())

    def advice(self) -> list[str]:
        """What would close the gaps, the most important first."""
        return [advice for rule in _RULES if (advice := rule(self)) is not None]


def _missing_packages(found: Findings) -> str | None:
    return f"missing packages: pip install {' '.join(found.missing)}" if found.missing else None


def _unsound_backends(found: Findings) -> str | None:
    unsound = [name for name, health in found.healths.items() if not health.sound]
    if not unsound:
        return None
    others = [name for name, health in found.healths.items() if health.sound]
    instead = f'; until then pass backend="{others[0]}"' if others else ""
    return f"{', '.join(unsound)} failed the check: reinstall robust-dpo, and report it with this screen{instead}"


def _native_cpu_code(found: Findings) -> str | None:
    status = {each.name: each for each in found.report.backends}.get("cpu")
    if status is None or status.built:
        return None
    if found.hidden_build is not None:
        return "native CPU kernels: leave this directory, whose source tree hides them, or pip install -e . in it"
    return "native CPU kernels: install g++, then reinstall with ROBUST_DPO_BUILD=cpu, which says what fails"


def _gpu(found: Findings) -> str | None:
    if found.gpu:
        return None
    if found.driver_present and not found.torch_has_gpu_code:
        return "there is an NVIDIA driver, but this torch is built for the CPU: install a CUDA build (pytorch.org)"
    if found.torch_has_gpu_code:
        return "this torch can use a GPU but sees none: check nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version"
    return None


def _triton(found: Findings) -> str | None:
    if not found.gpu or found.optional.get("triton"):
        return None
    if found.system == "Linux":
        return "GPU kernels: pip install triton; until then the GPU runs plain PyTorch"
    return f"GPU kernels need Triton, which has no packages for {found.system}; the GPU runs plain PyTorch"


def _attention(found: Findings) -> str | None:
    if not found.gpu or found.optional.get("flash-attn"):
        return None
    return "faster attention on packed batches: pip install 'robust-dpo[flash]'"


_RULES: tuple[Callable[[Findings], str | None], ...] = (
    _missing_packages,
    _unsound_backends,
    _native_cpu_code,
    _gpu,
    _triton,
    _attention,
)
