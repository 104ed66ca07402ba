"""Which backend runs an operator, and why the others cannot.

The one place that chooses. A backend registers itself with `register_backend`: what it implements, where, and a probe
that says whether it is usable here. Nothing else needs to change when one is added.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from robust_dpo.errors import argument_error

if TYPE_CHECKING:
    from robust_dpo.kernels.calibration_weights import CalibrationWeightsLauncher
    from robust_dpo.kernels.group_epilogue import GroupEpilogueLauncher
    from robust_dpo.kernels.rescale import RescaleLauncher
    from robust_dpo.kernels.row_logprob import RowLogprobLauncher
    from robust_dpo.losses import BoundLoss

ROW_LOGPROB = "row_logprob"
GROUP_EPILOGUE = "group_epilogue"
CALIBRATION_WEIGHTS = "calibration_weights"
RESCALE = "rescale"
FUSED_HEAD = "fused_head"
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
BUILD_REPORT = Path(__file__).with_name("_build.json")


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine.

    Args:
        name: the value of `backend=`.
        built: whether its code is there.
        usable: whether it can run here.
        detail: what is in use (instruction set, versions), or why it cannot run.
    """

    name: str
    built: bool
    usable: bool
    detail: str

    def __str__(self) -> str:
        state = "usable" if self.usable else "built, not usable" if self.built else "not built"
        return f"{self.name:<7}{state:<19}{self.detail}"


@dataclass(frozen=True)
class BackendReport:
    """All backends, best first for `auto`, and the versions that matter; prints as one line for each."""

    backends: tuple[BackendStatus, ...]
    versions: Mapping[str, str]

    def __getitem__(self, name: str) -> BackendStatus:
        for status in self.backends:
            if status.name == name:
                return status
        raise KeyError(name)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*map(str, self.backends), f"{'':<7}{versions}"])

    __repr__ = __str__


@dataclass(frozen=True)
class Backend:
    """How a backend is found.

    Args:
        name: the value of `backend=`.
        probe: its status here; called once.
        launchers: operator -> "module:function", imported when first used. For the fused head, the function that says
            why it cannot run for a dtype.
        device_types: where it runs; None for everywhere.
        dtypes: of the tiles that it takes.
        priority: `auto` takes the usable backend of the highest priority.
    """

    name: str
    probe: Callable[[], BackendStatus]
    launchers: Mapping[str, str] = field(default_factory=dict)
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = FLOATS
    priority: int = 0

    def obstacle(self, operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run `operator` on tiles of `dtype` on `device`; None if it can."""
        status = _status(self.name)
        if not status.usable:
            return f"it is {'not usable' if status.built else 'not built'} here: {status.detail}"
        if operator not in self.launchers:
            return f"it does not implement {operator}"
        if self.device_types is not None and device.type not in self.device_types:
            return f"it runs on {', '.join(sorted(self.device_types))}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"it does not take {dtype}"
        return None


_REGISTRY: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend, or replace the one of the same name."""
    _REGISTRY[backend.name] = backend
    _status.cache_clear()


@functools.cache
def _status(name: str) -> BackendStatus:
    return _REGISTRY[name].probe()


def _by_priority() -> list[Backend]:
    return sorted(_REGISTRY.values(), key=lambda backend: -backend.priority)


def backends() -> BackendReport:
    """What can run on this machine; print it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return BackendReport(tuple(_status(backend.name) for backend in _by_priority()), versions)


def choose_backend(operator: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend that runs `operator` on tiles of `dtype` on `device`.

    Args:
        operator: such as "row_logprob".
        backend: "auto" for the best usable one, or a name, which is never replaced by another.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named one cannot do it; the message says why.
    """
    device = torch.device(device)
    if backend == "auto":
        able = [each for each in _by_priority() if each.obstacle(operator, device, dtype) is None]
        if not able:
            raise RuntimeError(f"no backend runs {operator} with {dtype} on {device}:\n{backends()}")
        return able[0]
    if backend not in _REGISTRY:
        raise argument_error("backend", f"one of auto, {', '.join(sorted(_REGISTRY))}", repr(backend))
    obstacle = _REGISTRY[backend].obstacle(operator, device, dtype)
    if obstacle is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {operator} with {dtype} on {device}: {obstacle}")
    return _REGISTRY[backend]


def get_row_logprob(backend: str, device: torch.device | str, dtype: torch.dtype) -> RowLogprobLauncher:
    """The row_logprob launcher for tiles of `dtype` on `device`; errors as in `choose_backend`."""
    chosen = choose_backend(ROW_LOGPROB, backend, device, dtype)
    return cast("RowLogprobLauncher", _load(chosen.launchers[ROW_LOGPROB]))


def get_rescale(backend: str, device: torch.device | str, dtype: torch.dtype) -> RescaleLauncher:
    """The rescale launcher beside the row_logprob of `backend`: its own, or plain PyTorch's; errors as there."""
    chosen = choose_backend(ROW_LOGPROB, backend, device, dtype)
    return cast("RescaleLauncher", _load(chosen.launchers.get(RESCALE, _REGISTRY["torch"].launchers[RESCALE])))


def get_group_epilogue(
    backend: str, device: torch.device | str, dtype: torch.dtype, loss: BoundLoss, widest: int
) -> GroupEpilogueLauncher | None:
    """The group_epilogue launcher beside the row_logprob of `backend`, or None where it has none for this loss.

    Without one, losses are differentiated by autograd. Errors as in `choose_backend`.

    Args:
        backend: as in `choose_backend`.
        device: of the tiles.
        dtype: of the tiles.
        loss: of the groups.
        widest: responses of the largest group.
    """
    launcher = choose_backend(ROW_LOGPROB, backend, device, dtype).launchers.get(GROUP_EPILOGUE)
    if launcher is None:
        return None
    supports = cast("Callable[[BoundLoss, int], bool]", _load(f"{launcher.partition(':')[0]}:supports"))
    return cast("GroupEpilogueLauncher", _load(launcher)) if supports(loss, widest) else None


def get_calibration_weights(backend: str, device: torch.device | str, dtype: torch.dtype) -> CalibrationWeightsLauncher:
    """The calibration_weights launcher for probabilities of `dtype` on `device`; errors as in `choose_backend`."""
    chosen = choose_backend(CALIBRATION_WEIGHTS, backend, device, dtype)
    return cast("CalibrationWeightsLauncher", _load(chosen.launchers[CALIBRATION_WEIGHTS]))


def has_fused_head(backend: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the backend that runs row_logprob also has the whole LM head as one kernel, for weights of `dtype`.

    Where it has not, the head is matrix products by torch and row_logprob. Errors as in `choose_backend`.
    """
    reason = choose_backend(ROW_LOGPROB, backend, device, dtype).launchers.get(FUSED_HEAD)
    return reason is not None and cast("Callable[[torch.dtype], str | None]", _load(reason))(dtype) is None


@functools.cache
def _load(launcher: str) -> Callable[..., object]:
    module, _, function = launcher.partition(":")
    return cast("Callable[..., object]", getattr(importlib.import_module(module), function))


def _probe_torch() -> BackendStatus:
    return BackendStatus("torch", True, True, f"plain PyTorch, on every device; {torch.get_num_threads()} CPU threads")


def _probe_cpu() -> BackendStatus:
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
    if not BUILD_REPORT.exists():
        return "installed without native code (ROBUST_DPO_BUILD=none, or a source tree that was never built)"
    return str(json.loads(BUILD_REPORT.read_text(encoding="utf-8")).get(extension, "left out of the build"))


def _interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in its interpreter; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _probe_triton() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", False, False, "the package triton is not installed")
    version = importlib.metadata.version("triton")
    if not _interpreting() and not any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))):
        why = "Triton builds its launchers with a C compiler, and there is none; install gcc or clang, or set CC"
        return BackendStatus("triton", True, False, why)
    if _interpreting():
        return BackendStatus("triton", True, True, f"{version}, interpreted on the CPU for tests, never chosen by auto")
    if not torch.cuda.is_available():
        why = f"no GPU that this torch ({torch.__version__}) can use; TRITON_INTERPRET=1 runs the kernels on the CPU"
        return BackendStatus("triton", True, False, why)
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip is None and properties.major < 8:
        why = f"{properties.name} has compute capability {properties.major}.{properties.minor}, 8.0 is the least"
        return BackendStatus("triton", True, False, why)
    return BackendStatus("triton", True, True, f"{version} on {properties.name}")


def _probe_cuda() -> BackendStatus:
    if importlib.util.find_spec("robust_dpo._cuda") is None:
        return BackendStatus("cuda", False, False, _why_not_built("cuda"))
    try:
        chips = str(importlib.import_module("robust_dpo._cuda").ARCHITECTURES)
    except ImportError as error:
        return BackendStatus("cuda", True, False, str(error))
    if not torch.cuda.is_available() or torch.version.hip is not None:
        why = f"no NVIDIA GPU that this torch ({torch.__version__}) can use; built for {chips}"
        return BackendStatus("cuda", True, False, why)
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    if not any(_runs(chip, capability) for chip in chips.split()):
        return BackendStatus("cuda", True, False, f"built for {chips}, {properties.name} is sm_{capability}")
    return BackendStatus("cuda", True, True, f"{chips} on {properties.name}")


def _runs(chip: str, capability: int) -> bool:
    """Whether code for `chip` runs on a GPU: machine code within a generation, PTX on all later ones."""
    kind, _, number = chip.partition("_")
    return int(number) <= capability and (kind == "compute" or int(number) // 10 == capability // 10)


register_backend(
    Backend(
        "torch",
        _probe_torch,
        {
            ROW_LOGPROB: "robust_dpo.kernels.row_logprob_torch:row_logprob",
            RESCALE: "robust_dpo.kernels.rescale_torch:rescale",
            CALIBRATION_WEIGHTS: "robust_dpo.kernels.calibration_weights_torch:calibration_weights",
        },
    )
)
register_backend(
    Backend(
        "cpu",
        _probe_cpu,
        {
            ROW_LOGPROB: "robust_dpo.kernels.row_logprob_cpu:row_logprob",
            GROUP_EPILOGUE: "robust_dpo.kernels.group_epilogue_cpu:group_epilogue",
            CALIBRATION_WEIGHTS: "robust_dpo.kernels.calibration_weights_cpu:calibration_weights",
            FUSED_HEAD: "robust_dpo.kernels.linear_head_cpu:unsupported_reason",
        },
        device_types=frozenset({"cpu"}),
        priority=10,
    )
)
register_backend(
    Backend(
        "triton",
        _probe_triton,
        {
            ROW_LOGPROB: "robust_dpo.kernels.row_logprob_triton:row_logprob",
            GROUP_EPILOGUE: "robust_dpo.kernels.group_epilogue_triton:group_epilogue",
            CALIBRATION_WEIGHTS: "robust_dpo.kernels.calibration_weights_triton:calibration_weights",
            RESCALE: "robust_dpo.kernels.rescale_triton:rescale",
        },
        device_types=frozenset({"cpu" if _interpreting() else "cuda"}),
        dtypes=FLOATS - {torch.float64},
        priority=-10 if _interpreting() else 20,
    )
)
register_backend(
    Backend(
        "cuda",
        _probe_cuda,
        {
            ROW_LOGPROB: "robust_dpo.kernels.row_logprob_cuda:row_logprob",
            GROUP_EPILOGUE: "robust_dpo.kernels.group_epilogue_cuda:group_epilogue",
            CALIBRATION_WEIGHTS: "robust_dpo.kernels.calibration_weights_cuda:calibration_weights",
            RESCALE: "robust_dpo.kernels.rescale_cuda:rescale",
        },
        device_types=frozenset({"cuda"}),
        dtypes=FLOATS - {torch.float64},
        # Behind triton until both have been measured on a GPU; before torch, where there is no triton.
        priority=15,
    )
)
