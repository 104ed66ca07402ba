"""Columns that rows may bring ready-made, in place of what is otherwise computed from the model and from `probs`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import pyarrow.compute as pc
import torch
from datasets import Dataset

from robust_dpo.errors import DataError

logger = logging.getLogger(__name__)

CALIBRATION = "calibration"
REF_LOGPS = "ref_logps"

_ROWS_AT_ONCE = 4096
# A batch holds calibrations in this type.
_LARGEST = torch.finfo(torch.float32).max


def warn_of_unread(ignored: Iterable[str], argument: str) -> None:
    """Say that rows of text brought columns that only rows of token ids can bring.

    Args:
        ignored: the columns of the rows that were not read.
        argument: the name of the argument that the rows came in.
    """
    unread = [name for name in (REF_LOGPS, CALIBRATION) if name in ignored]
    if unread:
        logger.warning(
            "%s: %s of rows of text are not used, only of rows that are tokenised already: tokenize_groups makes such "
            "rows, and the columns are added to those",
            argument,
            " and ".join(unread),
        )


def require_fitting_ref_logps(dataset: Dataset, argument: str) -> None:
    """Refuse a reference's log-probs that are not one finite number per response, before the training comes to them."""
    columns = dataset.select_columns(["id", "response_ids", REF_LOGPS]).with_format("arrow")
    for table in columns.iter(batch_size=_ROWS_AT_ONCE):
        logps, responses = table[REF_LOGPS].combine_chunks(), table["response_ids"]
        sizes_fit = pc.all(pc.equal(pc.list_value_length(logps), pc.list_value_length(responses)), skip_nulls=False)
        finite = pc.all(pc.is_finite(pc.list_flatten(logps)), skip_nulls=False)
        if sizes_fit.as_py() and finite.as_py():
            continue
        for row in table.to_pylist():
            values, size = row[REF_LOGPS] or [], len(row["response_ids"])
            if len(values) != size or not all(value is not None and math.isfinite(value) for value in values):
                raise DataError(f"{argument}: row {row['id']!r}: expected {size} finite ref_logps, got {values}")


def require_usable_calibration(dataset: Dataset, argument: str) -> None:
    """Refuse a calibration h that is no number, NaN, infinite or negative, before the training comes to it."""
    columns = dataset.select_columns(["id", CALIBRATION]).with_format("arrow")
    for table in columns.iter(batch_size=_ROWS_AT_ONCE):
        for name, value in zip(table["id"].to_pylist(), table[CALIBRATION].to_pylist(), strict=True):
            if not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
                raise DataError(
                    f"{argument}: row {name!r}: expected a calibration that is at least 0 and finite in float32, "
                    f"got {value}"
                )
