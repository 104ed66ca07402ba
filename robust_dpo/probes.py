"""Which of the package's own backends can run on this machine, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from robust_dpo.backend import BackendStatus

BUILD_REPORT = Path(__file__).with_name("_build.json")


def probe_torch() -> BackendStatus:
    """Plain PyTorch always runs."""
    return BackendStatus("torch", True, True, f"plain PyTorch, on every device; {torch.get_num_threads()} CPU threads")


def probe_cpu() -> BackendStatus:
    """The native extension, if it was built and this CPU can run it."""
    if importlib.util.find_spec("robust_dpo._cpu") is None:
        return BackendStatus("cpu", False, False, _why_not_built("cpu"))
    try:
        launcher = importlib.import_module("robust_dpo.kernels.row_logprob_cpu")
        isa = launcher.chosen_isa()
    except (ImportError, ValueError) as error:
        return BackendStatus("cpu", True, False, str(error))
    usable = ", ".join(launcher.usable_isas())
    return BackendStatus("cpu", True, True, f"{isa} in use of {usable}; threads: {launcher.thread_runtime()}")


def _why_not_built(extension: str) -> str:
    hidden = hidden_build()
    if hidden is not None:
        return (
            f"this is a source tree that was never built, {Path(__file__).parent}, and it hides the installed "
            f"{hidden}: run Python in another directory, or pip install -e . in this one"
        )
    if not BUILD_REPORT.exists():
        return "installed without native code (ROBUST_DPO_BUILD=none, or a source tree that was never built)"
    return str(json.loads(BUILD_REPORT.read_text(encoding="utf-8")).get(extension, "left out of the build"))


def hidden_build() -> Path | None:
    """A `robust_dpo` with native code that Python would import, did this one without not come first on its path.

    In a clone, `python` finds the source tree of the current directory before the installed package.
    """
    this = Path(__file__).parent
    if _has_native_code(this):
        return None
    others = (Path(folder, this.name).resolve() for folder in sys.path)
    return next((other for other in others if other != this.resolve() and _has_native_code(other)), None)


def _has_native_code(package: Path) -> bool:
    return any((package / f"_cpu{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


# Whether Triton kernels run on the CPU, in its interpreter: fixed for the process, as Triton decides kernel by kernel
# when it is imported.
INTERPRETING = _interpreter_wanted()


def probe_triton() -> BackendStatus:
    """Triton, on a GPU that its kernels are written for, or in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, False, "the package triton is not installed")
    version = importlib.metadata.version("triton")
    if _interpreter_wanted() != INTERPRETING or (INTERPRETING and _compiles()):
        why = "TRITON_INTERPRET was changed when Triton or robust_dpo was already imported; set it before Python starts"
        return BackendStatus("triton", True, False, why)
    if INTERPRETING:
        return BackendStatus("triton", True, True, f"{version}, interpreted on the CPU for tests, never chosen by auto")
    if not any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))):
        why = "Triton builds its launchers with a C compiler, and there is none; install gcc or clang, or set CC"
        return BackendStatus("triton", True, False, why)
    if not torch.cuda.is_available():
        why = (
            f"no GPU that this torch ({torch.__version__}) can use; "
            "TRITON_INTERPRET=1, set before Python starts, runs the kernels on the CPU"
        )
        return BackendStatus("triton", True, False, why)
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip is None and properties.major < 8:
        why = f"{properties.name} has compute capability {properties.major}.{properties.minor}, 8.0 is the least"
        return BackendStatus("triton", True, False, why)
    return BackendStatus("triton", True, True, f"{version} on {properties.name}")


def _compiles() -> bool:
    """Whether Triton was imported to compile kernels: its own device functions tell."""
    if "triton" not in sys.modules:
        return False
    from triton import language
    from triton.runtime.jit import JITFunction

    return isinstance(language.cdiv, JITFunction)


def probe_cuda() -> BackendStatus:
    """The CUDA extension, if it was built, and for a GPU like the one here."""
    if importlib.util.find_spec("robust_dpo._cuda") is None:
        return BackendStatus("cuda", False, False, _why_not_built("cuda"))
    try:
        extension = importlib.import_module("robust_dpo._cuda")
    except ImportError as error:
        return BackendStatus("cuda", True, False, str(error))
    chips = str(extension.ARCHITECTURES)
    if not torch.cuda.is_available() or torch.version.hip is not None:
        why = f"no NVIDIA GPU that this torch ({torch.__version__}) can use; built for {chips}"
        return BackendStatus("cuda", True, False, why)
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    problem = str(extension.problem())
    if problem:
        return BackendStatus("cuda", True, False, problem)
    if not any(runs_on(chip, capability) for chip in chips.split()):
        return BackendStatus("cuda", True, False, f"built for {chips}, {properties.name} is sm_{capability}")
    return BackendStatus("cuda", True, True, f"{chips} on {properties.name}")


def runs_on(chip: str, capability: int) -> bool:
    """Whether code for `chip` runs on a GPU: machine code within a generation, PTX on all later ones."""
    kind, _, number = chip.partition("_")
    return int(number) <= capability and (kind == "compute" or int(number) // 10 == capability // 10)
