"""Metrics of groups: what is averaged, and what a group of one response leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from robust_dpo.trainer.metrics import RunningMeans, known_means, widest_float

NEEDS_OTHERS = {"rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/rejected"}


def test_running_means_weigh_every_number_alike_and_leave_out_nan() -> None:
    means = RunningMeans()
    nan = float("nan")
    means.add({"a": torch.tensor([1.0, 2.0, nan]), "b": torch.tensor([nan, nan, nan])})
    means.add({"a": torch.tensor([6.0]), "b": torch.tensor([nan])})
    means.add({"c": torch.tensor(5.0)})
    accelerator = Accelerator(cpu=True)
    assert means.pop(accelerator) == {"a": 3.0, "c": 5.0}
    assert means.pop(accelerator) == {}


def test_known_means() -> None:
    nan = float("nan")
    means = known_means({"some": torch.tensor([nan, 4.0, 2.0]), "none": torch.tensor([nan])})
    assert {name: float(mean) for name, mean in means.items()} == {"some": 3.0}


def test_sums_are_in_float64_but_on_mps() -> None:
    assert widest_float(torch.device("cpu")) is torch.float64
    assert widest_float(torch.device("mps")) is torch.float32


@pytest.mark.parametrize("pairs", [0, 4], ids=["no pairs", "pairs too"])
def test_groups_of_one_response_do_not_spoil_the_logs(
    pairs: int, make_trainer: Any, build_rows: Any, tokenizer: Any
) -> None:
    def tokens(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    rows = [
        {
            "id": f"{size}-{row['id']}",
            "prompt_ids": tokens(row["prompt"]),
            "response_ids": [tokens(each) for each in row["responses"]],
        }
        for size, count in ((1, 4), (2, pairs))
        for row in build_rows(count, size=size)
    ]
    trainer = make_trainer(train_dataset=rows, eval_dataset=rows, loss_type="sft", mode="erm", max_steps=2)
    trainer.train()
    trainer.evaluate()
    logs = {name: value for log in trainer.state.log_history for name, value in log.items()}
    assert not [name for name, value in logs.items() if value != value]
    for prefix in ("", "eval_"):
        assert prefix + "rewards/chosen" in logs
        assert (prefix + "rewards/margins" in logs) == (pairs > 0)
    if pairs == 0:
        assert not {name for name in logs if name.removeprefix("eval_") in NEEDS_OTHERS}


@pytest.mark.parametrize(("interval", "logged"), [(2, [2, 3]), (3, [3]), (10, [3])])
def test_the_last_steps_are_logged(interval: int, logged: list[int], make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=3, logging_steps=interval)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "rewards/margins" in log] == logged


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_the_last_steps_are_logged_where_a_callback_ends_the_training(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=3, logging_steps=10, callbacks=[_Stop()])
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "rewards/margins" in log] == [2]
