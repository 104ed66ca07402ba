"""Reference log-probs of a whole data set, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from robust_dpo.trainer.reference import Reference

COLUMN = "ref_logps"


def with_ref_logps(
    dataset: Dataset,
    reference: Reference,
    policy: nn.Module,
    *,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
    accelerator: Accelerator,
    progress: bool,
    name: str,
) -> Dataset:
    """The data set with a column `ref_logps` (K floats per group).

    Batches are made of groups of similar length, each rank computes every n-th batch, and the values do not depend
    on the batch size beyond rounding. Nothing is cached on disk: a resumed run computes them again, from a reference
    whose fingerprint the checkpoint confirms, so they cannot be stale.
    """
    lengths = [
        len(prompt) + max(map(len, responses))
        for prompt, responses in zip(dataset["prompt_ids"], dataset["response_ids"], strict=True)
    ]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, list[float]]] = []
    bar = tqdm(mine, desc=f"Reference log-probs of {name}", disable=not (progress and accelerator.is_main_process))
    for members in bar:
        batch = send_to_device(collator([dataset[index] for index in members]), accelerator.device)
        with accelerator.autocast():
            logps = reference.logps(policy, batch)
        groups = logps.cpu().double().split(batch["group_sizes"].tolist())
        found += [(index, group.tolist()) for index, group in zip(members, groups, strict=True)]
    rows = dict(gather_object(found))
    return dataset.add_column(COLUMN, [rows[index] for index in range(len(dataset))])


def has_ref_logps(dataset: Dataset) -> bool:
    """Whether the rows bring the reference's log-probs."""
    return COLUMN in dataset.column_names
