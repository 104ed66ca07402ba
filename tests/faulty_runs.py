"""Small training runs in processes of their own, to be killed and resumed from what is left."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu_engines import deepspeed_on_cpu, shard_on_cpu, whole
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

_WORDS = 40
_TOKENIZER = Tokenizer(models.WordLevel({f"w{index}": index for index in range(_WORDS)}, unk_token="w0"))
# What changes a file or a directory and that Python tells of before it does.
_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        folder: of its checkpoints.
        model: "dropout" (all weights), "lora" (with dropout of its own).
        options: of RobustDPOConfig.
    """

    folder: Path
    model: str = "dropout"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> Path:
        """All state at the end of the run."""
        return self.folder / "end.pt"

    def output(self) -> str:
        """The end of what its processes printed."""
        return self.folder.with_suffix(".log").read_text()[-3000:]

    def trainer(self, *callbacks: TrainerCallback) -> RobustDPOTrainer:
        if self.options.get("fsdp"):
            shard_on_cpu()
        if self.options.get("deepspeed"):
            deepspeed_on_cpu()
        rows = _rows()
        fields: dict[str, Any] = {
            "output_dir": str(self.folder),
            "mode": "dora",
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "logging_steps": 1,
            "disable_dropout": False,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return RobustDPOTrainer(
            _model(self.model),
            args=RobustDPOConfig(**{**fields, **self.options}),
            train_dataset=rows,
            eval_dataset=rows[:4],
            processing_class=PreTrainedTokenizerFast(tokenizer_object=_TOKENIZER, pad_token="w0", eos_token="w1"),
            peft_config=LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"]) if self.model == "lora" else None,
            callbacks=[*callbacks],
        )

    def train(self, resume: bool | str = False) -> None:
        """Train in this process, and keep all state of the end."""
        torch.set_num_threads(1)
        trainer = self.trainer()
        trainer.train(resume_from_checkpoint=resume)
        optimizer = trainer.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        moments = dict(enumerate(optimizer.state.values()))
        state = {
            "model": {name: whole(value) for name, value in trainer.model.state_dict().items()},
            "optimizer": {name: {key: whole(value) for key, value in each.items()} for name, each in moments.items()},
            "scheduler": trainer.lr_scheduler.state_dict(),
            "parts": {name: part.state_dict() for name, part in trainer.stateful_parts().items()},
            "log": [
                {name: log[name] for name in ("step", "loss", "grad_norm") if name in log} for log in _steps(trainer)
            ],
        }
        if trainer.is_world_process_zero():
            torch.save(state, self.end)


def start(
    run: Run, resume: bool | str = False, *, kill_at: int | None = None, environment: dict[str, object] | None = None
) -> Any:
    """The process of a run; it kills itself before its `kill_at`-th change of a file of the run (from 0)."""
    context = multiprocessing.get_context("forkserver")
    # Imports once what every run needs.
    context.set_forkserver_preload(["faulty_runs"])
    process = context.Process(target=_child, args=(run, resume, kill_at, environment or {}))
    process.start()
    return process


def finish(run: Run, resume: bool | str = False, *, kill_at: int | None = None) -> int:
    """Run a process to its end; the exit code, negative for a signal."""
    process = start(run, resume, kill_at=kill_at)
    process.join(120)
    assert process.exitcode is not None, "a run of seconds has not ended"
    return int(process.exitcode)


def sharded(kind: str) -> dict[str, Any]:
    """Options for FSDP2 with checkpoints of a kind."""
    wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind, **wrapped}}


def environments() -> list[dict[str, object]]:
    """What torchrun would tell two ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": rank, "LOCAL_RANK": rank, **common} for rank in range(2)]


def finish_ranks(run: Run, resume: bool | str = False, *, kill_at: tuple[int, int] | None = None) -> list[int]:
    """Run two ranks to their end, or until one ends badly, which ends the other; their exit codes.

    Args:
        run: what to train.
        resume: from a checkpoint.
        kill_at: rank, and which change of a file it does not live to make.
    """
    processes = []
    for rank, environment in enumerate(environments()):
        place = kill_at[1] if kill_at is not None and kill_at[0] == rank else None
        processes.append(start(run, resume, kill_at=place, environment=environment))
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        processes[0].join(0.02)
    for process in processes:
        if any(other.exitcode for other in processes):
            process.kill()
        process.join(60)
    return [process.exitcode for process in processes]


def changes(run: Run, rank: int | None = None) -> int:
    """Changes of files in a whole run, so that each of them can be the last of another."""
    return int((run.folder / ("changes" if rank is None else f"changes-{rank}")).read_text())


def has_checkpoint(run: Run) -> bool:
    """Whether anything is left to resume from."""
    return any(run.folder.glob("checkpoint-*"))


def assert_same_end(ours: Run, theirs: Run) -> None:
    """Weights, optimizer, schedule and log are the same, bit by bit."""
    _assert_same(torch.load(ours.end), torch.load(theirs.end), "end")


def _child(run: Run, resume: bool | str, kill_at: int | None, environment: dict[str, object]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    log = run.folder.with_suffix(".log").open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    seen = _Changes(str(run.folder), kill_at)
    sys.addaudithook(seen)
    run.train(resume)
    seen.inside = False
    rank = f"-{environment['RANK']}" if environment else ""
    (run.folder / f"changes{rank}").write_text(str(seen.count))
    if environment:
        # Threads of gloo that outlive the interpreter abort the process.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class _Changes:
    """An audit hook that counts changes of files in a folder, and ends the process before one of them."""

    def __init__(self, folder: str, kill_at: int | None) -> None:
        self.count, self.inside = 0, True
        self._folder, self._kill_at = folder, kill_at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES or not self.inside or not str(arguments[0]).startswith(self._folder):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def _rows() -> list[dict[str, Any]]:
    """15 groups of different sizes: three micro-batches of two steps, of which the last is not full."""
    rng = random.Random(0)

    def text() -> list[int]:
        return rng.choices(range(2, _WORDS), k=rng.randint(2, 6))

    return [
        {
            "id": f"g{index}",
            "prompt_ids": text(),
            "response_ids": [text() for _ in range(2)],
            "calibration": rng.random(),
            "domain": ("law", "tax", "law", "art")[index % 4],
        }
        for index in range(15)
    ]


def _model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": _WORDS, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "dropout":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **common))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **common))


def _steps(trainer: RobustDPOTrainer) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def _assert_same(ours: Any, theirs: Any, place: str) -> None:
    assert type(ours) is type(theirs), place
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        for key in ours:
            _assert_same(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), place
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _assert_same(one, other, f"{place}[{index}]")
    else:
        assert ours == theirs, place
