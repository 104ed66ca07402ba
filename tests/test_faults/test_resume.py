"""What a checkpoint remembers besides what transformers saves, and what is refused on resume."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import Run, assert_same_end
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from robust_dpo.checkpoints import CheckpointError, write_manifest
from robust_dpo.errors import DataError
from robust_dpo.robust import Mean
from robust_dpo.trainer import RobustDPOTrainer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the runs that these are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[..., Run]:
    """Options → a run that ended after step 5 with its checkpoint of step 4 as the last."""

    def make(**options: Any) -> Run:
        run = Run(tmp_path / "run", options=options)
        run.trainer(_Stop(5)).train()
        return run

    return make


class _Drifting(Mean):
    """An objective with a state: the more losses it has seen, the larger it takes them to be."""

    def __init__(self) -> None:
        # A frozen dataclass lets no attribute be set.
        vars(self)["drift"] = torch.zeros((), dtype=torch.float64)

    @property
    def key(self) -> str:
        return f"drifting {id(self)}"

    def solve(self, losses: Any, calibration: Any = None, log_normalizer: Any = None) -> Any:
        self.drift.add_(losses.detach().double().sum())
        return super().solve(losses, (1 + self.drift).to(losses.dtype).expand_as(losses), log_normalizer)

    def state_dict(self) -> dict[str, Any]:
        return {"drift": self.drift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drift.copy_(state["drift"])


def test_state_of_the_objective_is_saved_and_loaded(tmp_path: Path) -> None:
    options = {"eval_strategy": "no", "robust": "mean", "optim": "sgd", "learning_rate": 0.1}

    def train(folder: Path, *callbacks: TrainerCallback, resume: bool = False) -> Any:
        trainer = Run(folder, options=options).trainer(*callbacks)
        trainer.objective = replace(trainer.objective, robust=_Drifting())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, _ = train(tmp_path / "whole"), train(tmp_path / "run", _Stop(5))
    resumed = train(tmp_path / "run", resume=True)
    assert torch.equal(resumed.objective.robust.drift, whole.objective.robust.drift)
    for name, value in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), value), name


def test_weights_of_domains_go_on_and_are_those_of_the_same_domains(
    stopped: Callable[..., Run], whole_run: Callable[..., Run]
) -> None:
    options: dict[str, Any] = {"robust": "group_dro", "robust_options": {"step_size": 1.0}}
    run = stopped(**options)
    state = torch.load(run.folder / "checkpoint-4" / "robust_dpo_state.pt", weights_only=True)["objective"]
    assert state["domains"] == ["art", "law", "tax"] and len(set(state["log_weights"].tolist())) == 3
    names = ["art", "law", "prose", "tax"]
    other = Run(run.folder, options={**options, "robust_options": {"domains": names}})
    message = (
        r"checkpoint-4 is of a run with another objective: state: expected that of the domains "
        r"\['art', 'law', 'prose', 'tax'\], got \['art', 'law', 'tax'\]; give this run the rows and .*"
    )
    with pytest.raises(CheckpointError, match=message):
        other.train(resume=True)
    run.train(resume=True)
    assert_same_end(run, whole_run(**options))


def test_weights_of_domains_begin_anew_unless_the_training_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"robust": "group_dro", "robust_options": {"step_size": 1.0}, "learning_rate": 0.0}
    options |= {"disable_dropout": True, "eval_strategy": "no", "save_total_limit": 4}
    trainer = Run(tmp_path / "run", options=options).trainer()
    robust, ends = trainer.objective.robust, []
    for checkpoint in (None, None, tmp_path / "run" / "checkpoint-4", None):
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(robust.weights.clone())
    torch.testing.assert_close(ends, [ends[0]] * 4)
    assert (ends[0] - 1 / 3).abs().max() > 1e-3


def test_objective_that_was_moved_by_hand_begins_there(tmp_path: Path) -> None:
    options: dict[str, Any] = {"robust": "group_dro", "robust_options": {"step_size": 0.0}, "save_strategy": "no"}
    trainer = Run(tmp_path / "run", options={**options, "max_steps": 1}).trainer()
    robust = trainer.objective.robust
    robust.load_state_dict({**robust.state_dict(), "log_weights": torch.tensor([0.5, 0.3, 0.2]).double().log()})
    for _ in range(2):
        trainer.train()
        torch.testing.assert_close(robust.weights, torch.tensor([0.5, 0.3, 0.2]).double())


def test_count_of_skipped_steps_begins_anew_unless_the_training_is_resumed(tmp_path: Path) -> None:
    options = {"on_nonfinite": "skip", "eval_strategy": "no", "max_steps": 3, "save_strategy": "no"}
    trainer = Run(tmp_path / "run", options=options).trainer()
    compute = trainer.preference_output

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        output = compute(*args, **kwargs)
        return replace(output, loss=output.loss * float("nan")) if trainer.state.global_step == 1 else output

    trainer._window._weighting._forward = spoilt
    for _ in range(2):
        trainer.train()
        assert trainer._monitor.guard.skipped_steps == 1


def test_count_of_skipped_steps_goes_on(stopped: Callable[..., Run]) -> None:
    """One step before the checkpoint is skipped, as its loss is not finite, and none after it."""
    run = Run(stopped().folder, options={"on_nonfinite": "skip", "logging_steps": 1})

    def spoil(trainer: RobustDPOTrainer, step: int) -> None:
        compute = trainer.preference_output

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            output = compute(*args, **kwargs)
            return replace(output, loss=output.loss * float("nan")) if trainer.state.global_step == step else output

        trainer._window._weighting._forward = spoilt

    first = run.trainer(_Stop(3))
    spoil(first, 1)
    first.train()
    shutil.rmtree(run.folder / "checkpoint-4")
    second = run.trainer()
    second.train(resume_from_checkpoint=True)
    counts = [log["robust/skipped_steps"] for log in second.state.log_history if "robust/skipped_steps" in log]
    assert counts == [0, 1, 1, 1, 1, 1, 1, 1]


def test_checkpoint_without_that_state_is_resumed_with_a_warning(
    stopped: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    """One that transformers alone has written."""
    run = stopped()
    for name in ("manifest.json", "state.pt", "run.json", "reference.json"):
        (run.folder / "checkpoint-4" / f"robust_dpo_{name}").unlink()
    run.train(resume=True)
    assert "has no manifest" in caplog.text and "no state of skipped_steps" in caplog.text


def test_explicit_path_ends_like_the_whole_run(stopped: Callable[..., Run], whole_run: Callable[..., Run]) -> None:
    run = stopped()
    run.train(resume=str(run.folder / "checkpoint-2"))
    assert_same_end(run, whole_run())


def test_broken_checkpoint_costs_the_steps_since_the_one_before(
    stopped: Callable[..., Run], whole_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped()
    optimizer = run.folder / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    run.train(resume=True)
    assert f"{run.folder / 'checkpoint-4'} is broken" in caplog.text
    assert_same_end(run, whole_run())
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected the path"):
        run.train(resume=str(run.folder / "checkpoint-2"))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("gradient_accumulation_steps", 1, "micro-batches per step: 2, now it is 1"),
        ("per_device_train_batch_size", 2, "groups per micro-batch: 3, now it is 2"),
        ("layout", "padded", "layout: group, now it is padded"),
        ("head_route", "logits", "head: fused, now it is logits"),
        ("bf16", True, "precision: no, now it is bf16"),
    ],
    ids=["accumulation", "batch", "layout", "head", "precision"],
)
def test_other_arithmetic_is_named(
    option: str, value: Any, named: str, stopped: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped()
    Run(run.folder, options={option: value, "max_steps": 5}).train(resume=True)
    messages = [record.getMessage() for record in caplog.records if "was written with" in record.getMessage()]
    assert any(named in message for message in messages)


def test_other_rows_are_named(stopped: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    run = stopped()
    trainer = run.trainer(_Stop(5))
    trainer.train_dataset = trainer.train_dataset.select([*range(1, 15), 0])
    trainer.train(resume_from_checkpoint=True)
    assert "was written with training data (a hash)" in caplog.text


def test_the_same_arithmetic_is_not(stopped: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    stopped().train(resume=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "robust" in record.name]


def _spoil_weights(folder: Path, value: float) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = random.choice(sorted(tensors))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


def _spoil_optimizer(folder: Path, value: float) -> str:
    state = torch.load(folder / "optimizer.pt")
    state["state"][0]["exp_avg_sq"].view(-1)[-1] = value
    torch.save(state, folder / "optimizer.pt")
    return "exp_avg_sq of transformer.wte.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("spoil", [_spoil_weights, _spoil_optimizer], ids=["weights", "optimizer"])
def test_checkpoint_that_is_not_finite_is_refused(
    spoil: Callable[[Path, float], str], value: float, stopped: Callable[..., Run]
) -> None:
    """It is whole, so it is not passed over: what was trained is lost, and its owner has to know."""
    run = stopped()
    folder = run.folder / "checkpoint-4"
    name = spoil(folder, value)
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=f"{folder} cannot be loaded: {name} is not finite"):
        run.train(resume=True)
    run.train(resume=str(run.folder / "checkpoint-2"))


@pytest.mark.parametrize("damage", ["truncated", "of-other-rows", "one-bit", "deleted"])
def test_reference_cache_that_does_not_fit_is_made_again(
    damage: str, stopped: Callable[..., Run], whole_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = stopped(precompute_ref_log_probs=True)
    files = sorted((run.folder / "reference_cache").glob("*.arrow"))
    assert len(files) == 2, "of the training and the evaluation rows"
    contents = [file.read_bytes() for file in files]
    for file, content, other in zip(files, contents, reversed(contents), strict=True):
        if damage == "deleted":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "of-other-rows":
            file.write_bytes(other)
        else:
            values = content.rindex(b"\xc0")  # the last byte of a negative double
            file.write_bytes(content[: values - 1] + bytes([content[values - 1] ^ 1]) + content[values:])
    run.train(resume=True)
    assert_same_end(run, whole_run(precompute_ref_log_probs=True))
    assert [file.read_bytes() for file in files] == contents


@pytest.mark.parametrize(
    "logps",
    [[-1.0, -2.0, -3.0], [-1.0], [-1.0, float("nan")], [float("-inf"), -1.0], [None, -1.0], None],
    ids=["too-many", "too-few", "nan", "inf", "null", "none"],
)
def test_ref_logps_of_the_rows_that_do_not_fit_are_refused(logps: list[float | None] | None, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    trainer = run.trainer()
    rows = [{**row, "ref_logps": logps if row["id"] == "g7" else [-1.0, -2.0]} for row in trainer.train_dataset]
    with pytest.raises(DataError, match="train_dataset: row 'g7': expected 2 finite ref_logps, got"):
        RobustDPOTrainer(
            trainer.model, args=trainer.args, train_dataset=rows, processing_class=trainer.processing_class
        )


def test_best_checkpoint_is_named_by_where_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options={"load_best_model_at_end": True, "save_steps": 3, "save_total_limit": 1})
    trainer = run.trainer()
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == run.folder and best.is_dir()
    stored = load_file(best / "model.safetensors")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(stored[name], value), name


def test_best_model_does_not_change_how_many_steps_were_skipped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_nonfinite": "skip", "eval_steps": 2}
    # The largest loss, so that it is not the last; the last step is skipped after it.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = Run(tmp_path / "run", options={**options, **best}).trainer()
    compute = trainer.preference_output

    def spoilt(model: Any, batch: Any, *args: Any) -> Any:
        output = compute(model, batch, *args)
        last = trainer.state.global_step == trainer.state.max_steps - 1
        return replace(output, loss=output.loss * float("nan")) if last else output

    trainer._window._weighting._forward = spoilt
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    assert trainer._monitor.guard.skipped_steps == 1


def test_best_model_comes_with_its_weights_of_domains(tmp_path: Path) -> None:
    options: dict[str, Any] = {"robust": "group_dro", "robust_options": {"step_size": 2.0}, "eval_steps": 2}
    # The largest loss, so that it is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = Run(tmp_path / "run", options={**options, **best}).trainer()
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    folder = Path(trainer.state.best_model_checkpoint)
    state = torch.load(folder / "robust_dpo_state.pt", weights_only=True)["objective"]
    assert torch.equal(trainer.objective.robust.weights, state["log_weights"].exp())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotation_keeps_the_last_ones(limit: int, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", options={"save_steps": 1, "save_total_limit": limit})
    run.trainer().train()
    assert sorted(path.name for path in run.folder.iterdir()) == [
        f"checkpoint-{9 - step}" for step in range(limit, 0, -1)
    ]


def test_checkpoint_is_pushed_from_where_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload runs on in the background, so it must not read what is moved away."""
    pushed: list[Path] = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(Path(folder)))
    run = Run(tmp_path / "run", options={"max_steps": 2})
    trainer = run.trainer()
    trainer.args.push_to_hub, trainer.push_in_progress = True, None
    trainer.train()
    assert pushed == [run.folder / "checkpoint-2"]
