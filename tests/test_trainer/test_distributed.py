"""Two processes under DistributedDataParallel, on CPU with gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json, sys
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

folder, precompute = sys.argv[1], sys.argv[2] == "True"
rows = load_from_disk(folder + "/rows")
args = RobustDPOConfig(
    output_dir=folder + "/run", mode="erm", per_device_train_batch_size=6, max_steps=2, learning_rate=0.1, optim="sgd",
    use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, ddp_backend="gloo",
    head_route="fused", precompute_ref_log_probs=precompute, per_device_eval_batch_size=2,
)
trainer = RobustDPOTrainer(
    folder + "/model", folder + "/reference", args, train_dataset=rows, eval_dataset=rows.select(range(5)),
    processing_class=AutoTokenizer.from_pretrained(folder + "/model"),
)
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(folder + "/end")
if trainer.is_world_process_zero():
    print(json.dumps({"log": trainer.state.log_history, "metrics": metrics, "ranks": args.world_size}))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_two_ranks_are_one_batch_of_twice_the_size(
    precompute: bool,
    tmp_path: Path,
    make_trainer: Callable[..., Any],
    build_model: Callable[..., Any],
    build_rows: Callable[..., Any],
    tokenizer: Any,
) -> None:
    """With erm, a mean, two ranks of 6 groups take the step that one process takes with 12."""
    options = {"mode": "erm", "per_device_train_batch_size": 12, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd"}
    rows = build_rows(12)
    one = make_trainer(
        build_model(), ref_model=build_model(seed=1), train_dataset=rows, eval_dataset=rows[:5], **options
    )
    one.train_dataset.save_to_disk(tmp_path / "rows")
    build_model().save_pretrained(tmp_path / "model")
    build_model(seed=1).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "model")
    one.train()
    expected = one.evaluate()

    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path), str(precompute)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"log"')))
    assert result["ranks"] == 2
    for ours, theirs in zip(result["log"][:2], one.state.log_history[:2], strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected", "eval_robust/ess"):
        assert result["metrics"][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    cached = [*(tmp_path / "run").glob("reference_cache/*")]
    assert [path.suffix for path in cached] == ([".arrow", ".arrow"] if precompute else []), "rank 0 wrote, once"
    end = load_file(tmp_path / "end" / "model.safetensors")
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-5)
