"""What happens in the process of a contestant, and what the trained weights are compared with."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel

from robust_dpo.bench.memory import bytes_in_use
from robust_dpo.bench.train_step.contestants import Contestant
from robust_dpo.bench.train_step.data import Row
from robust_dpo.bench.train_step.setting import Setting, use_one_gpu
from robust_dpo.bench.train_step.turnstile import Turnstile

Weights = dict[str, Tensor]
"""Parameters by name, on the CPU."""


@dataclass(frozen=True)
class Finished:
    """What a contestant leaves besides its weights.

    Args:
        peak_bytes: highest memory over the timed steps above the libraries: weights, optimizer, reference, activations.
        step_bytes: of that, what a step adds to what is in use between steps.
        method: how memory was taken.
    """

    peak_bytes: int
    step_bytes: int
    method: str


def train(connection: Connection, contestant: Contestant, setting: Setting, rows: list[Row], weights: Path) -> None:
    """Take all steps, one whenever the parent asks; then save the weights and report."""
    use_one_gpu()
    _hush()
    device = setting.torch_device
    if contestant.wider is not None:
        setting = replace(setting, dtype=contestant.wider[1])
    libraries = bytes_in_use(device)
    turnstile = Turnstile(connection, device, setting.warmups)
    model = contestant.loop.train(setting, rows, turnstile)
    peak = turnstile.peak()
    torch.save(weights_of(model), weights)
    connection.send(None if peak is None else Finished(peak[0] - libraries, peak[0] - turnstile.resident, peak[1]))
    # Not gone before the parent says so: it writes to this process last.
    connection.recv()


def _hush() -> None:
    """No progress bars between the tables, and nothing about what the libraries will remove one day."""
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def weights_of(model: PreTrainedModel) -> Weights:
    return {name: value.detach().cpu() for name, value in model.named_parameters()}


def weight_errors(found: Weights, expected: Weights, start: Weights) -> dict[str, float]:
    """Relative L2 error of the weights, and of what training added to them.

    Args:
        found: to judge.
        expected: by whom.
        start: before training.
    """
    difference = _norm([found[name] - expected[name] for name in expected])
    return {
        "weights": difference / _norm(list(expected.values())),
        "update": difference / _norm([expected[name] - start[name] for name in expected]),
    }


def _norm(values: list[Tensor]) -> float:
    return float(torch.stack([value.double().norm() for value in values]).norm())
