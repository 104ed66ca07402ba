"""Rows that have a target, found with at most one read from the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from robust_dpo.errors import argument_error
from robust_dpo.ops.host import fetch, send
from robust_dpo.ops.rows import ResponseRows

IGNORE_INDEX = -100


@dataclass(frozen=True)
class RowSelection:
    """Targets whose rows are to be selected, once the facts about them are on the host.

    Where the host knows the lengths of packed responses on a device (`seq_lens` on the CPU), there are no facts to
    wait for: no row is dropped, those without a target weigh nothing, and a wrong target makes the loss NaN.

    Args:
        targets: [B, T] or packed [N] integers, −100 where ignored.
        seq_lens: [S] integers for packed targets.
        vocab: V.
        facts: [S + 4] int64 on the device (number of targets of each response; least and sum of `seq_lens`; number of
            targets outside [0, V), and the first such target), or None.
    """

    targets: Tensor
    seq_lens: Tensor | None
    vocab: int
    facts: Tensor | None

    @staticmethod
    def begin(targets: Tensor, seq_lens: Tensor | None, vocab: int) -> RowSelection:
        """Queue on the device what `finish` needs to know."""
        if seq_lens is not None and seq_lens.device != targets.device:
            return RowSelection(targets, seq_lens, vocab, None)
        flat = targets.reshape(-1)
        kept = flat != IGNORE_INDEX
        if seq_lens is None:
            counts = kept.view(targets.shape).sum(1)
            least = total = torch.full_like(counts.sum(), flat.numel())
        else:
            lens = seq_lens.long()
            ends = lens.cumsum(0)
            before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
            first, last = (before[bound.clamp(0, flat.numel())] for bound in (ends - lens, ends))
            counts = last - first
            least, total = torch.cat([lens, lens.new_zeros(1)]).amin(), lens.sum()
        wrong = kept & ((flat < 0) | (flat >= vocab))
        # By index_select: plain indexing with a scalar reads it on the host.
        end = wrong.new_ones(1)
        sample = torch.cat([flat.long(), end.long()]).index_select(0, torch.cat([wrong, end]).byte().argmax()[None])
        facts = torch.cat([counts, torch.stack([least, total, wrong.sum()]), sample])
        return RowSelection(targets, seq_lens, vocab, facts)

    def finish(self, facts: list[int]) -> ResponseRows:
        """The rows, given the contents of `facts` ([] where there are none).

        Raises:
            ValueError: a target is outside [0, V), or `seq_lens` does not add up to the number of targets.
        """
        flat, device = self.targets.reshape(-1).long(), self.targets.device
        if self.facts is None:
            assert self.seq_lens is not None
            lens = self.seq_lens.tolist()
            check_lengths(min(lens, default=0), sum(lens), len(flat))
            counted = flat != IGNORE_INDEX
            flat = torch.where(counted, flat, 0)
            index = None
        else:
            *lens, least, total, wrong, sample = facts
            check_lengths(least, total, len(flat))
            if wrong:
                raise argument_error("targets", f"{IGNORE_INDEX} or a token in [0, {self.vocab})", sample)
            counted, index = None, _positions(flat != IGNORE_INDEX, sum(lens))
            flat = flat if index is None else flat[index]
        offsets = [0, *accumulate(lens)]
        seq_offsets = send(offsets, device)
        lengths = seq_offsets.diff()
        if counted is not None:
            lengths = torch.cat([counted.new_zeros(1, dtype=torch.int64), counted.cumsum(0)])[seq_offsets].diff()
        return ResponseRows(
            index=index,
            width=self.targets.shape[1] if self.seq_lens is None else None,
            targets=flat.contiguous(),
            counted=counted,
            lengths=lengths,
            seq_offsets=seq_offsets,
            offsets=offsets,
        )


def select_rows(targets: Tensor, seq_lens: Tensor | None, vocab: int) -> ResponseRows:
    """Rows with a target, by themselves; errors as `RowSelection.finish`."""
    selection = RowSelection.begin(targets, seq_lens, vocab)
    return selection.finish(*fetch(selection.facts))


def check_lengths(least: int, total: int, rows: int) -> None:
    """Lengths of packed responses that can be right."""
    if least < 0:
        raise argument_error("seq_lens", "lengths of at least 0", least)
    if total != rows:
        raise argument_error("seq_lens", f"a sum of {rows}, the rows of hidden", total)


def _positions(kept: Tensor, count: int) -> Tensor | None:
    """[count] int64, where `kept` is True; None where that is everywhere."""
    if count == len(kept):
        return None
    return kept.nonzero_static(size=count)[:, 0]
