"""Runs training cases on every rank and writes down how they ended; test_ranks.py launches it.

Usage: torchrun rank_runs.py FOLDER ENGINE; FOLDER holds cases.json, data sets and models, and engines are ddp, fsdp,
fsdp-loaded-once, fsdp-at-load, zero-1, zero-2 and zero-3.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_engines import deepspeed_on_cpu, shard_on_cpu, whole
from datasets import load_from_disk
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_groups
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from robust_dpo import ops
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
        model = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        reference = reference and AutoModelForCausalLM.from_pretrained(reference, dtype="float32")
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
    if case.get("head_only"):
        trainer.model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    steps.trainer = trainer
    with counted(trainer) as counts:
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    ends = {key: whole(value) for key, value in model.named_parameters() if value.requires_grad}
    plan = {
        "layout": trainer._scorer.layout.kind,
        "head": trainer.run_record().facts["head"],
        "route": type(trainer._window._weighting).__name__,
    }
    told = {"log": log, "steps": steps.found, "ranks": trainer.args.world_size, "plan": plan, "counts": counts}
    return ends, told, trainer


@contextmanager
def counted(trainer: RobustDPOTrainer) -> Iterator[dict[str, int]]:
    """Inside, counts passes through the model, losses from its head and from logits, and gatherings of its head."""
    counts = {"passes": 0, "fused": 0, "logits": 0, "gathered": 0}
    head = trainer.model.get_output_embeddings()

    def counting(function: Any, name: str, counts_it: Any = lambda *_: True) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += bool(counts_it(*args))
            return function(*args, **kwargs)

        return call

    def of_head(parameters: Any, *_: Any) -> bool:
        infos = [each._module_info for each in parameters]
        return any(head in (info.module, *info.shared_modules) for info in infos)

    handle = trainer.model.register_forward_pre_hook(lambda *_: counts.update(passes=counts["passes"] + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "linear_preference_loss", counting(ops.linear_preference_loss, "fused"))
        patch.setattr(ops, "sequence_logps_from_logits", counting(ops.sequence_logps_from_logits, "logits"))
        gather = counting(fsdp_groups.foreach_all_gather, "gathered", of_head)
        patch.setattr(fsdp_groups, "foreach_all_gather", gather)
        yield counts
    handle.remove()


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
