"""Which checkpoint a run goes on from: the last that is whole."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from robust_dpo.checkpoints.draft import STAGING, adopt, listed_drafts
from robust_dpo.checkpoints.manifest import BrokenCheckpoint, check
from robust_dpo.errors import argument_error, type_error

logger = logging.getLogger(__name__)


def checkpoint_to_resume(asked: object, directory: Path) -> str | None:
    """The folder to resume from, checked.

    Args:
        asked: True for the last whole checkpoint in `directory`, the path of one, or None or False for none.
        directory: of the run's checkpoints.

    Raises:
        TypeError: `asked` is something else.
        ValueError: there is no such checkpoint, or the one that was asked for is not whole.
    """
    if asked is None or asked is False:
        return None
    if asked is True:
        return str(last_whole_checkpoint(directory))
    if not isinstance(asked, str | os.PathLike):
        raise type_error("resume_from_checkpoint", "the path of a checkpoint, True or False", asked)
    folder = Path(asked)
    if not folder.is_dir():
        raise argument_error("resume_from_checkpoint", "the path of a checkpoint", f"{folder}, which is no directory")
    try:
        _check(folder)
    except BrokenCheckpoint as broken:
        expected = "a whole checkpoint; True takes the last one that is"
        raise argument_error("resume_from_checkpoint", expected, f"{folder}: {broken}") from broken
    return str(folder)


def anything_to_resume(directory: Path) -> bool:
    """Whether a directory has checkpoints, or one that lacks but its rename. If one is whole is not looked at."""
    return bool(sort_checkpoints(str(directory))) or any(listed_drafts(directory))


def last_whole_checkpoint(directory: Path) -> Path:
    """The checkpoint of the highest step in a directory that is whole; those that are not are named in the log.

    Raises:
        ValueError: there is none.
    """
    if not directory.is_dir():
        raise argument_error("resume_from_checkpoint", f"a checkpoint in {directory}", "no such directory")
    adopted = adopt(directory)
    if adopted is not None:
        logger.warning("%s: the run was killed when all of this checkpoint was written; it is used", adopted)
    elif (directory / STAGING).is_dir():
        logger.warning("%s: a checkpoint that was being written when the run ended; it is not used", directory)
    folders = [Path(folder) for folder in reversed(sort_checkpoints(str(directory)))]
    for folder in folders:
        try:
            _check(folder)
        except BrokenCheckpoint as broken:
            logger.warning("%s is broken, so the checkpoint before it is used: %s", folder, broken)
            continue
        return folder
    found = f"none that is whole: {', '.join(folder.name for folder in folders)}" if folders else "none"
    raise argument_error("resume_from_checkpoint", f"a checkpoint in {directory}", found)


def _check(folder: Path) -> None:
    if not check(folder):
        logger.warning("%s has no manifest, so it is used without being checked", folder)
