"""How many rows of logits exist at a time."""

from __future__ import annotations

import torch

from robust_dpo.checks import Interval, check_number

# On a CPU 512 to 1,024 rows fill the GEMMs; 128 MiB is 650 fp32 or 1,300 bf16 rows at V = 49152.
CPU_BYTES = 128 << 20
# A GPU wants 4,096 rows: each chunk reads and writes the fp32 weight gradient once. A large vocabulary on a small GPU
# has fewer, so that logits take no more than this part of its memory.
GPU_ROWS, GPU_SHARE = 4096, 16
ELSEWHERE_BYTES = 1 << 30
MIN_ROWS = 16


def chunk_rows(vocab: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None, rows: int) -> int:
    """Rows of a chunk: what fits into `chunk_bytes` of logits, at least 16, never more than there are.

    Raises:
        ValueError: `chunk_bytes` is below 1.
    """
    row_bytes = vocab * dtype.itemsize
    if chunk_bytes is not None:
        budget = int(check_number("chunk_bytes", chunk_bytes, Interval(low=1)))
    elif device.type == "cuda":
        budget = min(GPU_ROWS * row_bytes, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    else:
        budget = CPU_BYTES if device.type == "cpu" else ELSEWHERE_BYTES
    return max(1, min(max(MIN_ROWS, budget // row_bytes), rows))
