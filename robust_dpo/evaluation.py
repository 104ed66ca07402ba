"""How well a model ranks responses, by implicit reward and by log-prob, over all groups and by source."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from robust_dpo.data import tokenize_groups
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer
from robust_dpo.trainer.metrics import GROUP_METRICS, LOGP_ACCURACIES

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Means over some groups.

    Args:
        groups: number of groups.
        accuracy: share of rejected responses ranked below the chosen one by implicit reward; None without a reference.
        accuracy_se: standard error of `accuracy` over groups.
        margin: implicit reward of the chosen response minus that of the others, β · log-ratio.
        loss: mean preference loss.
        logp_accuracy: the same share by log-prob alone, without the reference.
        token_logp_accuracy: by log-prob per token, so that length plays no part.
        chosen_logp, rejected_logp: mean log-prob of the responses, nats.
    """

    groups: int
    accuracy: float | None
    accuracy_se: float | None
    margin: float | None
    loss: float | None
    logp_accuracy: float
    token_logp_accuracy: float
    chosen_logp: float
    rejected_logp: float


@dataclass(frozen=True)
class Evaluation:
    """`overall`, and `by_source` where every response of a group has the same known source (others: "mixed")."""

    overall: Ranking
    by_source: dict[str, Ranking]
    per_group: dict[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, without the values per group."""
        by_source = {source: asdict(ranking) for source, ranking in self.by_source.items()}
        return {"overall": asdict(self.overall), "by_source": by_source}


def evaluate_ranking(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    ref_model: PreTrainedModel | None = None,
    loss: str = "sigmoid",
    beta: float | None = None,
    max_length: int = 1024,
    batch_size: int = 8,
    progress: bool = False,
) -> Evaluation:
    """Rank the responses of every group.

    Args:
        model: what is evaluated.
        tokenizer: of both models.
        dataset: canonical rows, best response first or scored.
        ref_model: the reference of the implicit reward; None leaves out what needs one.
        loss: a loss with a reference, for `loss` and `margin`; not used without `ref_model`.
        beta: scale of the reward; None is the loss's own.
        max_length: tokens of prompt and response together.
        batch_size: groups at a time; nothing but the speed depends on it.
        progress: show a progress bar.

    Raises:
        DataError: a row cannot be tokenised.
        TypeError, ValueError: an argument that cannot be used.
    """
    tokenised = tokenize_groups(dataset, tokenizer, max_length=max_length)
    sources = _group_sources(tokenised)
    with tempfile.TemporaryDirectory() as scratch:
        args = RobustDPOConfig(
            output_dir=scratch,
            mode="erm",
            # a loss without a reference where there is none; its value is not reported
            loss_type="sft" if ref_model is None else loss,
            beta=None if ref_model is None else beta,
            # no ranking depends on it, and not every model's can be had
            router_aux_loss_coef=0.0,
            per_device_eval_batch_size=batch_size,
            max_length=max_length,
            report_to=[],
            disable_tqdm=not progress,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = RobustDPOTrainer(model, ref_model, args, processing_class=tokenizer)
        table = np.asarray(trainer.predict(tokenised).predictions, dtype=np.float64)
    columns = dict(zip(("loss", "calibration", *GROUP_METRICS, *LOGP_ACCURACIES), table.T, strict=True))
    values = _per_group(columns, with_reference=ref_model is not None)
    members: dict[str, list[int]] = defaultdict(list)
    for index, source in enumerate(sources):
        if source is not None:
            members[source].append(index)
    everything = np.arange(len(tokenised))
    by_source = {source: _ranking(values, np.asarray(index)) for source, index in sorted(members.items())}
    return Evaluation(_ranking(values, everything), by_source, values)


def _group_sources(dataset: Dataset) -> list[str | None]:
    """The source that all responses of a group share, "mixed", or None where no source is known."""
    column: Sequence[list[str] | None] = dataset["sources"] if "sources" in dataset.column_names else [None]
    if column[0] is None and all(entry is None for entry in column):
        return [None] * len(dataset)
    return [None if entry is None else entry[0] if len(set(entry)) == 1 else "mixed" for entry in column]


def _per_group(columns: dict[str, Floats], *, with_reference: bool) -> dict[str, Floats]:
    """The columns of the trainer's table under the names of `Ranking`."""
    values = {name: columns[name] for name in LOGP_ACCURACIES}
    values |= {"chosen_logp": columns["logps/chosen"], "rejected_logp": columns["logps/rejected"]}
    if with_reference:
        values |= {"accuracy": columns["rewards/accuracies"], "margin": columns["rewards/margins"]}
        values["loss"] = columns["loss"]
    return values


def _ranking(values: dict[str, Floats], index: NDArray[np.int64]) -> Ranking:
    def mean(name: str) -> float | None:
        return float(values[name][index].mean()) if name in values else None

    def known(name: str) -> float:
        return float(values[name][index].mean())

    spread = None
    if "accuracy" in values and len(index) > 1:
        spread = float(values["accuracy"][index].std(ddof=1) / math.sqrt(len(index)))
    return Ranking(
        groups=len(index),
        accuracy=mean("accuracy"),
        accuracy_se=spread,
        margin=mean("margin"),
        loss=mean("loss"),
        logp_accuracy=known("logp_accuracy"),
        token_logp_accuracy=known("token_logp_accuracy"),
        chosen_logp=known("chosen_logp"),
        rejected_logp=known("rejected_logp"),
    )
