"""RobustDPOConfig: what it accepts, what it refuses, what it stands for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from robust_dpo.robust import DrDPO, KLRobust, Mean
from robust_dpo.trainer import RobustDPOConfig


def build(**options: Any) -> RobustDPOConfig:
    return RobustDPOConfig(**{"output_dir": "unused", "use_cpu": True, "report_to": "none", **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "worst"}, ValueError, "mode: expected one of erm, reweight, dro, dora, dora_outside, got 'worst'"),
        ({"lam": 0.0}, ValueError, "lam: expected a number in (0, inf), got 0.0"),
        ({"lam": float("nan")}, ValueError, "lam: expected"),
        ({"radius": -0.1}, ValueError, "radius: expected a number in [0, inf), got -0.1"),
        ({"loss_type": "nonsense"}, ValueError, "loss: expected one of"),
        ({"loss_type": ["sigmoid", "sft"]}, TypeError, "loss_type: expected the name of one loss, got list"),
        ({"beta": -1.0}, ValueError, "beta: expected a number in (0, inf), got -1.0"),
        ({"label_smoothing": 0.1}, TypeError, "options of loss 'sigmoid': expected none, got label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing: expected"),
        ({"loss_options": {"gamma": 1.0}}, TypeError, "options of loss 'sigmoid': expected none, got gamma"),
        (
            {"loss_type": "cdpo", "label_smoothing": 0.1, "loss_options": {"label_smoothing": 0.2}},
            ValueError,
            "label_smoothing: expected one value, not also one in loss_options, got 0.1",
        ),
        ({"loss_options": "gamma"}, TypeError, "loss_options: expected a dictionary, got str"),
        ({"backend": "tritn"}, ValueError, "backend: expected one of auto, cpu, cuda, torch, triton, got 'tritn'"),
        ({"backend": "cuda"}, ValueError, "backend: expected one that runs on cpu, got 'cuda': it is not "),
        ({"backend": None}, TypeError, "backend: expected the name of a backend, or 'auto', got NoneType"),
        ({"robust": "cvarr"}, ValueError, "robust: expected one of"),
        ({"robust_options": {"beta": 1.0}}, ValueError, "robust_options: expected none without robust"),
        (
            {"robust": "dr_dpo", "robust_options": {"lam": 1.0}},
            ValueError,
            "robust_options: expected parameters of 'dr_dpo': beta, got lam",
        ),
        ({"calibration_form": "exact"}, ValueError, "calibration_form: expected one of paper, mixture, official"),
        ({"calibration_reduce": "max"}, ValueError, "calibration_reduce: expected one of"),
        ({"on_bad_row": "skip"}, ValueError, "on_bad_row: expected one of error, drop, got 'skip'"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite: expected one of stop, skip, got 'ignore'"),
        ({"robust_scope": "batch"}, ValueError, "robust_scope: expected one of global_batch, micro_batch, got 'batch'"),
        ({"robust_route": "fast"}, ValueError, "robust_route: expected one of auto, one_pass, two_pass, got 'fast'"),
        ({"head_route": "fast"}, ValueError, "head_route: expected one of auto, fused, logits, got 'fast'"),
        ({"truncation_mode": "middle"}, ValueError, "truncation_mode: expected one of keep_end, keep_start"),
        ({"max_length": 0}, ValueError, "max_length: expected at least 1, or None, got 0"),
        ({"max_length": 64.0}, TypeError, "max_length: expected an integer of at least 1, or None, got float"),
        (
            {"max_length": 64, "max_prompt_length": 64},
            ValueError,
            "max_prompt_length: expected less than max_length=64, got 64",
        ),
        ({"pad_to_multiple_of": -8}, ValueError, "pad_to_multiple_of: expected at least 1, or None, got -8"),
        ({"precompute_ref_batch_size": 0}, ValueError, "precompute_ref_batch_size: expected at least 1"),
        ({"cache_dir": 3}, TypeError, "cache_dir: expected the path of a directory, or None, got int"),
        ({"dataset_num_proc": 0}, ValueError, "dataset_num_proc: expected at least 1, or None, got 0"),
        ({"mode": "erm", "radius": 0.1}, ValueError, "radius: expected None with mode='erm'"),
        ({"robust": "cvar", "radius": 0.1}, ValueError, "radius: expected None beside robust='cvar'"),
        ({"robust": "cvar", "lam": 0.1}, ValueError, "lam: expected None beside robust='cvar'"),
        ({"radius": 0.1, "lam": 0.1}, ValueError, "lam: expected None beside radius=0.1, from which λ is found"),
        ({"batch_eval_metrics": True}, ValueError, "batch_eval_metrics: expected False"),
        ({"remove_unused_columns": True}, ValueError, "remove_unused_columns: expected False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        build(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "objective", "calibrated"),
    [
        ({"mode": "erm"}, Mean(), False),
        ({"mode": "reweight"}, Mean(), True),
        ({"mode": "dro", "lam": 0.5}, KLRobust(lam=0.5), False),
        ({"mode": "dora", "radius": 0.2}, KLRobust(radius=0.2), True),
        ({"mode": "dora_outside"}, KLRobust(lam=1.0, calibration="outside"), True),
        ({"mode": "reweight", "robust": "dr_dpo", "robust_options": {"beta": 0.3}}, DrDPO(beta=0.3), True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_mode_says_objective_and_calibration(options: dict[str, Any], objective: object, calibrated: bool) -> None:
    config = build(**options)
    assert config.objective() == objective
    assert config.calibrated is calibrated


@pytest.mark.parametrize(
    ("loss", "beta", "reward_beta"), [("sigmoid", None, 0.1), ("simpo", 1.5, 1.5), ("sft", 3.0, 1)]
)
def test_beta_of_the_rewards_is_the_one_in_force(loss: str, beta: float | None, reward_beta: float) -> None:
    assert build(loss_type=loss, beta=beta).reward_beta == reward_beta


def test_trl_spelling_of_one_loss() -> None:
    assert build(loss_type=["ipo"]).bound_loss().name == "ipo"


def test_label_smoothing_reaches_the_loss() -> None:
    arguments = dict(build(loss_type="cdpo", label_smoothing=0.2).bound_loss().arguments)
    assert arguments == {"beta": 0.1, "label_smoothing": 0.2}


@pytest.mark.parametrize("mode", ["dro", "dora", "dora_outside"])
def test_warns_of_weights_that_depend_on_the_layout(mode: str) -> None:
    with pytest.warns(UserWarning, match=r'robust_scope="micro_batch": the objective depends on how .* ranks\.'):
        build(mode=mode, robust_scope="micro_batch")
    with pytest.warns(UserWarning, match=f"with one group in each mode='{mode}' weighs nothing"):
        build(mode=mode, robust_scope="micro_batch", per_device_train_batch_size=1)


@pytest.mark.parametrize(
    "options", [{"sft_weight": 0.5}, {"loss_type": "aot"}, {"router_aux_loss_coef": 0.1}], ids=["sft", "aot", "router"]
)
def test_warns_of_other_couplings_within_a_micro_batch(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r'"micro_batch": the objective depends on how the batch is cut .* ranks\.$'):
        build(mode="erm", robust_scope="micro_batch", per_device_train_batch_size=1, **options)


@pytest.mark.parametrize(
    "options",
    [{"mode": "erm", "robust_scope": "micro_batch"}, {"mode": "dro", "per_device_train_batch_size": 1}],
    ids=["nothing is weighed", "weights span the global batch"],
)
def test_does_not_warn_where_the_layout_changes_nothing(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(**options)


def test_cache_dir_is_text_and_accelerate_settings_of_the_user_stay() -> None:
    config = build(cache_dir=Path("some") / "folder", accelerator_config={"even_batches": False})
    assert config.cache_dir == str(Path("some") / "folder")
    assert config.accelerator_config.even_batches is False
    assert config.accelerator_config.non_blocking is False


def test_command_line_and_json_round_trip(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--mode", "dora", "--loss_type", "cdpo"]
    line += ["--loss_options", '{"label_smoothing": 0.3}', "--calibration_form", "mixture"]
    (config,) = HfArgumentParser(RobustDPOConfig).parse_args_into_dataclasses(line)
    assert dict(config.bound_loss().arguments)["label_smoothing"] == 0.3
    (tmp_path / "config.json").write_text(config.to_json_string())
    (again,) = HfArgumentParser(RobustDPOConfig).parse_json_file(str(tmp_path / "config.json"))
    assert again.bound_loss() == config.bound_loss()
    assert again.objective() == config.objective()
    assert again.calibration_form == "mixture"
