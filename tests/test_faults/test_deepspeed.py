"""DeepSpeed takes a step within its last backward pass: what is not finite must not reach the weights there either."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_engines import zero
from faulty_runs import Run, environments
from transformers import TrainerCallback

from robust_dpo.trainer.nonfinite import NonFiniteLossError

pytest.importorskip("deepspeed")
STEP = 2
OPTIONS = {"ddp_backend": "gloo", "max_steps": 4, "save_strategy": "no", "eval_strategy": "no", "weight_decay": 0.1}


class _Weights(TrainerCallback):
    """A sum over all weights before each step, in float64."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums.append(_sum(kwargs["model"]))


def _sum(model: Any) -> float:
    return sum(float(each.detach().double().abs().sum()) for each in model.parameters())


class _Steep(torch.autograd.Function):
    """The identity, with a gradient of infinity."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def _outcome(run: Run, fault: str, environment: dict[str, object]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    seen = _Weights()
    trainer = run.trainer(seen)
    forward = trainer._window._weighting._forward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        # On one rank, in its first micro-batch of the step.
        if trainer.state.global_step != STEP or environment["RANK"] != 1 or trainer._window._place:
            return output
        return replace(output, loss=output.loss * float("nan") if fault == "loss" else _Steep.apply(output.loss))

    trainer._window._weighting._forward = spoilt
    told: dict[str, Any] = {"error": None}
    try:
        trainer.train()
    except NonFiniteLossError as error:
        told["error"] = str(error)
    told["sums"] = [*seen.sums, _sum(trainer.model)]
    told["skipped"] = [
        log["robust/skipped_steps"] for log in trainer.state.log_history if "robust/skipped_steps" in log
    ]
    torch.save(told, run.folder.with_name(f"told-{environment['RANK']}"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [1, 2])
def test_step_that_is_not_finite_changes_nothing(stage: int, fault: str, policy: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options={**OPTIONS, **zero(stage), "on_nonfinite": policy})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faulty_runs"])
    processes = [context.Process(target=_outcome, args=(run, fault, each)) for each in environments()]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    told = [torch.load(tmp_path / f"told-{rank}") for rank in range(2)]
    for each in told:
        before, after = each["sums"][STEP : STEP + 2]
        assert before == after
        assert each["sums"][0] != each["sums"][1] != before, "the steps before have moved weights"
        if policy == "stop":
            assert f"the loss of optimizer step {STEP + 1} is not finite" in each["error"]
        else:
            assert each["error"] is None
            assert each["sums"][STEP + 1] != each["sums"][STEP + 2], "and so have those after it"
    if policy == "skip":
        assert told[0]["skipped"] == [0, 0, 1, 1]
