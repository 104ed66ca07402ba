"""Which rows of the hidden states belong to responses, and how they are cut into chunks."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from robust_dpo.ops.chunking import ChunkRows
from robust_dpo.ops.precision import exact_dtype


@dataclass(frozen=True)
class ResponseRows:
    """The N rows that go through the head, response after response.

    Args:
        index: [N] int64, the row in the flattened hidden states, or None where every row is taken.
        width: T of padded targets [B, T], or None for packed ones.
        targets: [N] int64 in [0, V).
        counted: [N] bool, False for rows without a target, or None where all have one.
        lengths: [S] int64, targets of each response.
        seq_offsets: [S + 1] int64, `offsets` on the device.
        offsets: S + 1 row numbers on the host; response s has the rows offsets[s] … offsets[s + 1] − 1.
    """

    index: Tensor | None
    width: int | None
    targets: Tensor
    counted: Tensor | None
    lengths: Tensor
    seq_offsets: Tensor
    offsets: list[int]

    @property
    def count(self) -> int:
        return self.offsets[-1]

    @functools.cached_property
    def sequence(self) -> Tensor:
        """[N] int64, the response of each row, ascending."""
        responses = torch.arange(len(self.lengths), device=self.targets.device)
        return responses.repeat_interleave(self.seq_offsets.diff(), output_size=self.count)

    def gather(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of a tensor [B, T, …] or [N, …] of any strides, as the kernels take them.

        `hidden[:, :-1]`, the usual shift, cannot be flattened without a copy of the whole, so it is indexed as it is.
        """
        rows = slice(start, stop) if self.index is None else self.index[start:stop]
        if self.width is None:
            return _unit_stride(tensor[rows])
        if len(tensor) <= 1 or tensor.stride(0) == self.width * tensor.stride(1):
            return _unit_stride(tensor.flatten(0, 1)[rows])
        flat = torch.arange(start, stop, device=tensor.device) if self.index is None else self.index[start:stop]
        return _unit_stride(tensor[flat // self.width, flat % self.width])

    def spread(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """[N, …] at their places in a tensor of `shape`, zeros elsewhere."""
        if self.index is None:
            return rows.view(shape)
        out = rows.new_zeros(shape)
        out.view(-1, *rows.shape[1:])[self.index] = rows
        return out

    def coefficients(self, grad_sequences: Tensor | None, grad_tokens: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[N] factor of ∇(−logp) of each row, from gradients of sequence log-probs [S] and of token log-probs."""
        total = torch.zeros(self.count, dtype=dtype, device=self.targets.device)
        if grad_sequences is not None:
            total -= grad_sequences[self.sequence]
        if grad_tokens is not None:
            total -= self.gather(grad_tokens, 0, self.count)
        return total if self.counted is None else total.masked_fill_(~self.counted, 0.0)

    def sequence_sums(self, values: Tensor, first: int, last: int) -> Tensor:
        """[last − first] sums of the values [n] of the rows of responses first … last − 1, always in the same order.

        Taken in float64: a response has thousands of tokens, and the robust weights are exponentials of the sums.
        """
        start = self.offsets[first]
        exact = values.to(exact_dtype(values.device))
        if self.counted is not None:
            exact = exact.masked_fill(~self.counted[start : self.offsets[last]], 0.0)
        offsets = self.seq_offsets[first : last + 1] - start
        return torch.segment_reduce(exact, "sum", offsets=offsets, unsafe=True, initial=0).to(values.dtype)


@dataclass(frozen=True)
class Chunk:
    """Whole groups first_group … last_group − 1, with their responses and rows, in row ranges of the chunk size.

    `pieces` is one range, unless a single group is larger than any chunk may be.
    """

    groups: tuple[int, int]
    sequences: tuple[int, int]
    pieces: tuple[tuple[int, int], ...]


def _unit_stride(rows: Tensor) -> Tensor:
    """Rows whose elements are adjacent and which do not overlap, as they are; others as a copy."""
    if rows.ndim < 2 or (rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]):
        return rows
    return rows.contiguous()


def cut_rows(start: int, stop: int, size: int) -> tuple[tuple[int, int], ...]:
    """Ranges of at most `size` rows, of nearly equal length, that cover start … stop − 1."""
    count = max(1, -(-(stop - start) // size))
    bounds = [start + (stop - start) * i // count for i in range(count + 1)]
    return tuple(pairwise(bounds))


def cut_groups(rows: ResponseRows, group_sizes: list[int], size: ChunkRows) -> list[Chunk]:
    """Chunks of whole groups with at most the usual rows; a larger group has a chunk of its own, cut where it must be.

    As few as possible and nearly equal: for its weight gradient a short one at the end costs as much as a full one.
    """
    chunks: list[Chunk] = []
    group = sequence = 0
    while group < len(group_sizes):
        first_group, first_sequence = group, sequence
        start = rows.offsets[sequence]
        left = rows.count - start
        share = left / max(1, -(-left // size.usual))
        while group < len(group_sizes):
            stop = rows.offsets[sequence + group_sizes[group]]
            begun = group > first_group
            if begun and (stop - start > size.usual or rows.offsets[sequence] - start >= share):
                break
            sequence += group_sizes[group]
            group += 1
        pieces = cut_rows(start, rows.offsets[sequence], size.most)
        chunks.append(Chunk((first_group, group), (first_sequence, sequence), pieces))
    return chunks
