"""The script and the commands of docs/exactness.md, run as they stand with two processes."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PAGE = (Path(__file__).parents[2] / "docs" / "exactness.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def script() -> str:
    (found,) = [block for block in blocks("python") if "trainer.train()" in block]
    on_cpu = found.replace('report_to="none",', 'report_to="none", use_cpu=True, ddp_backend="gloo",')
    assert on_cpu != found
    return on_cpu


def command(program: str) -> list[str]:
    (found,) = [block for block in blocks("bash") if block.startswith(program)]
    return shlex.split(found)


def with_port(words: list[str]) -> list[str]:
    """The command as modules of this Python, on a port of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program, *rest = words
    if program == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", f"--master-port={port}", *rest]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        rest[0],
        "--main_process_port",
        str(port),
        *rest[1:],
    ]


@pytest.fixture
def folder(tmp_path: Path, build_model: Callable[..., Any], build_rows: Callable[..., Any], tokenizer: Any) -> Path:
    from robust_dpo.trainer import RobustDPOConfig
    from robust_dpo.trainer.data import RowPreparation

    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = RobustDPOConfig(output_dir=str(tmp_path), use_cpu=True, mode="dora")
    rows = build_rows(16, probs=lambda rng: rng.random())
    RowPreparation(args, tokenizer)(rows, "rows").save_to_disk(str(tmp_path / "rows"))
    (tmp_path / "train.py").write_text(script())
    return tmp_path


def run(words: list[str], folder: Path) -> dict[str, torch.Tensor]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "trained" / "model.safetensors")


@pytest.mark.parametrize("program", ["torchrun", "accelerate"])
def test_recipe_trains_the_weights_of_one_process(program: str, folder: Path) -> None:
    words = command(program)
    assert re.search(r"(--nproc-per-node=|--num_processes )2\b", " ".join(words))
    launched = run(with_port(words), folder)
    # The same groups in each step: twice as many in a micro-batch where there is half the number of processes.
    alone = (folder / "train.py").read_text().replace('ddp_backend="gloo",', "")
    (folder / "train.py").write_text(alone.replace("per_device_train_batch_size=2", "per_device_train_batch_size=4"))
    expected = run([sys.executable, "train.py"], folder)
    start = load_file(folder / "model" / "model.safetensors")
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1e-7, "something was learnt"
    for name, value in expected.items():
        torch.testing.assert_close(launched[name], value, rtol=1e-5, atol=1e-7)
