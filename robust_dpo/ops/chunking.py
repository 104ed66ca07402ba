"""How many rows of logits exist at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from robust_dpo.checks import Interval, check_number

# A chunk reads the weight twice and its fp32 gradient is read and written once: 12 to 16 bytes for each element of the
# head, beside 6 operations for each of its rows. From 256 fp32 or 512 bf16 rows on a CPU no longer sees that, and more
# rows are only more memory, whose pages the system has to clear. A group is worth more: one that does not fit is run
# forward twice.
CPU_COLUMN_BYTES, CPU_BYTES = 1024, 128 << 20
# A GPU wants 4,096 rows: each chunk reads and writes the fp32 weight gradient once. A large vocabulary on a small GPU
# has fewer, so that logits take no more than this part of its memory.
GPU_ROWS, GPU_SHARE = 4096, 16
ELSEWHERE_BYTES = 1 << 30
MIN_ROWS = 16


class ChunkRows(NamedTuple):
    """How many rows a chunk has.

    Args:
        usual: where they can be cut anywhere, or between groups.
        most: where a single group has more than that.
    """

    usual: int
    most: int


def chunk_rows(vocab: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None, rows: int) -> ChunkRows:
    """Rows of a chunk: what fits into `chunk_bytes` of logits, at least 16, never more than there are.

    Raises:
        ValueError: `chunk_bytes` is below 1.
    """
    row_bytes = vocab * dtype.itemsize
    on_cpu = device.type == "cpu"
    if chunk_bytes is not None:
        budget = int(check_number("chunk_bytes", chunk_bytes, Interval(low=1)))
    elif device.type == "cuda":
        budget = min(GPU_ROWS * row_bytes, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
    else:
        budget = CPU_BYTES if on_cpu else ELSEWHERE_BYTES
    most = max(1, min(max(MIN_ROWS, budget // row_bytes), rows))
    usual = CPU_COLUMN_BYTES // dtype.itemsize if on_cpu and chunk_bytes is None else most
    return ChunkRows(min(usual, most), most)
