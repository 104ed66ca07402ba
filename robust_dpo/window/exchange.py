"""One table of all groups of a global batch, from the parts that ranks have of it, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_dpo.ops.host import send
from robust_dpo.window.ranks import Ranks


class Exchange:
    """Where each group of a window lies; all of it known on the host, so that nothing is read from a device.

    Micro-batch comes before rank, the order in which the sampler dealt the groups: however they are cut, all of them
    are then the same in the same order.

    Args:
        sizes: of each rank and micro-batch the number of groups, whether they count, and the width K of their table.
        device: of the tables.
    """

    def __init__(self, sizes: Sequence[Sequence[tuple[int, bool, int]]], device: torch.device) -> None:
        self._sizes = sizes
        self._most = max(groups for of_rank in sizes for groups, _, _ in of_rank)
        self._widest = max(width for of_rank in sizes for _, _, width in of_rank)
        ranks, micro_batches = len(sizes), len(sizes[0])
        places = [
            (place * ranks + rank) * self._most + group
            for place in range(micro_batches)
            for rank in range(ranks)
            for group in range(sizes[rank][place][0] * sizes[rank][place][1])
        ]
        self._places, self._shape = send(places, device), (micro_batches, ranks, self._most)

    def whole(self, ranks: Ranks, tables: Sequence[Tensor]) -> Tensor:
        """[all groups that count, widest K, C] of the tables [G, K, C] of this rank's micro-batches."""
        room = [(0, 0, 0, self._widest - table.shape[1], 0, self._most - len(table)) for table in tables]
        own = torch.stack([nn.functional.pad(table, pad) for table, pad in zip(tables, room, strict=True)])
        everyone: Tensor = ranks.gather(own[None])
        return everyone.transpose(0, 1).flatten(0, 2).index_select(0, self._places)

    def own(self, ranks: Ranks, values: Tensor) -> list[Tensor]:
        """[G, C] for each micro-batch of this rank, of the values [all groups that count, C]; 0 where none counts."""
        micro_batches, count, most = self._shape
        spread = values.new_zeros(micro_batches * count * most, values.shape[1])
        spread = spread.index_copy(0, self._places, values).view(micro_batches, count, most, -1)
        parts = spread[:, ranks.process_index]
        return [part[:groups] for part, (groups, _, _) in zip(parts, self._sizes[ranks.process_index], strict=True)]
