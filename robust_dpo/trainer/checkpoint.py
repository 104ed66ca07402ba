"""What a checkpoint remembers of the reference, so that a resumed run is compared with the same one."""

from __future__ import annotations

import json
from pathlib import Path

from robust_dpo.errors import argument_error

FILE_NAME = "robust_dpo_reference.json"


def save_reference(folder: Path, fingerprint: str) -> None:
    """Write the reference's fingerprint into a checkpoint."""
    (folder / FILE_NAME).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")


def check_reference(folder: Path, fingerprint: str) -> None:
    """Refuse to resume against another reference.

    Raises:
        ValueError: the checkpoint was trained against another one.
    """
    file = folder / FILE_NAME
    if file.exists() and json.loads(file.read_text())["fingerprint"] != fingerprint:
        raise argument_error(
            "ref_model",
            f"the reference that {folder} was trained against (the model that the run started from, unless it had a "
            "ref_model of its own)",
            "other weights; load the model that the run started from, not a checkpoint, and resume",
        )
