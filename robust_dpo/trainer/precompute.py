"""Reference log-probs of a whole data set, computed once and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from robust_dpo.checkpoints.ranks import decided_once
from robust_dpo.data.fingerprint import rows_fingerprint
from robust_dpo.data.lengths import TokenLengths
from robust_dpo.errors import DataError, argument_error
from robust_dpo.reference_cache import (
    COLUMN,
    BrokenEntry,
    CacheKey,
    Journal,
    ReferenceCache,
    collator_fingerprint,
    exclusive_journal,
)
from robust_dpo.trainer.data import TokenRecipe
from robust_dpo.trainer.reference import HALF_DTYPES, Reference
from robust_dpo.trainer.scoring import Batch

logger = logging.getLogger(__name__)

Values = npt.NDArray[np.float64]

# Batches that a rank runs between two reads of their results: the device does not wait while the next are prepared, and
# a killed run loses no more than these.
_BATCHES_PER_READ = 8
# Rows that are computed again when a cache is loaded, and how far off they may be: in units of eps(dtype) times their
# log-prob, as batches of other shapes round differently. Products may be in TF32, so eps is no smaller than 1e-4.
_SAMPLE = 4
_ROUNDINGS, _SMALLEST_EPS, _SMALLEST_ERROR = 16.0, 1e-4, 1e-3


@dataclass(frozen=True)
class Precomputation:
    """Runs a reference over data sets, or takes from the cache what it gave before.

    The main process writes, all processes read; they have to see the same directory.

    Args:
        reference, policy: whose log-probs, and the model in training.
        collator: rows → batch.
        accelerator: of the run.
        cache: where log-probs are kept.
        recipe: how the rows became token ids.
        progress: show it.
        workers: processes that prepare batches; 0 is this one.
    """

    reference: Reference
    policy: nn.Module
    collator: Callable[[list[dict[str, Any]]], Batch]
    accelerator: Accelerator
    cache: ReferenceCache
    recipe: TokenRecipe
    progress: bool
    workers: int = 0

    def __call__(self, dataset: Dataset, *, batch_size: int, name: str) -> Dataset:
        """The data set with a column `ref_logps` (K floats per group), memory-mapped.

        Args:
            dataset: tokenised groups.
            batch_size: groups per batch; the values do not depend on it beyond rounding.
            name: of the data set, for messages.

        Raises:
            DataError: the reference gives a response no finite log-prob.
            ValueError: not every process sees the cache.
            OSError: the main process cannot write; on all of them.
        """
        key, lengths = self.key(dataset), TokenLengths.of(dataset)
        if not decided_once(self.accelerator, lambda: self._usable(key, dataset, lengths, name)):
            self._make(key, dataset, lengths, batch_size, name)
        path = self.cache.path(key)
        if not all(gather_object([path.is_file()])):
            raise argument_error("cache_dir", "a directory that all processes see", self.cache.directory)
        return concatenate_datasets([dataset, Dataset.from_file(str(path))], axis=1)

    def _make(self, key: CacheKey, dataset: Dataset, lengths: TokenLengths, batch_size: int, name: str) -> None:
        """Compute the log-probs and let the main process write them."""
        with ExitStack() as until_saved:
            journals: list[Journal | None] = []

            def begin() -> None:
                journal = exclusive_journal(self.cache.journal_path(key), key.digest)
                journals.append(until_saved.enter_context(journal))

            def end() -> None:
                path = self.cache.save(key, values, lengths.sizes)
                until_saved.close()
                logger.info("reference log-probs of %s: wrote %s", name, path)

            self._write(begin, name)
            values = self._compute(dataset, lengths, batch_size, journals[0] if journals else None, name)
            self._write(end, name)

    def _write(self, write: Callable[[], None], name: str) -> None:
        """Let the main process write something; where it cannot, all raise: the others would wait for it."""

        def described() -> None:
            try:
                write()
            except OSError as error:
                reason = f"reference log-probs of {name} cannot be written ({error.strerror or error})"
                raise OSError(error.errno, reason, str(self.cache.directory)) from error

        decided_once(self.accelerator, described)

    def key(self, dataset: Dataset) -> CacheKey:
        """What the log-probs of a data set depend on."""
        check = self.reference.scorer.head.check(self.reference.model_in(self.policy))
        route = "logits" if check.head is None else "fused"
        head = {"route": route, "softcap": check.transform.softcap, "logit_scale": check.transform.logit_scale}
        return CacheKey(
            weights=self.reference.identity.weights,
            configuration=self.reference.identity.configuration,
            tokenizer=self.recipe.tokenizer,
            chat_template=self.recipe.chat_template,
            truncation=self.recipe.truncation,
            head=json.dumps(head),
            autocast=self.accelerator.mixed_precision if self.accelerator.native_amp else "no",
            rows=rows_fingerprint(dataset),
            collator=collator_fingerprint(self.collator),
        )

    def _usable(self, key: CacheKey, dataset: Dataset, lengths: TokenLengths, name: str) -> bool:
        """Whether the cache has the log-probs, and a sample of them is what the reference gives now."""
        path = self.cache.path(key)
        try:
            stored = self.cache.load(key, lengths.sizes)
            if stored is None:
                why = self.cache.why_missing(key)
                logger.info("no reference log-probs of %s in %s%s", name, self.cache.directory, why)
                return False
            self._compare_sample(stored, dataset, lengths)
        except BrokenEntry as broken:
            logger.warning("reference log-probs of %s are computed again: %s: %s", name, path, broken)
            return False
        logger.info("reference log-probs of %s: read %s", name, path)
        return True

    def _compare_sample(self, stored: Dataset, dataset: Dataset, lengths: TokenLengths) -> None:
        """Compute some rows, from the shortest to the longest, again; BrokenEntry if they differ."""
        by_length = np.argsort(lengths.longest, kind="stable")
        members = by_length[np.linspace(0, len(by_length) - 1, min(_SAMPLE, len(by_length))).astype(int)].tolist()
        batch = self.collator([dataset[index] for index in members])
        ours = self._read([self._logps(batch)])
        theirs = np.concatenate([stored[index][COLUMN] for index in members])
        eps = torch.finfo(HALF_DTYPES.get(self.accelerator.mixed_precision, self.reference.identity.dtype)).eps
        allowed = _ROUNDINGS * max(eps, _SMALLEST_EPS) * np.abs(ours) + _SMALLEST_ERROR
        error = np.abs(ours - theirs)
        if not (error <= allowed).all():
            worst = int((error - allowed).argmax())
            raise BrokenEntry(f"a response of log-prob {ours[worst]:.6g} has {theirs[worst]:.6g} there")

    def _compute(
        self, dataset: Dataset, lengths: TokenLengths, batch_size: int, journal: Journal | None, name: str
    ) -> Values:
        """[S] log-probs of all responses, on every process; those in the journal are not computed again."""
        # Batches of similar length, the longest first, so that memory that does not suffice is missing at once.
        order = np.argsort(-lengths.longest, kind="stable")
        sizes = lengths.sizes[order]
        before = np.empty(0) if journal is None else journal.values
        before = broadcast_object_list([before])[0]
        done = int(np.searchsorted(np.cumsum(sizes), len(before), side="right"))
        if done:
            logger.info("reference log-probs of %s: go on after %d of %d rows", name, done, len(order))
        batches = [order[start : start + batch_size].tolist() for start in range(done, len(order), batch_size)]
        found = [before]
        for members, values in self._rounds(dataset, batches, name):
            if not np.isfinite(values).all():
                raise DataError(_no_log_prob(dataset, members, values, lengths))
            found.append(values)
            self._write(partial(_keep, journal, values), name)
        # From the order of computation to that of the rows.
        starts = np.cumsum(lengths.sizes) - lengths.sizes
        target = np.arange(int(sizes.sum())) + np.repeat(starts[order] - (np.cumsum(sizes) - sizes), sizes)
        result = np.empty(len(target))
        result[target] = np.concatenate(found)
        return result

    def _rounds(self, dataset: Dataset, batches: list[list[int]], name: str) -> Iterator[tuple[list[int], Values]]:
        """Rows and their log-probs, in the order of the batches, some batches of every process at a time."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        loader = DataLoader(
            dataset,
            batch_sampler=batches[rank::ranks],
            collate_fn=self.collator,
            num_workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # Drawing from the global one, a run that finds its log-probs in the cache would have another dropout.
            generator=torch.Generator(),
        )
        show = self.progress and self.accelerator.is_main_process
        mine = iter(tqdm(loader, desc=f"Reference log-probs of {name}", disable=not show))
        for start in range(0, len(batches), ranks * _BATCHES_PER_READ):
            logps = [self._logps(batch) for batch in islice(mine, _BATCHES_PER_READ)]
            parts = np.split(self._read(logps), np.cumsum([len(each) for each in logps])[:-1]) if logps else []
            places = range(start + rank, len(batches), ranks)
            everyone = dict(gather_object([*zip(places, parts, strict=False)]))
            members = [row for place in sorted(everyone) for row in batches[place]]
            yield members, np.concatenate([everyone[place] for place in sorted(everyone)])

    def _logps(self, batch: Batch) -> torch.Tensor:
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        with self.accelerator.autocast():
            return self.reference.logps(self.policy, batch)

    @staticmethod
    def _read(logps: list[torch.Tensor]) -> Values:
        """Log-probs of several batches on the host, in one transfer."""
        values: Values = torch.cat(logps).cpu().double().numpy()
        return values


def _keep(journal: Journal | None, values: Values) -> None:
    if journal is not None:
        journal.append(values)


def _no_log_prob(dataset: Dataset, members: list[int], values: Values, lengths: TokenLengths) -> str:
    row = np.repeat(members, lengths.sizes[members])[~np.isfinite(values)][0]
    return f"row {dataset[int(row)]['id']}: the reference gives a response of it no finite log-prob"


def has_ref_logps(dataset: Dataset) -> bool:
    """Whether the rows bring the reference's log-probs."""
    return COLUMN in dataset.column_names
