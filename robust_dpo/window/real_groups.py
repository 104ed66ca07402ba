"""Which groups of a batch are there for the first time in an epoch."""

from __future__ import annotations

from robust_dpo.window.weighting import Batch, MicroBatch

# What a collated batch holds once per group, and once per response. Anything else (a packed layout) is made anew.
_PER_GROUP = ("group_sizes", "calibration", "ids", "domains")
_PER_RESPONSE = ("input_ids", "attention_mask", "labels", "scores", "ref_logps")


def first_seen(groups: int, batch_size: int, rank: int, ranks: int) -> int:
    """How many groups of a rank's last batch of an epoch are not repeated.

    accelerate deals whole batches to the ranks in turn, and fills up the last round with the groups that the epoch
    began with, so that all ranks have as many batches of the same size.

    Args:
        groups: of the data set.
        batch_size: of that batch.
        rank, ranks: whose it is, and of how many.
    """
    remainder = groups % (batch_size * ranks)
    return batch_size if remainder == 0 else min(batch_size, max(0, remainder - rank * batch_size))


def kept(batch: Batch, count: int) -> MicroBatch:
    """The first `count` groups of a batch; for 0, its first group, which then weighs nothing.

    A rank without a group that counts runs one anyway: the others wait for it where gradients are reduced.
    """
    if count >= len(batch["group_sizes"]):
        return MicroBatch(batch, counts=True)
    groups = max(1, count)
    responses = int(batch["group_sizes"][:groups].sum())
    part = {name: batch[name][:groups] for name in _PER_GROUP if name in batch}
    part |= {name: batch[name][:responses] for name in _PER_RESPONSE if name in batch}
    return MicroBatch(part, counts=count > 0)
