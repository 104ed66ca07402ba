"""Where the reference comes from, and that it stays what it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

from robust_dpo.trainer.dropout import disable_dropout
from robust_dpo.trainer.reference import FrozenModel, PolicyWithoutAdapter, own_reference

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def lora() -> LoraConfig:
    return LoraConfig(**LORA, task_type="CAUSAL_LM")


def reference_logps(trainer: Any, batch: dict[str, Any]) -> Tensor:
    return trainer.preference_output(trainer.model, batch).ref_logps


def test_own_reference_is_a_copy_from_before_training(
    make_trainer: Callable[..., Any],
    build_model: Callable[..., Any],
    whole_batch: Callable[..., Any],
    response_logps: Callable[..., Tensor],
) -> None:
    trainer = make_trainer(build_model())
    batch = whole_batch(trainer)
    trainer.train()
    expected = response_logps(build_model().double(), batch)
    torch.testing.assert_close(reference_logps(trainer, batch).double(), expected, rtol=1e-5, atol=1e-4)
    assert isinstance(trainer.reference, FrozenModel)
    assert not any(parameter.requires_grad for parameter in trainer.reference.model.parameters())
    assert not torch.equal(trainer.reference.model.lm_head.weight, trainer.model.lm_head.weight)


def test_reference_has_no_dropout(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    trainer = make_trainer(
        build_model("gpt2-tied"), ref_model=build_model("gpt2-tied", seed=1).train(), disable_dropout=False
    )
    batch = whole_batch(trainer)
    trainer.model.train()
    first, second = (trainer.preference_output(trainer.model, batch) for _ in range(2))
    assert torch.equal(first.ref_logps, second.ref_logps)
    assert not torch.equal(first.logps, second.logps)


def test_disable_dropout_is_the_default(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    trainer = make_trainer(build_model("gpt2-tied"))
    trainer.model.train()
    first, second = (trainer.preference_output(trainer.model, whole_batch(trainer)) for _ in range(2))
    assert torch.equal(first.logps, second.logps)


def test_attention_dropout_is_disabled_too(build_model: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(build_model("llama", attention_dropout=0.5))
    assert {layer.self_attn.attention_dropout for layer in trainer.model.model.layers} == {0.0}


def test_dropout_of_any_name_is_disabled() -> None:
    """GPT-BigCode calls that of its attention attn_dropout."""
    config = GPTBigCodeConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(24)[None]
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora_changes_only_the_adapter(
    checkpointing: bool,
    make_trainer: Callable[..., Any],
    build_model: Callable[..., Any],
    whole_batch: Callable[..., Any],
    response_logps: Callable[..., Tensor],
) -> None:
    trainer = make_trainer(
        build_model(),
        peft_config=lora(),
        head_route="fused",
        learning_rate=1e-2,
        max_steps=16,
        gradient_checkpointing=checkpointing,
    )
    assert isinstance(trainer.model, PeftModel)
    assert isinstance(trainer.reference, PolicyWithoutAdapter)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.6
    batch = whole_batch(trainer)
    expected = response_logps(build_model().double(), batch)
    trainer.model.train()
    torch.testing.assert_close(reference_logps(trainer, batch).double(), expected, rtol=1e-5, atol=1e-4)
    assert any(module.training for module in trainer.model.modules())


def test_frozen_head_gets_no_gradient(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    trainer = make_trainer(build_model(), peft_config=lora())
    trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
    with_gradient = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}


def test_lora_run_resumes_to_the_same_weights(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], tmp_path: Path
) -> None:
    def make(**options: Any) -> Any:
        torch.manual_seed(7)  # the adapter's random start
        return make_trainer(
            build_model(), peft_config=lora(), save_strategy="steps", save_steps=2, max_steps=4, **options
        )

    whole = make(output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make(output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_peft_model_of_the_user(make_trainer: Callable[..., Any], build_model: Callable[..., Any]) -> None:
    trainer = make_trainer(get_peft_model(build_model(), lora()))
    assert isinstance(trainer.reference, PolicyWithoutAdapter)
    with pytest.raises(ValueError, match="peft_config: expected None for a model that has an adapter already"):
        make_trainer(get_peft_model(build_model(), lora()), peft_config=lora())


@pytest.mark.parametrize("kind", ["own", "given", "adapter"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_precomputed_is_the_live_reference(
    kind: str,
    batch_size: int | None,
    make_trainer: Callable[..., Any],
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    whole_batch: Callable[..., Any],
) -> None:
    def make(**options: Any) -> Any:
        given = {"given": {"ref_model": build_model(seed=1)}, "adapter": {"peft_config": lora()}}.get(kind, {})
        return make_trainer(build_model(), eval_dataset=build_rows(5, seed=2), **given, **options)

    live = make()
    stored = make(precompute_ref_log_probs=True, precompute_ref_batch_size=batch_size)
    assert stored.reference is None
    expected = reference_logps(live, whole_batch(live))
    torch.testing.assert_close(whole_batch(stored)["ref_logps"], expected, rtol=1e-5, atol=1e-4)
    assert stored.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-4)
    torch.manual_seed(0)
    stored.train()
    assert len([entry for entry in stored.state.log_history if "loss" in entry]) == 3


def test_new_rows_after_the_reference_is_released(
    make_trainer: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    trainer = make_trainer(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="eval_dataset: expected rows with ref_logps, as the reference was not kept"):
        trainer.evaluate(build_rows(3, seed=9))


def test_rows_with_ref_logps_need_no_reference(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    source = make_trainer(ref_model=build_model(seed=1))
    expected = source.compute_loss(source.model, whole_batch(source)).item()
    logps = reference_logps(source, whole_batch(source)).view(-1, 2).tolist()
    rows = [{**row, "ref_logps": pair} for row, pair in zip(source.train_dataset, logps, strict=True)]
    trainer = make_trainer(train_dataset=rows)
    assert trainer.reference is None
    assert trainer.compute_loss(trainer.model, whole_batch(trainer)).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="ref_model: expected None: rows have ref_logps"):
        make_trainer(train_dataset=rows, ref_model=build_model(seed=1))


def test_reference_for_a_loss_without_one_is_refused(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="ref_model: expected None: the loss 'simpo' has no reference"):
        make_trainer(loss_type="simpo", ref_model=build_model(seed=1))


def test_resuming_against_another_reference_is_refused(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], tmp_path: Path
) -> None:
    first = make_trainer(build_model(), save_strategy="steps", save_steps=1)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    moved = make_trainer(str(checkpoint))  # the policy as trained so far: a reference that moved
    with pytest.raises(ValueError, match=r"ref_model: expected the reference that .*checkpoint-2 was trained"):
        moved.train(resume_from_checkpoint=str(checkpoint))
    right = make_trainer(str(checkpoint), ref_model=build_model())
    right.train(resume_from_checkpoint=str(checkpoint))
    assert right.state.global_step == 3


@pytest.fixture
def sharded_model(build_model: Callable[..., Any]) -> Iterator[Any]:
    """A model of which a parameter is sharded, over one rank."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    model = build_model()
    whole = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
    yield model
    torch.distributed.destroy_process_group()


def test_sharded_model_is_no_reference(sharded_model: Any, make_trainer: Callable[..., Any]) -> None:
    """A copy, and a hash of all weights, would take what other ranks hold."""
    trainer = make_trainer()
    scorer, accelerator = trainer._scorer, trainer.accelerator
    for make in (
        lambda: own_reference(sharded_model, scorer, accelerator, copy_policy=True),
        lambda: own_reference(sharded_model, scorer, accelerator, copy_policy=False),
        lambda: FrozenModel.of(sharded_model, scorer, accelerator),
    ):
        with pytest.raises(ValueError, match="ref_model: expected a ref_model that every rank has whole, or rows"):
            make()


def test_model_that_deepspeed_has_partitioned_is_no_reference(
    build_model: Callable[..., Any], make_trainer: Callable[..., Any]
) -> None:
    """By its third stage: parameters without contents, which all have the same hash."""
    model = build_model()
    model.lm_head.weight.ds_id = 0
    trainer = make_trainer()
    with pytest.raises(ValueError, match="ref_model: expected a ref_model that every rank has whole"):
        FrozenModel.of(model, trainer._scorer, trainer.accelerator)


def test_sharded_model_is_not_tried_beforehand(sharded_model: Any, make_trainer: Callable[..., Any]) -> None:
    scorer = make_trainer()._planner.scorer(sharded_model, "it", trains=True)
    assert scorer.layout.kind == "padded" and scorer.head.name is None
