"""`transformers.Trainer` with checkpoints that survive whatever ends the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints, sort_checkpoints

from robust_dpo.checkpoints.draft import CheckpointError, Draft
from robust_dpo.checkpoints.ranks import decided_once, raised_together
from robust_dpo.checkpoints.record import RunRecord
from robust_dpo.checkpoints.resume import checkpoint_to_resume
from robust_dpo.checkpoints.state import load_parts, refuse_nonfinite, save_parts


class CheckpointedTrainer(Trainer):
    """Writes checkpoints aside and lets them appear when they are whole; resumes only from such.

    What transformers saves (weights, optimizer, scheduler, random states, place in the data) is saved by transformers.
    """

    _draft: Draft | None = None
    # Of the parts, from before the first training.
    _first_states: dict[str, dict[str, Any]] | None = None

    def stateful_parts(self) -> Mapping[str, Stateful]:
        """What else has a state that a resumed run needs, by name; the same on every rank."""
        return {}

    def parts_of_weights(self) -> Mapping[str, Stateful]:
        """Those of them that belong to the weights, and come back with the weights of the best checkpoint."""
        return {}

    def run_record(self) -> RunRecord:
        """What a resumed run has to share with this one."""
        return RunRecord()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers; checkpoints are checked before they are used.

        A training that is not resumed begins with the parts as they were before the first one.

        Args:
            resume_from_checkpoint: True goes on from the last checkpoint that is whole; a path from that one, or not
                at all.
            args, kwargs: as in transformers.

        Raises:
            ValueError: there is no such checkpoint, or it is not whole, or the reference is another one.
            CheckpointError: checkpoints cannot be written, or one holds what is not finite.
        """
        directory = Path(self.args.output_dir)

        def checked() -> str | None:
            folder = checkpoint_to_resume(resume_from_checkpoint, directory)
            if folder is not None:
                self.run_record().compare(Path(folder))
            return folder

        folder = decided_once(self.accelerator, checked)
        if self.args.save_strategy != "no":
            self._refuse_unwritable(directory)
        self._renew_parts()
        return super().train(folder, *args, **kwargs)

    def _renew_parts(self) -> None:
        """Take back what an earlier training has made of the parts."""
        parts = self.stateful_parts()
        if self._first_states is None:
            # A state may be the very tensors that the part goes on to change.
            self._first_states = deepcopy({name: part.state_dict() for name, part in parts.items()})
            return
        for name, part in parts.items():
            part.load_state_dict(deepcopy(self._first_states[name]))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which takes one step more where it resumes at the last one, in the middle of an epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """As in transformers; while a checkpoint is written, the directory where that is done."""
        return str(super()._get_output_dir(trial) if self._draft is None else self._draft.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        draft = Draft(Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self._written_whole(draft):
            super()._save_checkpoint(model, trial)
            self._name_best(draft)
            if self.args.should_save:
                self.state.save_to_json(str(draft.folder / TRAINER_STATE_NAME))
                save_parts(draft.folder, self.stateful_parts())
                self.run_record().save(draft.folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(draft.final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(draft.directory), self.args.save_total_limit, best, use_mtime=True)

    @contextmanager
    def _written_whole(self, draft: Draft) -> Iterator[None]:
        """Collect the files of all ranks in the draft and let it appear; on an error it goes, the others stay."""
        self._draft = draft
        try:
            with self._written(draft):
                if self.args.should_save:
                    draft.begin()
            with self._written(draft, waits=self._ranks_save_together):
                yield
            self.accelerator.wait_for_everyone()
            with self._written(draft):
                if self.args.should_save:
                    draft.publish()
        except CheckpointError:
            if self.args.should_save:
                draft.discard()
            raise
        finally:
            self._draft = None

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; after that of a checkpoint, ranks may wait for each other."""
        if self._draft is None:
            super().save_model(*args, **kwargs)
            return
        with self._written(self._draft, waits=self._ranks_save_together):
            super().save_model(*args, **kwargs)

    def _written(self, draft: Draft, *, waits: bool = False) -> AbstractContextManager[None]:
        return raised_together(self.accelerator, lambda reason: _why_not_written(draft, reason), waits=waits)

    def _loaded(self, checkpoint: str, *, waits: bool = False) -> AbstractContextManager[None]:
        rank = self.args.process_index

        def describe(reason: str) -> str:
            on_rank = f" on rank {rank}" if self.args.world_size > 1 else ""
            return f"{checkpoint} cannot be loaded{on_rank}: {reason}; resume from one before it, by its path"

        return raised_together(self.accelerator, describe, waits=waits)

    @property
    def _ranks_save_together(self) -> bool:
        """Whether ranks wait for each other while a model or an optimizer is saved or loaded."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers)

    def _name_best(self, draft: Draft) -> None:
        """Name the best checkpoint by where it is, or will be, and not by where this one is written."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == draft.name or (self.state.best_global_step and (draft.directory / best).is_dir()):
            self.state.best_model_checkpoint = str(draft.directory / best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in transformers, once the checkpoint is where it stays."""
        if self._draft is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._loaded(resume_from_checkpoint, waits=self._ranks_save_together):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self._loaded(checkpoint, waits=self._ranks_save_together):
            super()._load_optimizer_and_scheduler(checkpoint)
        with self._loaded(checkpoint):
            load_parts(Path(checkpoint), self.stateful_parts())
            refuse_nonfinite(self.model, None if self.is_deepspeed_enabled else self.optimizer)

    def _load_best_model(self) -> None:
        """As in transformers, with the parts that belong to those weights."""
        super()._load_best_model()
        best = str(self.state.best_model_checkpoint)
        with raised_together(self.accelerator, lambda reason: f"{best}, the best model, cannot be loaded: {reason}"):
            load_parts(Path(best), self.parts_of_weights())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._loaded(checkpoint):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._loaded(checkpoint):
                super()._load_rng_state(checkpoint)

    def _refuse_unwritable(self, directory: Path) -> None:
        """Find out before the training what would end it at its first checkpoint."""
        expected = f"output_dir: expected a directory for checkpoints, got {directory}"
        with raised_together(self.accelerator, lambda reason: f"{expected}: {reason}"):
            if self.args.should_save:
                draft = Draft(directory, "probe")
                draft.begin()
                draft.staging.rmdir()


def _why_not_written(draft: Draft, reason: str) -> str:
    others = sort_checkpoints(str(draft.directory))
    last = f"the last one is {others[-1]}, to resume from" if others else "there is none before it"
    try:
        free = f"{shutil.disk_usage(draft.directory).free / 1e6:,.1f} MB are free there"
    except OSError as gone:
        free = f"the directory cannot be read: {gone}"
    return f"{draft.final}: the checkpoint cannot be written ({reason}); {free}; {last}"
