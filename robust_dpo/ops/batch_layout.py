"""What the host has to know about a batch before its first matrix product: which rows count, and who forms a group."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from robust_dpo.groups import GroupLayout, check_group_sizes
from robust_dpo.ops import inputs
from robust_dpo.ops.host import fetch, send
from robust_dpo.ops.row_selection import RowSelection
from robust_dpo.ops.rows import ResponseRows


@dataclass(frozen=True)
class BatchLayout:
    """Rows and groups of a batch.

    Args:
        rows: that go through the head.
        sizes: [G] responses of each group, on the host.
        group_offsets: [G + 1] int64 on the device, where the responses of each group begin, and where the last ends.
        calibration: [G] h in the `dtype` of the losses, or None.
    """

    rows: ResponseRows
    sizes: list[int]
    group_offsets: Tensor
    calibration: Tensor | None

    @functools.cached_property
    def groups(self) -> GroupLayout:
        """Padded layout of the responses."""
        return _group_layout(self.sizes, self.rows.targets.device)

    @staticmethod
    def read(
        targets: Tensor,
        seq_lens: Tensor | None,
        group_size: int | None,
        group_sizes: Tensor | None,
        vocab: int,
        ref_logps: Tensor | None,
        calibration: Tensor | None,
        scores: Tensor | None,
        dtype: torch.dtype,
    ) -> BatchLayout:
        """Lay out a batch and check the contents of what came with it, with one read from the device.

        With packed targets on a device, `seq_lens` on the CPU (and `group_sizes`, if any, there too) nothing is read:
        contents are not checked then, and what is wrong makes the loss NaN, by way of the calibration.

        Raises:
            ValueError: a target, a length, a group size or a value is out of its range.
        """
        selection = RowSelection.begin(targets, seq_lens, vocab)
        reads = selection.facts is not None
        flags = inputs.value_flags(ref_logps, calibration, scores) if reads else None
        facts, sizes, raised = fetch(selection.facts, group_sizes, flags)
        if reads:
            inputs.refuse_values(raised, ref_logps, calibration, scores)
        rows, device = selection.finish(facts), targets.device
        responses = len(rows.lengths)
        if group_sizes is None:
            sizes = [group_size or 1] * (responses // (group_size or 1))
        check_group_sizes(sizes, responses)
        if calibration is not None:
            calibration = calibration.to(dtype)
            if len(calibration) != len(sizes):
                calibration = _group_layout(sizes, device).group_mean(calibration)
        if not reads:
            calibration = _nan_where_wrong(_group_layout(sizes, device), ref_logps, calibration, scores, dtype)
        return BatchLayout(rows, sizes, send([0, *accumulate(sizes)], device), calibration)


def _group_layout(sizes: list[int], device: torch.device) -> GroupLayout:
    if min(sizes) == max(sizes):
        return GroupLayout.build(sum(sizes), sizes[0], None, device)
    return GroupLayout.ragged(send(sizes, device), max(sizes), sum(sizes))


def _nan_where_wrong(
    layout: GroupLayout,
    ref_logps: Tensor | None,
    calibration: Tensor | None,
    scores: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """[G] the calibration (ones, if there is none), NaN for groups with a value that would have been refused."""
    vectors = [each for each in (ref_logps, scores) if each is not None]
    if calibration is None and not vectors:
        return None
    h = vectors[0].new_ones(layout.num_groups, dtype=dtype) if calibration is None else calibration
    wrong = ~inputs.valid_calibration(h)
    for each in vectors:
        wrong = wrong | ~layout.pad(each).isfinite().all(1)
    return h.masked_fill(wrong, float("nan"))
