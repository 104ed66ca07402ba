"""Which rows of the hidden states belong to responses, and how they are cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from robust_dpo.errors import argument_error

IGNORE_INDEX = -100


@dataclass(frozen=True)
class ResponseRows:
    """The N rows whose target counts, response after response.

    Args:
        index: [N] int64, the row in the flattened hidden states, or None where every row counts.
        width: T of padded targets [B, T], or None for packed ones.
        targets: [N] int64 in [0, V).
        sequence: [N] int64, the response of each row, ascending.
        lengths: [S] int64, rows of each response.
        offsets: S + 1 row numbers on the host; response s has the rows offsets[s] … offsets[s + 1] − 1.
    """

    index: Tensor | None
    width: int | None
    targets: Tensor
    sequence: Tensor
    lengths: Tensor
    offsets: list[int]

    @staticmethod
    def select(targets: Tensor, seq_lens: Tensor | None, vocab: int) -> ResponseRows:
        """Rows of padded targets [B, T], or of packed targets [N] with `seq_lens` [S]; −100 is left out.

        Raises:
            ValueError: a target is outside [0, vocab), or `seq_lens` does not add up to the number of targets.
        """
        flat = targets.reshape(-1)
        if seq_lens is None:
            count = targets.shape[0]
            sequence = torch.arange(count, device=flat.device).repeat_interleave(targets.shape[1])
        else:
            if seq_lens.numel() and int(seq_lens.min()) < 0:
                raise argument_error("seq_lens", "lengths of at least 0", int(seq_lens.min()))
            if int(seq_lens.sum()) != flat.numel():
                raise argument_error("seq_lens", f"a sum of {flat.numel()}, the rows of hidden", int(seq_lens.sum()))
            count = len(seq_lens)
            lens = seq_lens.to(device=flat.device, dtype=torch.int64)
            sequence = torch.arange(count, device=flat.device).repeat_interleave(lens)
        kept = flat != IGNORE_INDEX
        index = None if bool(kept.all()) else kept.nonzero()[:, 0]
        if index is not None:
            flat, sequence = flat[index], sequence[index]
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= vocab):
            wrong = flat[(flat < 0) | (flat >= vocab)][0]
            raise argument_error("targets", f"{IGNORE_INDEX} or a token in [0, {vocab})", int(wrong))
        lengths = torch.bincount(sequence, minlength=count)
        offsets = [0, *lengths.cumsum(0).tolist()]
        width = targets.shape[1] if seq_lens is None else None
        return ResponseRows(index, width, flat.to(torch.int64).contiguous(), sequence, lengths, offsets)

    @property
    def count(self) -> int:
        return self.offsets[-1]

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
        return total

    def add_to_sequences(self, sums: Tensor, values: Tensor, start: int) -> None:
        """Add the values of rows start, start + 1, … to `sums` [S], each to its response.

        Summed in float64: a response has thousands of tokens, and the robust weights are exponentials of the sums.
        """
        sequence = self.sequence[start : start + len(values)]
        exact = torch.zeros(len(sums), dtype=torch.float64, device=sums.device)
        sums += exact.index_add_(0, sequence, values.double()).to(sums.dtype)


@dataclass(frozen=True)
class Chunk:
    """Whole groups first_group … last_group − 1, with their responses and rows, in row ranges of the chunk size.

    `pieces` is one range, unless a single group is larger than the chunk size.
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


def cut_groups(rows: ResponseRows, group_sizes: list[int], size: int) -> list[Chunk]:
    """Chunks of whole groups with at most `size` rows; a larger group has a chunk of its own, in pieces."""
    chunks: list[Chunk] = []
    group = sequence = 0
    while group < len(group_sizes):
        first_group, first_sequence = group, sequence
        start = rows.offsets[sequence]
        while group < len(group_sizes):
            stop = rows.offsets[sequence + group_sizes[group]]
            if stop - start > size and group > first_group:
                break
            sequence += group_sizes[group]
            group += 1
        pieces = cut_rows(start, rows.offsets[sequence], size)
        chunks.append(Chunk((first_group, group), (first_sequence, sequence), pieces))
    return chunks
