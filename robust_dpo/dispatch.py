"""Which backend runs an operator, and why the others cannot.

The one place that chooses. A backend registers itself with `register_backend`: what it implements, where, and a probe
that says whether it is usable here. Nothing else needs to change when one is added.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from robust_dpo.backend import (
    CALIBRATION_WEIGHTS,
    FLOATS,
    FUSED_HEAD,
    GROUP_EPILOGUE,
    RESCALE,
    ROW_LOGPROB,
    Backend,
    BackendReport,
    BackendStatus,
)
from robust_dpo.errors import argument_error, type_error
from robust_dpo.probes import INTERPRETING, probe_cpu, probe_cuda, probe_torch, probe_triton

if TYPE_CHECKING:
    from robust_dpo.kernels.calibration_weights import CalibrationWeightsLauncher
    from robust_dpo.kernels.group_epilogue import GroupEpilogueLauncher
    from robust_dpo.kernels.rescale import RescaleLauncher
    from robust_dpo.kernels.row_logprob import RowLogprobLauncher
    from robust_dpo.losses import BoundLoss

# Installed packages add backends under this name: `mine = "my_package:BACKEND"`.
ENTRY_POINTS = "robust_dpo.backends"
_PLAIN = {
    ROW_LOGPROB: "robust_dpo.kernels.row_logprob_torch:row_logprob",
    RESCALE: "robust_dpo.kernels.rescale_torch:rescale",
    CALIBRATION_WEIGHTS: "robust_dpo.kernels.calibration_weights_torch:calibration_weights",
}
_REGISTRY: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend to those of this process, or replace the one of the same name.

    Raises:
        TypeError: `backend` is not a `Backend`.
    """
    if not isinstance(backend, Backend):
        raise type_error("backend", "a Backend", backend)
    _REGISTRY[backend.name] = backend
    _status.cache_clear()


@functools.cache
def _status(name: str) -> BackendStatus:
    try:
        status = _REGISTRY[name].probe()
    except Exception as error:  # foreign code, which may raise anything; the other backends are to stay usable
        return BackendStatus(name, False, False, f"its probe raised {type(error).__name__}: {error}")
    if not isinstance(status, BackendStatus) or status.name != name:
        return BackendStatus(name, False, False, f"its probe gave {status!r}, not a BackendStatus named {name!r}")
    return status


def _obstacle(backend: Backend, operator: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why a backend cannot run `operator` on tiles of `dtype` (None: of some dtype) on `device`; None if it can."""
    status = _status(backend.name)
    if not status.usable:
        return f"it is {'not usable' if status.built else 'not built'} here: {status.detail}"
    return backend.unsupported(operator, device, dtype)


def _by_priority() -> list[Backend]:
    return sorted(_REGISTRY.values(), key=lambda backend: -backend.priority)


def backends() -> BackendReport:
    """What can run on this machine; print it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return BackendReport(tuple(_status(backend.name) for backend in _by_priority()), versions)


def backend_name(value: object) -> str:
    """`value` if it is a string; whether there is such a backend, and what it can run, is said when it is chosen.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, str):
        raise type_error("backend", "the name of a backend, or 'auto'", value)
    return value


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _REGISTRY:
        raise argument_error("backend", f"one of auto, {', '.join(sorted(_REGISTRY))}", repr(name))
    return _REGISTRY[name]


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
        able = [each for each in _by_priority() if _obstacle(each, operator, device, dtype) is None]
        if not able:
            raise RuntimeError(f"no backend runs {operator} with {dtype} on {device}:\n{backends()}")
        return able[0]
    named = find_backend(backend)
    obstacle = _obstacle(named, operator, device, dtype)
    if obstacle is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {operator} with {dtype} on {device}: {obstacle}")
    return named


def check_backend(backend: object, device: torch.device) -> None:
    """Refuse, ahead of the first call, a backend that cannot run on `device` whatever the dtype.

    Raises:
        TypeError, ValueError: it is no name, there is no such backend, or it cannot run; the message says why.
    """
    name = backend_name(backend)
    if name == "auto":
        return
    obstacle = _obstacle(find_backend(name), ROW_LOGPROB, device, None)
    if obstacle is not None:
        raise argument_error("backend", f"one that runs on {device}", f"{backend!r}: {obstacle}")


def get_row_logprob(backend: str, device: torch.device | str, dtype: torch.dtype) -> RowLogprobLauncher:
    """The row_logprob launcher for tiles of `dtype` on `device`; errors as in `choose_backend`."""
    return cast("RowLogprobLauncher", _launcher(choose_backend(ROW_LOGPROB, backend, device, dtype), ROW_LOGPROB))


def get_rescale(backend: str, device: torch.device | str, dtype: torch.dtype) -> RescaleLauncher:
    """The rescale launcher beside the row_logprob of `backend`: its own, or plain PyTorch's; errors as there."""
    return cast("RescaleLauncher", _launcher(choose_backend(ROW_LOGPROB, backend, device, dtype), RESCALE))


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
    chosen = choose_backend(ROW_LOGPROB, backend, device, dtype)
    if GROUP_EPILOGUE not in chosen.launchers:
        return None
    module = chosen.launchers[GROUP_EPILOGUE].partition(":")[0]
    supports = cast("Callable[[BoundLoss, int], bool]", _load(chosen.name, f"{module}:supports"))
    return cast("GroupEpilogueLauncher", _launcher(chosen, GROUP_EPILOGUE)) if supports(loss, widest) else None


def get_calibration_weights(backend: str, device: torch.device | str, dtype: torch.dtype) -> CalibrationWeightsLauncher:
    """The calibration_weights launcher for probabilities of `dtype` on `device`.

    That of `backend`, or plain PyTorch's where it has none. Errors as in `choose_backend`.
    """
    without = backend != "auto" and CALIBRATION_WEIGHTS not in find_backend(backend).launchers
    chosen = choose_backend(ROW_LOGPROB if without else CALIBRATION_WEIGHTS, backend, device, dtype)
    return cast("CalibrationWeightsLauncher", _launcher(chosen, CALIBRATION_WEIGHTS))


def has_fused_head(backend: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the backend that runs row_logprob also has the whole LM head as one kernel, for weights of `dtype`.

    Where it has not, the head is matrix products by torch and row_logprob. Errors as in `choose_backend`.
    """
    chosen = choose_backend(ROW_LOGPROB, backend, device, dtype)
    if FUSED_HEAD not in chosen.launchers:
        return False
    return cast("Callable[[torch.dtype], str | None]", _launcher(chosen, FUSED_HEAD))(dtype) is None


def _launcher(backend: Backend, operator: str) -> Callable[..., object]:
    """The backend's own launcher of an operator, or plain PyTorch's."""
    return _load(backend.name, backend.launchers.get(operator) or _PLAIN[operator])


@functools.cache
def _load(backend: str, place: str) -> Callable[..., object]:
    module, _, function = place.partition(":")
    try:
        return cast("Callable[..., object]", getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"backend {backend!r}: cannot load {place!r}: {error}") from error


def _register_installed() -> None:
    """Add the backends of other packages; one that cannot be loaded says so in `backends()`."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            register_backend(entry.load())
        except Exception as error:  # foreign code, as probes are
            why = f"entry point {entry.value!r} raised {type(error).__name__}: {error}"
            register_backend(_never(entry.name, why))


def _never(name: str, why: str) -> Backend:
    """A backend that is not there."""
    return Backend(name, lambda: BackendStatus(name, False, False, why))


register_backend(Backend("torch", probe_torch, _PLAIN))
register_backend(
    Backend(
        "cpu",
        probe_cpu,
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
        probe_triton,
        {
            ROW_LOGPROB: "robust_dpo.kernels.row_logprob_triton:row_logprob",
            GROUP_EPILOGUE: "robust_dpo.kernels.group_epilogue_triton:group_epilogue",
            CALIBRATION_WEIGHTS: "robust_dpo.kernels.calibration_weights_triton:calibration_weights",
            RESCALE: "robust_dpo.kernels.rescale_triton:rescale",
        },
        device_types=frozenset({"cpu" if INTERPRETING else "cuda"}),
        dtypes=FLOATS - {torch.float64},
        priority=-10 if INTERPRETING else 20,
    )
)
register_backend(
    Backend(
        "cuda",
        probe_cuda,
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
_register_installed()
