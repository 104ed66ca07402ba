"""How many rows of logits exist at a time."""

from __future__ import annotations

import torch

from robust_dpo.checks import Interval, check_number

# On a CPU 512 to 1,024 rows fill the GEMMs; 128 MiB is 650 fp32 or 1,300 bf16 rows at V = 49152. A GPU wants 4,096 rows
# and more: each chunk reads and writes the fp32 weight gradient once.
DEFAULT_BYTES = {"cpu": 128 << 20}
DEFAULT_BYTES_ELSEWHERE = 1 << 30
MIN_ROWS = 16


def chunk_rows(vocab: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None, rows: int) -> int:
    """Rows of a chunk: what fits into `chunk_bytes` of logits, at least 16, never more than there are.

    Raises:
        ValueError: `chunk_bytes` is below 1.
    """
    budget = DEFAULT_BYTES.get(device.type, DEFAULT_BYTES_ELSEWHERE)
    if chunk_bytes is not None:
        budget = int(check_number("chunk_bytes", chunk_bytes, Interval(low=1)))
    fitting = budget // (vocab * dtype.itemsize)
    return max(1, min(max(MIN_ROWS, fitting), rows))
