"""Runs training cases on every rank and writes down how they ended; test_ranks.py launches it.

Usage: torchrun rank_runs.py FOLDER ENGINE; FOLDER holds cases.json, data sets and models, and engines are ddp, fsdp,
fsdp-loaded-once, fsdp-at-load, zero-1, zero-2 and zero-3.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from cpu_engines import deepspeed_on_cpu, shard_on_cpu, whole
from datasets import load_from_disk
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

DEFAULTS = {
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.05,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


class Steps(TrainerCallback):
    """Ids and robust weights of this rank's groups, for each optimizer step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.found: list[list[tuple[str, float]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(self.trainer.worst_groups(10_000))


def run_case(folder: Path, name: str, case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Train as `case` says; weights that were trained, the log and the steps, and the trainer."""
    set_seed(0)  # of the adapter
    steps = Steps()
    model: Any = str(folder / case.get("model", "model"))
    if case.get("sharded_at_load"):
        sharding = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
        model = AutoModelForCausalLM.from_pretrained(model, dtype="float32", distributed_config=sharding)
    reference: Any = None if case.get("lora") or case.get("own_reference") else str(folder / "reference")
    if case.get("loaded_before"):
        unset_hf_deepspeed_config()
        model, reference = (AutoModelForCausalLM.from_pretrained(each, dtype="float32") for each in (model, reference))
    trainer = RobustDPOTrainer(
        model,
        reference,
        RobustDPOConfig(
            output_dir=str(folder / f"run-{name}"),
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            **{**DEFAULTS, **case["options"]},
        ),
        train_dataset=load_from_disk(str(folder / case["rows"])),
        processing_class=AutoTokenizer.from_pretrained(str(folder / "model")),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if case.get("lora") else None,
        callbacks=[steps],
    )
    if case.get("lora"):
        # Zero at first, which would leave half of the adapter without gradient.
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
    steps.trainer = trainer
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    ends = {key: whole(value) for key, value in model.named_parameters() if value.requires_grad}
    told = {"log": log, "steps": steps.found, "ranks": trainer.args.world_size, "plan": _plan(trainer)}
    return ends, told, trainer


def _plan(trainer: RobustDPOTrainer) -> dict[str, Any]:
    """How the run went: layout, head, route."""
    scorer = trainer._scorer
    head = "logits" if scorer.head.check(trainer.model_wrapped).head is None else "fused"
    return {"layout": scorer.layout.kind, "head": head, "route": type(trainer._window._weighting).__name__}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[2] in ("fsdp", "fsdp-loaded-once"):
        shard_on_cpu()
    if sys.argv[2].startswith("zero"):
        deepspeed_on_cpu()
    if sys.argv[2] == "fsdp-at-load":
        torch.distributed.init_process_group("gloo")
    _run_all(Path(sys.argv[1]))
    # Threads of gloo that outlive the interpreter abort the process, and trainers hold groups of ranks.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _run_all(folder: Path) -> None:
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        ends, told, trainer = run_case(folder, name, case)
        (folder / f"{name}-{trainer.args.process_index}.json").write_text(json.dumps(told))
        if trainer.is_world_process_zero():
            save_file(ends, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
