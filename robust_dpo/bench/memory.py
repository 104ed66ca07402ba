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
    before = bytes_in_use(device)
    meter = PeakMeter(device)
    meter.start()
    run()
    peak = meter.stop()
    return None if peak is None else (peak[0] - before, peak[1])


def bytes_in_use(device: torch.device) -> int:
    """Bytes that are in use now: of the GPU's allocator, or resident; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return resident_bytes() if _STATUS.exists() else 0


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


class PeakMeter:
    """Highest memory in use between `start` and `stop`: of the GPU's allocator, or of this process on Linux.

    On Linux the kernel's own high-water mark where it may be reset, otherwise a thread that samples every millisecond.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampler: _Sampler | None = None

    def start(self) -> None:
        """Forget what was the highest until now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            self._sampler = _Sampler()

    def stop(self) -> tuple[int, str] | None:
        """Bytes, and how they were taken; None where the system does not tell."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device), "allocator"
        if not _STATUS.exists():
            return None
        if self._sampler is None:
            return _status("VmHWM"), "high-water mark"
        return self._sampler.stop(), "sampled every millisecond"


class _Sampler:
    """A thread that looks at the resident size every millisecond."""

    def __init__(self) -> None:
        self._done, self._peak = threading.Event(), 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.is_set() and _STATUS.exists():
            self._peak = max(self._peak, _status("VmRSS"))
            time.sleep(0.001)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, _status("VmRSS"))
