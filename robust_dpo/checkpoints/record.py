"""What a checkpoint remembers of its run, so that a resumed one goes on in the same way or is told that it does not."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from robust_dpo.errors import argument_error

logger = logging.getLogger(__name__)

_REFERENCE_FILE = "robust_dpo_reference.json"
RUN_FILE = "robust_dpo_run.json"


@dataclass(frozen=True)
class RunRecord:
    """What the weights of a run depend on, besides its state.

    Args:
        reference: hash of the reference's weights; None where there is none.
        facts: readable names and values of what changes sums, roundings or the order of the data.
    """

    reference: str | None = None
    facts: dict[str, str | int | None] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        if self.reference is not None:
            (folder / _REFERENCE_FILE).write_text(json.dumps({"weights": self.reference}) + "\n", encoding="utf-8")
        (folder / RUN_FILE).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")

    def compare(self, folder: Path) -> None:
        """Compare with the record of a checkpoint; other facts are named in the log.

        Raises:
            ValueError: the checkpoint was trained against another reference.
        """
        if self.reference is not None:
            _refuse_other_reference(folder, self.reference)
        file = folder / RUN_FILE
        if not file.exists():
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in self.facts.items():
            if before.get(name, value) != value:
                logger.warning(
                    "%s was written with %s: %s, now it is %s; the weights will not be those of an uninterrupted run",
                    *(folder, name, before[name], value),
                )


def _refuse_other_reference(folder: Path, weights: str) -> None:
    file = folder / _REFERENCE_FILE
    if not file.exists():
        return
    stored = json.loads(file.read_text(encoding="utf-8")).get("weights")
    if stored is None:
        logger.warning("%s is of an older version: whether the reference is the same cannot be checked", folder)
    elif stored != weights:
        raise argument_error(
            "ref_model",
            f"the reference that {folder} was trained against (the model that the run started from, unless it had a "
            "ref_model of its own)",
            "other weights; load the model that the run started from, not a checkpoint, and resume",
        )
