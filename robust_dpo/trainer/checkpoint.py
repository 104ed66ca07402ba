"""What a checkpoint remembers of the reference, so that a resumed run is compared with the same one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from robust_dpo.errors import argument_error

logger = logging.getLogger(__name__)

FILE_NAME = "robust_dpo_reference.json"


def save_reference(folder: Path, weights: str) -> None:
    """Write the hash of the reference's weights into a checkpoint."""
    (folder / FILE_NAME).write_text(json.dumps({"weights": weights}) + "\n")


def check_reference(folder: Path, weights: str) -> None:
    """Refuse to resume against another reference.

    Raises:
        ValueError: the checkpoint was trained against another one.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return
    stored = json.loads(file.read_text()).get("weights")
    if stored is None:
        logger.warning("%s is of an older version: whether the reference is the same cannot be checked", folder)
    elif stored != weights:
        raise argument_error(
            "ref_model",
            f"the reference that {folder} was trained against (the model that the run started from, unless it had a "
            "ref_model of its own)",
            "other weights; load the model that the run started from, not a checkpoint, and resume",
        )
