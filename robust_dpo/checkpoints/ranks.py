"""What happens to one rank, told to all: those that nobody tells wait for it at their next barrier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from robust_dpo.checkpoints.draft import CheckpointError

T = TypeVar("T")

# What the libraries that write and read checkpoints make of a full disk and of a torn file: torch's names neither
# cause nor path. A CheckpointException is no Exception; torch raises it on all ranks.
_FILE_ERRORS = (
    *(OSError, RuntimeError, ValueError, LookupError, EOFError, UnpicklingError),
    *(SafetensorError, CheckpointException),
)


def decided_once(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` gives on the main process, on all of them; an error that it raises there, too."""
    result: T | None = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = decide()
        except (ValueError, TypeError, OSError) as raised:
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


@contextmanager
def raised_together(accelerator: Accelerator, describe: Callable[[str], str], *, waits: bool = False) -> Iterator[None]:
    """Let no rank leave the block where a file cannot be written or read on one.

    Args:
        accelerator: of the run.
        describe: from what an error says to the message.
        waits: ranks wait for each other within the block. The others cannot be told then: the rank that failed ends,
            and its launcher ends them.

    Raises:
        CheckpointError: on every rank, with the message of the first that failed.
    """
    failed: BaseException | None = None
    try:
        yield
    except _FILE_ERRORS as error:
        failed = error
    own = None if failed is None else str(failed) if isinstance(failed, CheckpointError) else describe(_said(failed))
    messages = [message for message in ([own] if waits else gather_object([own])) if message is not None]
    if messages:
        raise CheckpointError(messages[0]) from failed


def _said(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {of_rank}" for rank, (of_rank, _) in error.failures.items())
    return str(error)
