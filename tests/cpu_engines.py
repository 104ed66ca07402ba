"""FSDP2 and DeepSpeed on CPUs: they can, but accelerate uses them only on the kinds of machines that have GPUs."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


def shard_on_cpu() -> None:
    """Let accelerate take the CPUs of this process for GPUs; before it sees them."""
    begin = PartialState.__init__

    def begin_as_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        known = bool(PartialState._shared_state)
        begin(self, *args, **kwargs)
        if not known:  # later accelerate sets it to FSDP
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus


def deepspeed_on_cpu() -> None:
    """Let accelerate start DeepSpeed on the CPUs of this process; before anything else of it is used."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def zero(stage: int) -> dict[str, Any]:
    """Options for DeepSpeed on CPUs."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return {"deepspeed": {**config, **dict.fromkeys(names, "auto")}, "use_cpu": False, "dataloader_pin_memory": False}


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor of which ranks may hold parts, on every rank that asks for it together with the others."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()
