"""How a launch of the CUDA row kernel is cut: threads, blocks that share a row, and what they keep on the chip."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from robust_dpo.probes import runs_on

# Of shared memory that a block has beside its part of a row: 1 KB that the system takes, and the sums of its warps.
RESERVED_BYTES = 2048
# Two blocks of 512 threads share a multiprocessor, so that one loads while the other computes and stores.
BLOCKS_PER_MULTIPROCESSOR = 2
MAX_THREADS = 512
VECTOR_BYTES = 16
LOADS_IN_FLIGHT = 4  # of a thread, see csrc/row_logprob_kernel.cuh
# That every chip with clusters can hold.
MAX_CLUSTER = 8
FIRST_WITH_CLUSTERS = 90  # compute capability 9.0
# Shorter parts of a row are not worth the exchange of their sums: 16 KB take a block less than a microsecond.
SEGMENT_BYTES = 16 << 10
MAX_SEGMENTS = 64


@dataclass(frozen=True)
class Chip:
    """What of a GPU matters here.

    Args:
        multiprocessors: number of them.
        shared_bytes: shared memory of a multiprocessor.
        shared_bytes_of_block: the most that a block may have of it.
        clusters: whether blocks can read each other's shared memory, see `has_clusters`.
    """

    multiprocessors: int
    shared_bytes: int
    shared_bytes_of_block: int
    clusters: bool


@dataclass(frozen=True)
class RowPlan:
    """How a tile is cut; see csrc/row_logprob_cuda.h.

    Args:
        threads: of a block, 128 to 512.
        segments: blocks that share a row.
        cluster: whether these exchange their sums in one launch, through shared memory; otherwise it takes two.
        keep: whether a block keeps its part of the row in shared memory until its gradient is written.
    """

    threads: int
    segments: int = 1
    cluster: bool = False
    keep: bool = False


def plan_rows(rows: int, vocab: int, itemsize: int, *, gradient: bool, narrowed: bool, chip: Chip) -> RowPlan:
    """What suits a tile [rows, vocab] with elements of `itemsize` bytes.

    With a gradient, a row is kept on the chip where it fits, because then memory is read once: by one block, or on
    sm_90 and later by a cluster of 2, 4 or 8 (powers of two pack into the 16 or 18 multiprocessors of a GPC). A row of
    128,256 bf16 logits takes 4 blocks with 64 KB each. On other chips longer rows are read again, from L2 where it
    holds them. Fewer rows than two for every multiprocessor are cut further.

    Args:
        rows: of the tile.
        vocab: of the tile.
        itemsize: of the tile.
        gradient: whether one is written.
        narrowed: whether it may lie over the front of the tile's rows: then no block may write what another still
            reads.
        chip: that runs it.
    """
    row_bytes = vocab * itemsize
    most = MAX_CLUSTER if chip.clusters else 1
    half = chip.shared_bytes // BLOCKS_PER_MULTIPROCESSOR - RESERVED_BYTES
    whole = chip.shared_bytes_of_block - RESERVED_BYTES
    sizes = [size for size in (1, 2, 4, 8) if size <= most]
    fitting = [size for room in (half, whole) for size in sizes if row_bytes <= size * room] if gradient else []
    keep = bool(fitting)
    segments = fitting[0] if keep else 1
    wanted = _worthwhile_segments(rows, row_bytes, chip)
    if chip.clusters and (keep or not narrowed):
        while segments < MAX_CLUSTER and 2 * segments <= wanted:
            segments *= 2
    elif not chip.clusters and not narrowed and wanted > 1:
        segments = min(wanted, MAX_SEGMENTS)
        return RowPlan(_threads(row_bytes, segments), segments)
    return RowPlan(_threads(row_bytes, segments), segments, cluster=segments > 1, keep=keep)


def plan_gradient(rows: int, vocab: int, itemsize: int, *, narrowed: bool, chip: Chip) -> RowPlan:
    """What suits the gradient of known results: every element is read once and written once, so nothing is kept and
    blocks that share a row know nothing of each other. Arguments as in `plan_rows`.
    """
    row_bytes = vocab * itemsize
    segments = 1 if narrowed else max(1, min(_worthwhile_segments(rows, row_bytes, chip), MAX_SEGMENTS))
    return RowPlan(_threads(row_bytes, segments), segments)


def _worthwhile_segments(rows: int, row_bytes: int, chip: Chip) -> int:
    """Into how many parts a row may be cut to have blocks for all multiprocessors; 0 where a row is hardly one."""
    wanted = -(-BLOCKS_PER_MULTIPROCESSOR * chip.multiprocessors // max(rows, 1))
    return min(wanted, row_bytes // SEGMENT_BYTES)


def _threads(row_bytes: int, segments: int) -> int:
    """As many as have `LOADS_IN_FLIGHT` vectors each, a power of two."""
    vectors = row_bytes // segments // VECTOR_BYTES
    threads = 128
    while threads < MAX_THREADS and threads * LOADS_IN_FLIGHT < vectors:
        threads *= 2
    return threads


def has_clusters(architectures: str, capability: int) -> bool:
    """Whether blocks can share a row through a cluster: the GPU has them, and so has the code that runs on it.

    What the driver compiles for sm_90 from code for sm_80 takes part in no exchange.

    Args:
        architectures: that the extension was built for, such as "sm_80 compute_80".
        capability: of the GPU, such as 90.
    """
    return any(
        int(name.partition("_")[2]) >= FIRST_WITH_CLUSTERS and runs_on(name, capability)
        for name in architectures.split()
    )


@functools.cache
def chip_of(device: torch.device, architectures: str) -> Chip:
    """The GPU of that index; a small one without clusters where the extension is compiled for the CPU.

    Args:
        device: of the tile.
        architectures: as in `has_clusters`.
    """
    if device.type != "cuda":
        return Chip(multiprocessors=1, shared_bytes=64 << 10, shared_bytes_of_block=48 << 10, clusters=False)
    properties: Any = torch.cuda.get_device_properties(device)  # the stub of its class has not all of them
    return Chip(
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,
        clusters=has_clusters(architectures, 10 * properties.major + properties.minor),
    )
