"""From the rows that a user passes to what the collator takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from robust_dpo.calibration.density_ratio import density_ratio
from robust_dpo.calibration.rows import calibrate_rows
from robust_dpo.data import BadRow, PreferenceCollator, load_preferences, tokenize_groups
from robust_dpo.data.domains import DOMAIN, domain_of
from robust_dpo.data.fingerprint import json_fingerprint, tokenizer_fingerprint
from robust_dpo.errors import DataError, argument_error, type_error
from robust_dpo.robust import RobustObjective
from robust_dpo.trainer.config import RobustDPOConfig
from robust_dpo.trainer.given_columns import (
    CALIBRATION,
    REF_LOGPS,
    require_fitting_ref_logps,
    require_usable_calibration,
    warn_of_unread,
)

Rows: TypeAlias = "Dataset | str | Path | Iterable[Mapping[str, Any]]"
"""A data set, the file or hub name of one, or dictionaries."""

_TOKENISED = {"prompt_ids", "response_ids"}
# Of `density_ratio`; the others are about the shape of `probs`, which rows settle.
_CALIBRATION_OPTIONS = [
    name
    for name, parameter in inspect.signature(density_ratio).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("per_source", "group_size")
]


@dataclass(frozen=True)
class TokenRecipe:
    """How texts became token ids: a hash of the tokenizer, one of its chat template, and the limits, readable."""

    tokenizer: str
    chat_template: str
    truncation: str


@dataclass(frozen=True)
class RowPreparation:
    """Loads, tokenises and calibrates rows as the arguments say.

    Args:
        args: of the run.
        tokenizer: of the model.
        objective: of the run, which may know some domains only; None is one that knows all.

    Raises:
        ValueError: `calibration_options` has a name that `density_ratio` does not know for rows.
    """

    args: RobustDPOConfig
    tokenizer: PreTrainedTokenizerBase
    objective: RobustObjective | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.args.options("calibration_options") if name not in _CALIBRATION_OPTIONS]
        if unknown:
            raise argument_error(
                "calibration_options", f"some of {', '.join(_CALIBRATION_OPTIONS)}", ", ".join(unknown)
            )

    @property
    def collator(self) -> PreferenceCollator:
        return PreferenceCollator.for_tokenizer(self.tokenizer, self.args.pad_to_multiple_of)

    def __call__(self, rows: Rows, argument: str) -> Dataset:
        """Tokenised groups with an `id`, and with a `calibration` and a `domain` where the objective uses them.

        Args:
            rows: anything that `load_preferences` reads, or the output of `tokenize_groups`.
            argument: the name of the argument that the rows came in, for messages.

        Raises:
            TypeError: the rows are a stream.
            DataError: a row cannot be used, or has `ref_logps` or a `calibration` of its own that cannot, or no
                `probs` although the mode is a calibrated one, or no `scores` although the loss reads their values, or
                no domain, or one that is not known, although the objective weighs them.
        """
        if isinstance(rows, IterableDataset | IterableDatasetDict):
            raise type_error(argument, "a data set of known length, not a stream", rows)
        if isinstance(rows, Dataset):
            tokenised = set(rows.column_names) >= _TOKENISED
            dataset = self._with_domains(rows, argument) if tokenised else self._tokenise(rows, argument)
        elif isinstance(rows, str | Path):
            dataset = self._tokenise(rows, argument)
        else:
            rows = list(rows)
            tokenised = bool(rows) and all(row.keys() >= _TOKENISED for row in rows)
            if tokenised:
                dataset = self._with_domains(Dataset.from_list(rows), argument)
            else:
                dataset = self._tokenise(rows, argument)
        if len(dataset) == 0:
            raise argument_error(argument, "at least one row", "none")
        if self.args.bound_loss().needs_scores:
            self._require_scores(dataset, argument)
        if "id" not in dataset.column_names:
            dataset = dataset.add_column("id", [str(index) for index in range(len(dataset))])
        if REF_LOGPS in dataset.column_names:
            require_fitting_ref_logps(dataset, argument)
        if self.args.calibrated and CALIBRATION in dataset.column_names:
            require_usable_calibration(dataset, argument)
        elif self.args.calibrated:
            dataset = dataset.add_column(CALIBRATION, self._calibration(dataset, argument))
        if self.objective is not None and self.objective.needs_domains:
            self._require_known_domains(dataset, argument)
        return dataset

    def objective_for(self, dataset: Dataset | None) -> RobustObjective:
        """The aggregation of the run for training data that were prepared, or for evaluation alone.

        Raises:
            ValueError: it has domains of its own, and not all of theirs.
        """
        objective = self.args.objective()
        if dataset is None or not objective.needs_domains:
            return objective
        return objective.for_domains(sorted(dataset.unique(DOMAIN)))

    @property
    def recipe(self) -> TokenRecipe:
        """How rows become token ids."""
        limits = f"{self.args.max_length} {self.args.max_prompt_length} {self.args.truncation_mode}"
        template = json_fingerprint(self.tokenizer.chat_template)
        return TokenRecipe(tokenizer_fingerprint(self.tokenizer), template, limits)

    def _tokenise(self, rows: Rows, argument: str) -> Dataset:
        """Checked rows as token ids; where they are kept, one process makes them and the others read them."""
        loaded = load_preferences(rows, on_bad_row=self.args.on_bad_row, domain_column=self._domain_column(rows))
        warn_of_unread(loaded.report.ignored_columns, argument)
        with nullcontext() if self.args.cache_dir is None else self.args.main_process_first(desc="tokenising"):
            return tokenize_groups(
                loaded.dataset,
                self.tokenizer,
                max_length=self.args.max_length,
                max_prompt_length=self.args.max_prompt_length,
                truncation=self.args.truncation_mode,
                on_bad_row=self.args.on_bad_row,
                num_proc=self.args.dataset_num_proc,
                cache_dir=self.args.cache_dir,
            )

    def _domain_column(self, rows: Rows) -> str | None:
        """The column that names the domains of rows, where the objective reads them."""
        if not self.args.objective().needs_domains:
            return None
        column = self.args.domain_column or DOMAIN
        if not isinstance(rows, Dataset) or column in rows.column_names:
            return column
        # Rows that were read with the same column have it as their domain by now.
        return DOMAIN if DOMAIN in rows.column_names else column

    def _with_domains(self, dataset: Dataset, argument: str) -> Dataset:
        """Rows that were tokenised elsewhere, with the column `domain` that others get on the way."""
        column = self._domain_column(dataset)
        if column is None or len(dataset) == 0:
            return dataset
        named = [name for name in dict.fromkeys((column, "sources", "id")) if name in dataset.column_names]
        domains = []
        for number, row in enumerate(dataset.select_columns(named)):
            try:
                domains.append(domain_of(row, column, row.get("sources")))
            except BadRow as bad:
                raise DataError(f"{argument}: row {row.get('id', str(number))!r}: {bad}") from bad
        bare = dataset.remove_columns(DOMAIN) if DOMAIN in dataset.column_names else dataset
        return bare.add_column(DOMAIN, domains)

    def _require_known_domains(self, dataset: Dataset, argument: str) -> None:
        """Refuse rows of a domain that has no weight."""
        assert self.objective is not None
        try:
            self.objective.labels_of(dataset.unique(DOMAIN))
        except ValueError as error:
            reason = "only the domains of the training data, or of robust_options={'domains': [...]}, have a weight"
            raise DataError(f"{argument}: {error}; {reason}") from error

    def _require_scores(self, dataset: Dataset, argument: str) -> None:
        """Refuse rows whose scores the collator would have to make up from the order of the responses."""
        scores: list[Any] = dataset["scores"][:] if "scores" in dataset.column_names else [None] * len(dataset)
        missing = sum(row is None for row in scores)
        if missing:
            raise DataError(
                f"{argument}: loss_type={self.args.loss_type!r} reads the values of the scores, but {missing} of "
                f"{len(scores)} rows have no `scores`. Add them, or use a loss that only ranks the responses."
            )

    def _calibration(self, dataset: Dataset, argument: str) -> list[float]:
        """The calibration of every group from the `probs` of its responses."""
        probs: list[Any] = dataset["probs"][:] if "probs" in dataset.column_names else [None] * len(dataset)
        missing = sum(row is None for row in probs)
        if missing:
            raise DataError(
                f"{argument}: mode={self.args.mode!r} weighs groups by how much they look like the target "
                f"distribution, but {missing} of {len(probs)} rows have no `probs`. Add them with `robust-dpo "
                'calibrate` (or robust_dpo.calibration), or use mode="dro" or "erm", which need none.'
            )
        scores = dataset["scores"][:] if "scores" in dataset.column_names else [None] * len(dataset)
        _, groups = calibrate_rows(
            probs,
            scores,
            form=self.args.calibration_form,
            reduce=self.args.calibration_reduce,
            **self.args.options("calibration_options"),
        )
        return groups
