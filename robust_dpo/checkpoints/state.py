"""State that transformers does not know of, and a look at what was loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from robust_dpo.checkpoints.draft import CheckpointError

logger = logging.getLogger(__name__)

_FILE = "robust_dpo_state.pt"


def save_parts(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Write the state of parts, by name; states hold what `torch.load` reads with `weights_only`."""
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / _FILE)


def load_parts(folder: Path, parts: Mapping[str, Stateful]) -> None:
    """Give parts the state that a checkpoint has of them; those that it does not know of begin anew, with a warning.

    Raises:
        CheckpointError: a part refuses its state, which is that of another one.
    """
    file = folder / _FILE
    stored = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}
    for name, part in parts.items():
        if name in stored:
            try:
                part.load_state_dict(stored[name])
            except ValueError as other:
                remedy = "give this run the rows and arguments of that one"
                raise CheckpointError(f"{folder} is of a run with another {name}: {other}; {remedy}") from other
        else:
            logger.warning("%s has no state of %s, which begins anew", folder, name)


def refuse_nonfinite(model: nn.Module, optimizer: Any) -> None:
    """Look at trained weights and the optimizer's state, as far as this rank holds them.

    Args:
        model: in training.
        optimizer: None where its state lies elsewhere.

    Raises:
        ValueError: one of them is not finite.
    """
    bad = [name for name, tensor in _trained(model, optimizer) if not bool(_local(tensor).isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{more} is not finite")


def _trained(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters and the optimizer's floating tensors, by name."""
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[parameter] = name
            yield name, parameter.detach()
    for parameter, state in ({} if optimizer is None else optimizer.state).items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{key} of {names.get(parameter, 'a parameter')}", value


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
