"""What the host has to know about a batch before its first matrix product: which rows count, and who forms a group."""

from __future__ import annotations

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
        groups: padded layout of the responses.
        sizes: [G] responses of each group, on the host.
        group_offsets: [G + 1] int64 on the device, where the responses of each group begin, and where the last ends.
        calibration: [G] h in the `dtype` of the losses, or None.
    """

    rows: ResponseRows
    groups: GroupLayout
    sizes: list[int]
    group_offsets: Tensor
    calibration: Tensor | None

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
        contents are not checked then, and what is wrong makes the loss NaN.

        Raises:
            ValueError: a target, a length, a group size or a value is out of its range.
        """
        selection = RowSelection.begin(targets, seq_lens, vocab)
        reads = selection.facts is not None
        flags = inputs.value_flags(ref_logps, calibration, scores) if reads else None
        facts, sizes, raised = fetch(selection.facts, group_sizes, flags)
        if reads:
            inputs.refuse_values(raised, ref_logps, calibration, scores)
        elif calibration is not None:
            calibration = calibration.where(inputs.valid_calibration(calibration), float("nan"))
        rows, device = selection.finish(facts), targets.device
        responses = len(rows.lengths)
        if group_sizes is None:
            size = group_size or 1
            groups, sizes = GroupLayout.build(responses, size, None, device), [size] * (responses // size)
        else:
            check_group_sizes(sizes, responses)
            groups = GroupLayout.ragged(send(sizes, device), max(sizes), responses)
        calibration = inputs.group_calibration(calibration, groups, dtype)
        return BatchLayout(rows, groups, sizes, send([0, *accumulate(sizes)], device), calibration)
