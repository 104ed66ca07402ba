"""Checkpoints that are there as a whole or not at all, are checked before they are used, and hold all a run needs."""

from robust_dpo.checkpoints.draft import CheckpointError
from robust_dpo.checkpoints.manifest import BrokenCheckpoint, check, write_manifest
from robust_dpo.checkpoints.record import RunRecord
from robust_dpo.checkpoints.resume import anything_to_resume, checkpoint_to_resume, last_whole_checkpoint
from robust_dpo.checkpoints.trainer import CheckpointedTrainer

__all__ = [
    "BrokenCheckpoint",
    "CheckpointError",
    "CheckpointedTrainer",
    "RunRecord",
    "anything_to_resume",
    "check",
    "checkpoint_to_resume",
    "last_whole_checkpoint",
    "write_manifest",
]
