"""The groups of a batch as numbers that ranks can exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.expert_load import ExpertLoad
from robust_dpo.groups import GroupLayout, Groups
from robust_dpo.ops.host import send
from robust_dpo.ops.precision import exact_dtype

# Columns that every table has; after them comes the load of experts.
_COLUMNS = 7


@dataclass(frozen=True)
class GroupTable:
    """All that the objective of a batch depends on; detached.

    Args:
        groups: the responses of each group.
        calibration: [G] h, or None where the objective does not use it.
        labels: [G] int64, the domain of each group by number, likewise.
        load: [G] of the model's experts, or None where the objective does not use it.
    """

    groups: Groups
    calibration: Tensor | None = None
    labels: Tensor | None = None
    load: ExpertLoad | None = None

    def to_tensor(self) -> Tensor:
        """[G, K, C] exact dtype; what is missing is 0. Groups without scores get those that rank them by position.

        C is 7, and with a load of E experts 2E + 1 more, the same for all responses of a group.
        """
        groups, none = self.groups, torch.zeros_like(self.groups.logps)
        columns = (
            groups.mask,
            groups.logps,
            none if groups.ref_logps is None else groups.ref_logps,
            groups.lengths,
            groups.quality,
            none if self.calibration is None else self.calibration[:, None].expand_as(none),
            none if self.labels is None else self.labels[:, None].expand_as(none),
        )
        table = torch.stack([column.to(exact_dtype(none.device)) for column in columns], dim=-1)
        if self.load is None:
            return table
        load = self.load.to_tensor().to(table.dtype)
        return torch.cat([table, load[:, None].expand(-1, table.shape[1], -1)], dim=-1)

    def of_tensor(self, values: Tensor) -> GroupTable:
        """The table [G, K, C] of a larger batch that has what this one has, with any padding along K."""
        present, logps, ref_logps, lengths, scores, calibration, labels = values[..., :_COLUMNS].unbind(-1)
        mask = present == 1
        groups = Groups(
            logps=logps.where(mask, 0.0),
            lengths=lengths.where(mask, 1.0),
            mask=mask,
            ref_logps=None if self.groups.ref_logps is None else ref_logps.where(mask, 0.0),
            scores=scores.where(mask, 0.0),
        )
        return GroupTable(
            groups,
            None if self.calibration is None else calibration[:, 0],
            None if self.labels is None else labels[:, 0].long(),
            None if self.load is None else ExpertLoad.of_tensor(values[:, 0, _COLUMNS:]),
        )


def layout_of(group_sizes: Tensor, device: torch.device) -> GroupLayout:
    """The layout of a collated batch, for vectors on `device`. Reads nothing from it where the sizes are on the CPU."""
    sizes = group_sizes.tolist()
    return GroupLayout.ragged(send(sizes, device), max(sizes), sum(sizes))
