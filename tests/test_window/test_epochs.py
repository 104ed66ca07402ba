"""Every group counts once in an epoch: ends of the data, repeated groups, windows that were left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from test_window.toy import FEATURES, Policy, cut, make_batch, make_window, train_step, whole
from torch.utils.data import BatchSampler
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from robust_dpo.losses import resolve
from robust_dpo.robust import KLRobust, RobustObjective
from robust_dpo.window import (
    BatchObjective,
    RoutePlan,
    plan_route,
    refuse_split_model,
    refuse_steps_in_backward,
    refuse_unknown_groups,
)
from robust_dpo.window.real_groups import first_seen, kept


@given(
    groups=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    ranks=st.integers(1, 5),
    split_batches=st.booleans(),
    data=st.data(),
)
def test_what_accelerate_repeats_is_left_out(
    groups: int, batch_size: int, ranks: int, split_batches: bool, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(groups)))
    sampler = BatchSampler(order, batch_size * ranks if split_batches else batch_size, drop_last=False)
    seen = []
    for rank in range(ranks):
        batches = (
            list(BatchSamplerShard(sampler, ranks, rank, split_batches=split_batches)) if ranks > 1 else [*sampler]
        )
        *full, last = batches
        seen += [index for batch in full for index in batch]
        count = first_seen(groups, len(last), rank, ranks) if ranks > 1 else len(last)
        seen += last[:count]
    assert sorted(seen) == list(range(groups))


def test_a_part_of_a_batch_has_the_responses_of_its_groups() -> None:
    sizes = torch.tensor([2, 3, 4])
    batch = {
        "input_ids": torch.arange(9)[:, None],
        "attention_mask": torch.ones(9, 1),
        "labels": torch.arange(9)[:, None],
        "scores": torch.arange(9.0),
        "ref_logps": torch.arange(9.0),
        "group_sizes": sizes,
        "calibration": torch.arange(3.0),
        "ids": ["a", "b", "c"],
        "packed": object(),
    }
    assert kept(batch, 3).batch is batch
    part = kept(batch, 2)
    assert part.counts and part.batch["ids"] == ["a", "b"]
    assert "packed" not in part.batch, "laid out for all groups"
    assert {len(value) for value in part.batch.values()} == {2, 5}
    nothing = kept(batch, 0)
    assert not nothing.counts and nothing.batch["ids"] == ["a"]
    assert nothing.batch["input_ids"].flatten().tolist() == [0, 1]


@pytest.mark.parametrize("route", ["one_pass", "two_pass", "micro_batch"])
def test_a_window_that_the_data_end_in_is_filled_up_with_nothing(route: str) -> None:
    """So that the optimizer step is taken: otherwise its gradients would be part of the next step."""
    objective, batch = KLRobust(lam=0.1), make_batch([2, 2, 3])
    model = Policy(torch.randn(FEATURES, dtype=torch.float64))
    window = make_window(objective, route)
    batches = window.open(model, cut(batch, [2, 1]), 4)
    assert len(batches) == 4
    losses = []
    for part in batches:
        weighed = window.run(model, part)
        losses.append(float(weighed.loss.detach()))
        weighed.loss.backward()
    assert losses[2:] == [0.0, 0.0]
    assert not window.is_open
    if route != "micro_batch":
        solution, gradient = whole(objective, model, batch)
        torch.testing.assert_close(model.weights.grad, gradient)
        torch.testing.assert_close(weighed.solution.weights, solution.weights)


def test_no_data_are_no_window() -> None:
    model = Policy(torch.randn(FEATURES, dtype=torch.float64))
    window = make_window(KLRobust(), "one_pass")
    assert window.open(model, [], 4) == []
    assert not window.is_open


@pytest.mark.parametrize("route", ["one_pass", "two_pass"])
def test_a_window_that_was_left_leaves_no_gradient(route: str) -> None:
    objective, batch = KLRobust(lam=0.1), make_batch([2, 2, 3])
    model = Policy(torch.randn(FEATURES, dtype=torch.float64))
    window = make_window(objective, route)
    first, *_ = window.open(model, cut(batch, [1, 2]), 2)
    window.run(model, first).loss.backward()
    assert window.is_open
    train_step(window, model, cut(batch, [2, 1]))
    torch.testing.assert_close(model.weights.grad, whole(objective, model, batch)[1])


def test_window_that_is_left_is_an_error_where_gradients_are_kept() -> None:
    batch, model = make_batch([2, 2]), Policy(torch.zeros(FEATURES, dtype=torch.float64))
    window = make_window(KLRobust(), "one_pass", keeps_gradients=True)
    first, *_ = window.open(model, cut(batch, [1, 1]), 2)
    window.run(model, first).loss.backward()
    with pytest.raises(RuntimeError, match="a step was left after some of its micro-batches"):
        window.open(model, cut(batch, [1, 1]), 2)


class _Engine:
    """What the choice of a route sees of an accelerator."""

    def __init__(
        self, distributed_type: str = "MULTI_GPU", scaler: object = None, num_processes: int = 2, **options: Any
    ) -> None:
        self.distributed_type, self.scaler, self.num_processes = distributed_type, scaler, num_processes
        self.gradient_state = type("State", (), {"plugin_kwargs": options})()


def _objective(robust: RobustObjective, sft_weight: float = 0.0, loss: str = "sigmoid") -> BatchObjective:
    return BatchObjective(resolve(loss), robust, sft_weight)


BALL = _objective(KLRobust(radius=0.1))
TILT = _objective(KLRobust())
AOT = _objective(KLRobust(), loss="aot")


@pytest.mark.parametrize(
    ("objective", "engine", "micro_batches", "kind", "reason"),
    [
        (TILT, _Engine(), 4, "one_pass", ""),
        (BALL, _Engine(), 1, "two_pass", "coupled by more than one normaliser"),
        (BALL, _Engine(num_processes=1), 2, "two_pass", "coupled by more than one normaliser"),
        (BALL, _Engine(num_processes=1), 1, "two_pass", "coupled by more than one normaliser"),
        (AOT, _Engine(num_processes=1), 1, "in_one", ""),
        (AOT, _Engine(num_processes=1), 2, "two_pass", "'aot' couples the groups"),
        (_objective(KLRobust(), 0.1), _Engine(num_processes=1), 1, "two_pass", "a scale of its own"),
        (TILT, _Engine("DEEPSPEED"), 4, "two_pass", "DeepSpeed takes the gradients"),
        (TILT, _Engine("DEEPSPEED"), 1, "one_pass", ""),
        (TILT, _Engine("FSDP"), 2, "two_pass", "FSDP keeps the gradients"),
        (TILT, _Engine("FSDP"), 1, "one_pass", ""),
        (TILT, _Engine(sync_each_batch=True), 2, "two_pass", "sync_each_batch"),
        (TILT, _Engine(scaler=object()), 2, "two_pass", "activations in fp16"),
        (TILT, _Engine(scaler=object()), 1, "one_pass", ""),
    ],
    ids=[
        *(
            "tilt",
            "radius",
            "radius-accumulated",
            "radius-in-one",
            "aot",
            "aot-accumulated",
            "sft",
            "deepspeed",
            "deepspeed-one",
        ),
        *("fsdp", "fsdp-one", "sync-each-batch", "fp16-scaler", "fp16-scaler-one"),
    ],
)
def test_route(objective: BatchObjective, engine: Any, micro_batches: int, kind: str, reason: str) -> None:
    options = {"accelerator": engine, "micro_batches": micro_batches, "sharded": False}
    plan = plan_route(objective, "global_batch", "auto", **options)
    assert plan.kind == kind
    assert reason in plan.reason and bool(reason) == bool(plan.reason)
    assert plan_route(objective, "global_batch", "two_pass", **options).kind == "two_pass"
    alone = plan_route(objective, "micro_batch", "auto", **options)
    assert alone.scope == "micro_batch"
    assert (
        alone.kind == ("two_pass" if objective.adds_terms else "in_one") and bool(alone.reason) == objective.adds_terms
    )
    assert plan_route(objective, "micro_batch", "two_pass", **options) == RoutePlan("two_pass", "micro_batch")
    if objective.adds_terms:
        with pytest.raises(ValueError, match=r"robust_route: expected 'auto' or 'two_pass': .*a scale of its own"):
            plan_route(objective, "micro_batch", "one_pass", **options)
    if kind == "two_pass":
        with pytest.raises(
            ValueError, match=f"robust_route: expected 'auto' or 'two_pass': .*{reason}.*got 'one_pass'"
        ):
            plan_route(objective, "global_batch", "one_pass", **options)


def test_a_model_that_somebody_else_has_sharded_takes_two_passes() -> None:
    plan = plan_route(TILT, "global_batch", "auto", accelerator=_Engine(), micro_batches=2, sharded=True)
    assert plan.kind == "two_pass" and "FSDP" in plan.reason


class _Arguments:
    train_sampling_strategy = "random"
    dataloader_drop_last = False


class _Ranks:
    def __init__(self, **facts: Any) -> None:
        self.num_processes, self.even_batches, self.dispatch_batches = 2, True, None
        self.parallelism_config, self.distributed_type = None, DistributedType.MULTI_GPU
        self.__dict__.update(facts)


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        ({"train_sampling_strategy": "batch_rebalance"}, {"num_processes": 1}, "dataloader_drop_last: expected True"),
        ({}, {"even_batches": False}, "accelerator_config: expected even_batches=True on several ranks"),
        ({}, {"dispatch_batches": True}, "accelerator_config: expected dispatch_batches=False"),
        (
            {"ddp_static_graph": True},
            {},
            "ddp_static_graph: expected False: it looks for the loss in the model's output",
        ),
        (
            {},
            {"parallelism_config": type("P", (), {"tp_size": 1, "cp_size": 2})()},
            "parallelism_config: expected cp_size=1: every rank has to have groups of its own, got 2",
        ),
    ],
    ids=["batch-rebalance", "even-batches", "dispatch-batches", "static-graph", "parallelism"],
)
def test_refuses_to_guess_who_has_which_groups(arguments: dict[str, Any], ranks: dict[str, Any], message: str) -> None:
    args = _Arguments()
    refuse_unknown_groups(args, _Ranks())
    args.__dict__.update(arguments)
    with pytest.raises(ValueError, match=message):
        refuse_unknown_groups(args, _Ranks(**ranks))


def test_refuses_processes_that_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them where transformers finds no GPU and is not told to use CPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_unknown_groups(_Arguments(), _Ranks())
    with pytest.raises(ValueError, match=r"use_cpu=True and ddp_backend='gloo'.*, got one for 1 of the 2"):
        refuse_unknown_groups(_Arguments(), _Ranks(num_processes=1))


def test_refuses_a_model_that_is_split_over_devices() -> None:
    model = Policy(torch.zeros(FEATURES))
    refuse_split_model(model, "model")
    model.hf_device_map = {"": 0}
    refuse_split_model(model, "model")
    model.hf_device_map = {"layer.0": 0, "layer.1": 1}
    with pytest.raises(ValueError, match=r"model: expected a model on one device of each process.* over 0, 1"):
        refuse_split_model(model, "model")


def test_refuses_stages_of_a_pipeline() -> None:
    model = Policy(torch.zeros(FEATURES))
    model.config = SimpleNamespace(distributed_config=SimpleNamespace(pp_size=1))
    refuse_split_model(model, "model")
    model.config.distributed_config.pp_size = 2
    with pytest.raises(ValueError, match=r"model: expected a model without pipeline stages.* got pp_size=2"):
        refuse_split_model(model, "model")


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_refuses_optimizers_that_step_within_backward(name: str) -> None:
    """Weights would move before those of the whole step are known."""
    args = TrainingArguments(output_dir="never-made", optim=name, use_cpu=True)
    refuse_steps_in_backward(args, _Ranks(num_processes=1))
    steps = "lomo" in name or "layerwise" in name
    for micro_batches, ranks in ((2, 1), (1, 2)):
        args.gradient_accumulation_steps = micro_batches
        if not steps:
            refuse_steps_in_backward(args, _Ranks(num_processes=ranks))
            continue
        with pytest.raises(ValueError, match=f"optim: .* has {micro_batches} on each of {ranks} ranks, got '{name}'"):
            refuse_steps_in_backward(args, _Ranks(num_processes=ranks))


def test_refuses_the_stage_of_deepspeed_that_takes_every_step() -> None:
    args = TrainingArguments(output_dir="never-made", use_cpu=True)
    for stage in (1, 2, 3, 0):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        ranks = _Ranks(distributed_type=DistributedType.DEEPSPEED, state=state)
        if stage:
            refuse_steps_in_backward(args, ranks)
            continue
        with pytest.raises(ValueError, match=r"deepspeed: expected zero_optimization of stage 1, 2 or 3.*got stage 0"):
            refuse_steps_in_backward(args, ranks)


def test_a_stream_on_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    window = make_window(KLRobust(), "one_pass")
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    loader = type("Loader", (), {"dataset": object()})()
    state = {"in_dataloader": True, "active_dataloader": loader, "end_of_dataloader": False}
    monkeypatch.setattr(window._accelerator, "gradient_state", type("State", (), state)())
    with pytest.raises(TypeError, match="train_dataset: expected a data set of known length on several ranks"):
        window.open(Policy(torch.zeros(FEATURES)), [make_batch([2])], 1)
