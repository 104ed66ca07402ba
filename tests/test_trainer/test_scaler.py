"""fp16 with torch's scaler of gradients, in whole trainings: on the CPU, where accelerate leaves both out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
CLIP = 0.05
# An overflow in the first step, and from then on room for the gradients of activations.
FIRST, LATER = 2.0**34, 2.0**14


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


class _Scales(TrainerCallback):
    """The scale after each step, and the weights."""

    def __init__(self) -> None:
        self.scaler: Any = None
        self.scales: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scales.append(self.scaler.get_scale())
        self.weights.append(_weights(kwargs["model"]))


@pytest.fixture
def train(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], build_rows: Callable[..., Any]
) -> Callable[..., tuple[Any, _Scales]]:
    """Initial scale (None: fp32), options → a trainer that was run, and what became of the scale and the weights."""

    def run(scale: float | None, **options: Any) -> tuple[Any, _Scales]:
        seen = _Scales()
        seen.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, backoff_factor=LATER / FIRST)
        make = Trainer.create_accelerator_and_postprocess

        def with_scaler(self: Any) -> None:
            make(self)
            self.accelerator.native_amp, self.accelerator.scaler = True, seen.scaler

        with pytest.MonkeyPatch.context() as patch:
            if scale is not None:
                patch.setattr(Trainer, "create_accelerator_and_postprocess", with_scaler)
            defaults = {
                "ref_model": build_model(seed=1),
                "train_dataset": build_rows(12, probs=lambda rng: rng.random()),
                "mode": "dora",
                "lam": 0.05,
                "max_grad_norm": CLIP,
                "max_steps": 3,
                "fp16": scale is not None,
                "callbacks": [seen],
            }
            trainer = make_trainer(build_model(), **{**defaults, **options})
            trainer.train()
        return trainer, seen

    return run


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Of two trainings, as a share of how far the second went."""
    apart = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items())
    moved = sum(float((start[name] - value).square().sum()) for name, value in theirs.items())
    return (apart / moved) ** 0.5


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("optim", [SGD, {"optim": "adamw_torch_fused"}], ids=["sgd", "adamw"])
def test_cuts_of_a_step_agree(optim: dict[str, Any], head: str, train: Any, build_model: Any) -> None:
    start = _weights(build_model())
    exact = train(None, head_route=head, per_device_train_batch_size=12, **optim)[0]
    fp32 = _weights(exact.model)
    for size in (12, 4, 3):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 12 // size, **optim}
        trainer, seen = train(LATER, head_route=head, **options)
        assert type(trainer._window._weighting).__name__ == ("OnePass" if size == 12 else "TwoPass")
        assert seen.scales == [LATER] * 3, "no step overflows"
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        before = [entry for entry in exact.state.log_history if "loss" in entry]
        for ours, theirs in zip(log, before, strict=True):
            assert ours["grad_norm"] > CLIP, "clipping is active"
            for metric in ("loss", "grad_norm", "robust/ess"):
                assert ours[metric] == pytest.approx(theirs[metric], rel=5e-3), metric
        assert _distance(seen.weights[-1], fp32, start) < (1e-2 if optim is SGD else 6e-2), "as far as fp16 rounds"


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("size", [12, 3])
def test_step_that_overflows_is_left_out_by_the_scaler(size: int, policy: str, train: Any, build_model: Any) -> None:
    """It counts as a step of the schedule, and the next ones are those of a run that began after it."""
    start = _weights(build_model())
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 12 // size, **SGD}
    trainer, seen = train(FIRST, on_nonfinite=policy, **options)
    assert seen.scales == [LATER] * 3
    assert all(torch.equal(value, start[name]) for name, value in seen.weights[0].items())
    whole = train(LATER, max_steps=2, **options)[1]
    assert _distance(seen.weights[-1], whole.weights[-1], start) < 2e-3
    assert trainer.state.log_history[0].get("robust/skipped_steps", 0) == 0, "no loss was at fault"
