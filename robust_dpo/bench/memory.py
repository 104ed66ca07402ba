"""Peak memory of a call: of the GPU's allocator, or resident memory of this process on Linux."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def extra_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, str] | None:
    """Highest memory in use while `run` runs above what was in use before, and how it was taken.

    None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "allocator"
    if not _STATUS.exists():
        return None
    before = resident_bytes()
    peak, method = peak_bytes(run)
    return peak - before, method


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no field {field}")


def resident_bytes() -> int:
    """Resident bytes now, after the allocator has given back what it can."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return _status("VmRSS")


def peak_bytes(run: Callable[[], object]) -> tuple[int, str]:
    """Highest resident size while `run` runs, and how it was taken.

    The kernel's own high-water mark where it may be reset, otherwise a thread that samples every millisecond.
    """
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return _sampled_peak(run), "sampled every millisecond"
    run()
    return _status("VmHWM"), "high-water mark"


def _sampled_peak(run: Callable[[], object]) -> int:
    done, peak = threading.Event(), _status("VmRSS")

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _status("VmRSS"))
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(peak, _status("VmRSS"))
