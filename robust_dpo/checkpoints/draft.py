"""A checkpoint while it is written: beside the others, under a name that nobody takes for one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from robust_dpo.checkpoints.manifest import FILE_NAME, BrokenCheckpoint, check, sync_directory, write_manifest

STAGING = ".incomplete"
_REPLACED = "replaced"


class CheckpointError(OSError):
    """A checkpoint cannot be written, or what one holds cannot be used; the message names its path."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint to be.

    Its files go to `staging/name`. They move to `directory/name` by one rename once they are all on the disk: a
    checkpoint is there as a whole or not at all.

    Args:
        directory: of the run's checkpoints.
        name: of the checkpoint.
    """

    directory: Path
    name: str

    @property
    def staging(self) -> Path:
        """Stands in for the run's directory while the checkpoint is written."""
        return self.directory / STAGING

    @property
    def folder(self) -> Path:
        """Where the files are written."""
        return self.staging / self.name

    @property
    def final(self) -> Path:
        """Where they end."""
        return self.directory / self.name

    def begin(self) -> None:
        """Make room, and drop what a killed run left."""
        if self.staging.exists():
            shutil.rmtree(self.staging)
        self.staging.mkdir(parents=True)

    def publish(self) -> None:
        """List the files and let the checkpoint appear, in place of one of the same name if there is one."""
        write_manifest(self.folder)
        self.appear()

    def appear(self) -> None:
        """Move a checkpoint that has its manifest to its place."""
        if self.final.exists():
            # Two renames: between them `adopt` would find the new one.
            self.final.rename(self.staging / _REPLACED)
        self.folder.rename(self.final)
        sync_directory(self.directory)
        shutil.rmtree(self.staging, ignore_errors=True)

    def discard(self) -> None:
        """Give the space back."""
        shutil.rmtree(self.staging, ignore_errors=True)


def listed_drafts(directory: Path) -> Iterator[Draft]:
    """Drafts that have their manifest: all that they lack is their rename, unless they were damaged since."""
    for manifest in (directory / STAGING).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{FILE_NAME}"):
        yield Draft(directory, manifest.parent.name)


def adopt(directory: Path) -> Path | None:
    """Let a checkpoint appear that is whole but for its rename, as a run was killed just before; its path if so."""
    for draft in listed_drafts(directory):
        try:
            check(draft.folder)
        except BrokenCheckpoint:
            continue
        draft.appear()
        return draft.final
    return None
