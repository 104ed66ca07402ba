"""What a training step reads from the device: nothing, but for one packed reduction when it logs."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor
from transformers import TrainerCallback

from robust_dpo.ops import host
from robust_dpo.trainer.nonfinite import NonFiniteGuard, NonFiniteLossError

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def counted_reads(found: list[str]) -> Iterator[None]:
    """Inside, `found` gets the place of every read of a tensor's contents that torch itself does not do."""

    def watch(read: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            # The fused operators read vectors that the collator left on the host through this one place.
            if frames[-1].filename != host.__file__:
                found.append(f"{frames[-1].filename}:{frames[-1].lineno}")
            return read(self, *args, **kwargs)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, watch(getattr(Tensor, name)))
        yield


class CountReads(TrainerCallback):
    """The reads of each optimizer step, from its first micro-batch to its end, logging left out."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([])
        self.context = counted_reads(self.steps[-1])
        self.context.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.__exit__(None, None, None)


@pytest.mark.parametrize("mode", ["erm", "dro"])
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"on_nonfinite": "skip"}], ids=str)
def test_a_step_reads_only_what_the_host_has(
    mode: str, options: dict[str, Any], make_trainer: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    count = CountReads()
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_steps": 2}
    rows = build_rows(30, size=3)
    make_trainer(train_dataset=rows, mode=mode, callbacks=[count], **accumulation, **options).train()
    assert len(count.steps) == 3
    # Sizes of groups, which a packed batch has on the host, and on the CPU whether gradients have to be multiplied.
    reads = {place for step in count.steps for place in step}
    assert {Path(place.rpartition(":")[0]).name for place in reads} <= {"table.py", "rescale_torch.py", "scaling.py"}


def test_an_optimizer_without_fused_step_costs_one_read(
    make_trainer: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    count = CountReads()
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_steps": 9}
    make_trainer(train_dataset=build_rows(30), optim="adamw_torch", callbacks=[count], **accumulation).train()
    guard = [[place for place in step if "nonfinite.py" in place] for step in count.steps]
    assert [len(places) for places in guard] == [1, 1, 1]


def test_the_counter_sees_reads() -> None:
    found: list[str] = []
    with counted_reads(found):
        assert torch.ones(()).item() == 1 and bool(torch.ones(()))
        float(torch.ones(()))
    assert len(found) == 3 and all(__file__ in place for place in found)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "plackett_luce"])
def test_micro_batch_without_contents(
    loss_type: str, make_trainer: Callable[..., Any], build_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without contents cannot give up a number: whatever reads one fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which does not know the meta device
    trainer = make_trainer(
        train_dataset=build_rows(6, size=3), loss_type=loss_type, layout="group", layout_attention="sdpa"
    )
    batch = send_to_device(trainer.data_collator([*trainer.train_dataset]), torch.device("meta"))
    trainer.model.to("meta").train()
    if trainer.reference is not None:
        trainer.reference.model.to("meta")
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    with pytest.raises((NotImplementedError, RuntimeError)):
        trainer._monitor.logs()


def test_loader_keeps_workers_and_copies_without_waiting(make_trainer: Callable[..., Any]) -> None:
    alone = make_trainer().args
    assert (alone.dataloader_persistent_workers, alone.dataloader_num_workers) == (False, 0)
    # On a CPU nothing is pinned, and nothing to be waited for.
    assert alone.accelerator_config.non_blocking == alone.dataloader_pin_memory
    trainer = make_trainer(dataloader_num_workers=1, max_steps=2)
    assert trainer.args.dataloader_persistent_workers
    assert trainer.get_train_dataloader().base_dataloader.persistent_workers
    trainer.train()
    assert not make_trainer(
        dataloader_num_workers=1, dataloader_persistent_workers=False
    ).args.dataloader_persistent_workers


class Spoil(TrainerCallback):
    """Makes a weight infinite for the forward pass of one step, and keeps the weights from before and after steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.after: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weight = model.model.norm.weight.data
        if state.global_step == 0:
            self.after.append(weight.clone())
        if state.global_step == self.step:
            self.healthy = weight[0].clone()
            weight[0] = float("inf")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weight = model.model.norm.weight.data
        if state.global_step == self.step + 1:
            weight[0] = self.healthy
        self.after.append(weight.clone())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("step", [0, 2], ids=["first step", "later step"])
def test_skipped_step_moves_nothing(
    optim: str, step: int, make_trainer: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    spoil = Spoil(step)
    trainer = make_trainer(
        train_dataset=build_rows(12),
        optim=optim,
        weight_decay=0.1,
        max_steps=4,
        logging_steps=4,
        on_nonfinite="skip",
        callbacks=[spoil],
    )
    trainer.train()
    moved = [not torch.equal(one, other) for one, other in zip(spoil.after, spoil.after[1:], strict=False)]
    assert moved == [number != step for number in range(4)]
    log = trainer.state.log_history[0]
    assert log["robust/skipped_steps"] == 1
    assert 0 < log["loss"] < 1, "the mean of the other steps"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("looked", [False, True], ids=["as they come", "after a look at their norm"])
@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0])
def test_skipped_step_of_scaled_gradients(loss: float, looked: bool, fused: bool) -> None:
    """fp16: the scaler takes no step of gradients that nobody has unscaled, and there are none left to unscale."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(
        scaler=scaler,
        distributed_type=DistributedType.NO,
        reduce=lambda value, reduction: value,
        unscale_gradients=scaler.unscale_,
    )
    guard = NonFiniteGuard(accelerator, skip=True)
    scaler.scale(weight.sum()).backward()
    guard.watch(torch.tensor(loss), torch.tensor([loss]), ["a"])
    if looked:
        scaler.unscale_(optimizer)
    guard.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None, optimizer=optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, torch.ones(3)) == (not math.isfinite(loss))
    assert guard.skipped_steps == (not math.isfinite(loss))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("saves", [False, True], ids=["at the end", "before a checkpoint"])
def test_training_stops_with_the_weights_from_before(
    optim: str, saves: bool, make_trainer: Callable[..., Any], build_rows: Callable[..., Any], tmp_path: Path
) -> None:
    """Without logs, the steps that the device was given after the bad one change nothing either."""
    spoil = Spoil(1)
    save = {"save_strategy": "steps", "save_steps": 3} if saves else {}
    trainer = make_trainer(
        train_dataset=build_rows(12), optim=optim, max_steps=5, logging_strategy="no", callbacks=[spoil], **save
    )
    with pytest.raises(NonFiniteLossError, match="optimizer step 2 is not finite") as caught:
        trainer.train()
    assert caught.value.step == 1
    assert not torch.equal(spoil.after[0], spoil.after[1])
    assert all(torch.equal(weight, spoil.after[1]) for weight in spoil.after[2:])
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    # The same trainer trains again once the cause is gone.
    trainer.model.model.norm.weight.data[0] = spoil.healthy
    spoil.step = -2
    trainer.train()
    assert not torch.equal(spoil.after[-1], spoil.after[1])
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")
