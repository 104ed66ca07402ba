"""Set-ups in which it is not known which groups a step has, or where its gradients are."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from robust_dpo.errors import argument_error

# Of transformers, beside those whose name ends in "layerwise".
_STEP_IN_BACKWARD = ("lomo", "adalomo")


def refuse_split_model(model: nn.Module, argument: str) -> None:
    """Refuse a model whose layers lie on several devices: by `device_map`, or as stages of a pipeline.

    Raises:
        ValueError: they do.
    """
    stages = getattr(getattr(getattr(model, "config", None), "distributed_config", None), "pp_size", 1)
    if stages > 1:
        expected = "a model without pipeline stages: every rank has to have groups of its own"
        raise argument_error(argument, expected, f"pp_size={stages}")
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1:
        expected = "a model on one device of each process; start one process per device, with FSDP to shard it"
        raise argument_error(argument, expected, f"a device_map over {', '.join(sorted(devices))}")


def refuse_steps_in_backward(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse optimizers that move weights within a backward pass where a step has several of them.

    DeepSpeed moves them within the last one. All but its stage 0 leave out a step whose gradients are not finite.

    Raises:
        ValueError: `optim` is one, and a step has several micro-batches or ranks; or it is DeepSpeed's stage 0.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 0:
        expected = "zero_optimization of stage 1, 2 or 3: stage 0 takes steps whose gradients are not finite"
        raise argument_error("deepspeed", expected, "stage 0")
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _STEP_IN_BACKWARD and not name.endswith("layerwise"):
        return
    micro_batches, ranks = args.gradient_accumulation_steps, accelerator.num_processes
    if micro_batches * ranks > 1:
        passes = f"all backward passes of a step, which has {micro_batches} on each of {ranks} ranks"
        expected = f"an optimizer that moves weights after {passes}"
        raise argument_error("optim", expected, f"{name!r}, which does it within each")


def refuse_unknown_groups(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse arguments with which ranks do not each have groups of their own, in batches of one size.

    Raises:
        ValueError: an argument is of that kind.
    """
    if getattr(args, "train_sampling_strategy", "random") == "batch_rebalance" and not args.dataloader_drop_last:
        expected = "True with train_sampling_strategy='batch_rebalance', which repeats groups to fill up the last step"
        raise argument_error("dataloader_drop_last", expected, False)
    if accelerator.num_processes == 1:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1:
            expected = "one that knows of all processes (without GPUs, use_cpu=True and ddp_backend='gloo')"
            raise argument_error("args", expected, f"one for 1 of the {launched} that were launched")
        return
    if getattr(args, "ddp_static_graph", False):
        expected = "False: it looks for the loss in the model's output, and would not reduce the first gradients"
        raise argument_error("ddp_static_graph", expected, True)
    if not accelerator.even_batches and not args.dataloader_drop_last:
        expected = "even_batches=True on several ranks (otherwise those with more batches wait for ever for the others)"
        raise argument_error("accelerator_config", expected, "even_batches=False")
    if accelerator.dispatch_batches:
        expected = "dispatch_batches=False on several ranks, so that each collates groups of its own"
        raise argument_error("accelerator_config", expected, "dispatch_batches=True")
    parallel: Any = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise argument_error("parallelism_config", f"{name}=1: every rank has to have groups of its own", size)
