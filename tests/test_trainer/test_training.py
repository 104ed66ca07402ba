"""Whole runs: what is learnt, logged, saved and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, TrainerCallback

from robust_dpo.errors import DataError
from robust_dpo.trainer.nonfinite import NonFiniteLossError

TRL_NAMES = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"]
TRL_NAMES += ["logps/rejected"]
ROBUST_NAMES = ["robust/ess", "robust/max_weight", "robust/lambda"]


def training_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("route", ["fused", "logits"])
def test_learns_the_preference(route: str, make_trainer: Callable[..., Any], build_rows: Callable[..., Any]) -> None:
    rows = {"train_dataset": build_rows(60), "eval_dataset": build_rows(seed=1)}
    trainer = make_trainer(head_route=route, max_steps=40, learning_rate=3e-3, **rows)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    logs = training_logs(trainer)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are the same
    assert logs[-1]["loss"] < 0.3
    assert logs[-1]["rewards/accuracies"] == 1
    assert after["eval_loss"] < before["eval_loss"] - 0.01


def test_metrics_of_a_step_are_those_of_its_batch(
    make_trainer: Callable[..., Any],
    build_model: Callable[..., Any],
    whole_batch: Callable[..., Any],
    response_logps: Callable[..., Tensor],
) -> None:
    trainer = make_trainer(
        ref_model=build_model(seed=1), max_steps=1, per_device_train_batch_size=12, beta=0.3, mode="dro", lam=0.4
    )
    batch = whole_batch(trainer)
    with torch.no_grad():
        logps = response_logps(build_model().double(), batch)
        rewards = 0.3 * (logps - response_logps(build_model(seed=1).double(), batch)).view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    q = (-logsigmoid(margins) / 0.4).softmax(0)
    trainer.train()
    (log,) = training_logs(trainer)
    expected = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "rewards/margins": margins.mean(),
        "logps/chosen": logps[::2].mean(),
        "logps/rejected": logps[1::2].mean(),
        "robust/ess": 1 / q.square().sum(),
        "robust/max_weight": q.max(),
        "robust/lambda": torch.tensor(0.4),
    }
    for name, value in expected.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    worst = trainer.worst_groups(3)
    # The run shuffles; ids say which group it was.
    assert [name for name, _ in worst] == [f"row-{index}" for index in q.topk(3).indices.tolist()]
    assert [weight for _, weight in worst] == pytest.approx(q.topk(3).values.tolist(), rel=1e-4)


def test_metrics_of_larger_groups(make_trainer: Callable[..., Any], build_rows: Callable[..., Any]) -> None:
    """Chosen is the best scored response, rejected the mean over the others, accuracy the share of them beaten."""
    rows = build_rows(5, size=4, scores=lambda rng: rng.random())
    trainer = make_trainer(loss_type="lire", mode="erm", train_dataset=rows, eval_dataset=rows)
    result = trainer.predict(rows)
    output = trainer.preference_output(trainer.model, trainer.data_collator([*trainer.train_dataset]))
    batch = trainer.data_collator([*trainer.train_dataset])
    lengths = (batch["labels"] != -100).sum(1)
    rewards, scores = (output.logps / lengths).view(5, 4), torch.tensor([row["scores"] for row in rows])
    for group in range(5):
        best = int(scores[group].argmax())
        others = [index for index in range(4) if index != best]
        chosen, rest = rewards[group, best], rewards[group, others]
        expected = [chosen, rest.mean(), (chosen > rest).float().mean(), chosen - rest.mean()]
        assert result.predictions[group, 2:6] == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_evaluation_does_not_depend_on_the_batch_size(
    make_trainer: Callable[..., Any], build_model: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    rows = build_rows(11, seed=3)
    results = []
    for size in (1, 4, 16):
        trainer = make_trainer(
            ref_model=build_model(seed=1), eval_dataset=rows, per_device_eval_batch_size=size, lam=0.2
        )
        results.append(trainer.evaluate())
    names = [f"eval_{name}" for name in ["loss", *TRL_NAMES, *ROBUST_NAMES]]
    for other in results[1:]:
        assert [other[name] for name in names] == pytest.approx([results[0][name] for name in names], rel=1e-4)
    assert 1 < results[0]["eval_robust/ess"] < 11


def test_evaluation_sets_by_name_and_new_rows(make_trainer: Callable[..., Any], build_rows: Callable[..., Any]) -> None:
    trainer = make_trainer(eval_dataset={"one": build_rows(4, seed=1), "two": build_rows(4, seed=2)})
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_rewards/margins", "eval_two_robust/ess"} <= metrics.keys()
    assert "held_loss" in trainer.evaluate(build_rows(3, seed=5), metric_key_prefix="held")


def test_best_model_by_a_preference_metric(make_trainer: Callable[..., Any], build_rows: Callable[..., Any]) -> None:
    trainer = make_trainer(
        eval_dataset=build_rows(seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
        greater_is_better=True,
    )
    trainer.train()
    margins = [entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == max(margins)


class _Stop(TrainerCallback):
    """Ends the run after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"disable_dropout": False},
        {"precompute_ref_log_probs": True},
    ],
    ids=["plain", "accumulation", "dropout", "precomputed"],
)
def test_resumed_run_ends_in_the_same_weights(
    options: dict[str, Any], make_trainer: Callable[..., Any], build_model: Callable[..., Any], tmp_path: Path
) -> None:
    family = "gpt2-tied" if "disable_dropout" in options else "llama"
    common = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, **options}
    whole = make_trainer(build_model(family), output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    killed = make_trainer(build_model(family), output_dir=str(tmp_path / "cut"), callbacks=[_Stop(3)], **common)
    killed.train()
    resumed = make_trainer(build_model(family), output_dir=str(tmp_path / "cut"), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert_identical(weights(resumed.model), weights(whole.model))
    assert [log["loss"] for log in training_logs(resumed)] == [log["loss"] for log in training_logs(whole)]
    for ours, theirs in zip(training_logs(resumed), training_logs(whole), strict=True):
        assert [ours[name] for name in TRL_NAMES] == [theirs[name] for name in TRL_NAMES]


def test_saved_model_is_the_trained_one(make_trainer: Callable[..., Any], tmp_path: Path, tokenizer: Any) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert_identical(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), weights(trainer.model))
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_model_and_tokenizer_from_a_path(
    family: str, make_trainer: Callable[..., Any], build_model: Callable[..., Any], tmp_path: Path, tokenizer: Any
) -> None:
    build_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make_trainer(
        str(tmp_path / "model"),
        # A tokenizer file beside a Qwen model is read by the rules of Qwen's own, which this one does not follow.
        processing_class=tokenizer if family == "qwen2" else None,
        head_route="fused",
        per_device_train_batch_size=12,
    )
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    logs = training_logs(trainer)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_accumulation_of_a_mean_is_one_large_batch(make_trainer: Callable[..., Any]) -> None:
    """Erm is a mean, so here (and only here, until weights span micro-batches) the split does not matter."""
    ends = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            mode="erm", per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd"
        )
        trainer.train()
        ends.append((weights(trainer.model), [log["loss"] for log in training_logs(trainer)]))
    for other, losses in ends[1:]:
        assert losses == pytest.approx(ends[0][1], rel=1e-4)
        for name, value in ends[0][0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(make_trainer: Callable[..., Any]) -> None:
    plain, checkpointed = make_trainer(), make_trainer(gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(checkpointed.model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["fused", "logits"])
def test_bf16_autocast(
    route: str, make_trainer: Callable[..., Any], build_model: Callable[..., Any], whole_batch: Callable[..., Any]
) -> None:
    exact = make_trainer(ref_model=build_model(seed=1))
    half = make_trainer(
        ref_model=build_model(seed=1), bf16=True, head_route=route, learning_rate=3e-3, per_device_train_batch_size=12
    )
    expected = exact.compute_loss(exact.model, whole_batch(exact)).item()
    half.train()
    logs = training_logs(half)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert logs[0]["loss"] == pytest.approx(expected, rel=0.03)
    assert logs[-1]["loss"] < logs[0]["loss"]


class _Spoil(TrainerCallback):
    """Makes the embedding of a row's own token NaN at the start of a step, and heals it afterwards."""

    def __init__(self, step: int, token: int) -> None:
        self.step, self.token = step, token

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.saved = model.model.embed_tokens.weight.data[self.token].clone()
            model.model.embed_tokens.weight.data[self.token] = float("nan")
            self.before = weights(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step + 1:
            self.after = weights(model)
            model.model.embed_tokens.weight.data[self.token] = self.saved


def _spoilt(build_rows: Callable[..., Any], tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
    """Rows of which only row-5 holds the token that is returned."""
    rows = [{**row, "prompt": row["prompt"].replace("w7", "w8").replace("w88", "w8")} for row in build_rows(12)]
    rows = [{**row, "responses": [text.replace("w7", "w8") for text in row["responses"]]} for row in rows]
    rows[5]["prompt"] += " w7"
    return rows, tokenizer.convert_tokens_to_ids("w7")


def test_nonfinite_loss_stops_before_the_step_and_names_the_group(
    make_trainer: Callable[..., Any], build_rows: Callable[..., Any], tokenizer: Any
) -> None:
    rows, token = _spoilt(build_rows, tokenizer)
    spoil = _Spoil(1, token)
    trainer = make_trainer(train_dataset=rows, per_device_train_batch_size=12, callbacks=[spoil])
    with pytest.raises(NonFiniteLossError, match=r"the loss of optimizer step 2 is not finite.*row-5") as caught:
        trainer.train()
    assert caught.value.group_ids == ["row-5"]
    before, after = ({name: v.nan_to_num() for name, v in state.items()} for state in (spoil.before, spoil.after))
    assert_identical(after, before)


def test_nonfinite_steps_are_skipped_and_counted(
    make_trainer: Callable[..., Any], build_rows: Callable[..., Any], tokenizer: Any
) -> None:
    rows, token = _spoilt(build_rows, tokenizer)
    spoil = _Spoil(1, token)
    trainer = make_trainer(
        train_dataset=rows, per_device_train_batch_size=12, callbacks=[spoil], on_nonfinite="skip", weight_decay=0.1
    )
    result = trainer.train()
    before, after = ({name: v.nan_to_num() for name, v in state.items()} for state in (spoil.before, spoil.after))
    assert_identical(after, before)
    logs = training_logs(trainer)
    assert [log["robust/skipped_steps"] for log in logs] == [0, 1, 1]
    first, skipped, last = (log["loss"] for log in logs)
    assert math.isnan(skipped), "no loss is not a loss of 0"
    assert result.training_loss == pytest.approx((first + last) / 2, abs=1e-6)
    assert result.metrics["train_loss"] == trainer.state.log_history[-1]["train_loss"] == result.training_loss
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


@pytest.mark.parametrize("mode", ["erm", "dro"])
def test_logs_are_numbers_that_json_holds(
    mode: str, make_trainer: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    trainer = make_trainer(eval_dataset=build_rows(4, seed=1), mode=mode, eval_strategy="steps", eval_steps=3)
    trainer.train()
    for entry in trainer.state.log_history:
        json.dumps(entry, allow_nan=False)
        assert all(isinstance(value, int | float) for value in entry.values())
    names = set(TRL_NAMES + ROBUST_NAMES) - ({"robust/lambda"} if mode == "erm" else set())
    assert names <= training_logs(trainer)[0].keys()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a model, or the path or name of one, got int"),
        ({"train_dataset": []}, ValueError, "."),
        ({"processing_class": "tokenizer"}, TypeError, "processing_class: expected a tokenizer, got str"),
        ({"peft_config": {"r": 8}}, TypeError, "peft_config: expected a peft.PeftConfig"),
        ({"model_init_kwargs": {"dtype": "float32"}}, ValueError, "model_init_kwargs: expected none for a model"),
        ({"processing_class": None}, ValueError, "processing_class: expected the tokenizer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, make_trainer: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(**arguments)


def test_length_statistics_are_printed_once(make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture) -> None:
    make_trainer(disable_tqdm=False)
    printed = capsys.readouterr().out
    assert printed.count("12 groups, 24 responses") == 1
    assert "layout 'group': expected 1." in printed
    make_trainer(disable_tqdm=False, layout="padded")
    assert "expected" not in capsys.readouterr().out
    make_trainer(disable_tqdm=True)
    assert "groups" not in capsys.readouterr().out


def test_streams_are_refused(make_trainer: Callable[..., Any], build_rows: Callable[..., Any]) -> None:
    from datasets import Dataset

    with pytest.raises(TypeError, match="train_dataset: expected a data set of known length, not a stream"):
        make_trainer(train_dataset=Dataset.from_list(build_rows(4)).to_iterable_dataset())


def test_same_object_as_reference_is_refused(make_trainer: Callable[..., Any], build_model: Callable[..., Any]) -> None:
    model = build_model()
    with pytest.raises(ValueError, match="ref_model: expected another object than model"):
        make_trainer(model, ref_model=model)


@pytest.mark.parametrize("kept", [0, 5], ids=["in no row", "in some rows"])
def test_a_loss_that_reads_scores_refuses_rows_without(
    kept: int, make_trainer: Callable[..., Any], build_rows: Callable[..., Any]
) -> None:
    rows = build_rows(12, size=3, scores=lambda rng: rng.random())
    for row in rows[kept:]:
        del row["scores"]
    expected = rf"train_dataset: loss_type='lire' reads the values of the scores, but {12 - kept} of 12 rows have no"
    with pytest.raises(DataError, match=expected):
        make_trainer(loss_type="lire", train_dataset=rows)
