"""The policy and its tokenizer as the trainer wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from robust_dpo.errors import argument_error, type_error


def load_model(model: str | nn.Module, init_kwargs: dict[str, Any], *, argument: str) -> nn.Module:
    """The model itself, or the one that `from_pretrained` finds under a path or hub name, in float32 unless asked.

    Training moves weights by less than bf16 can tell apart, so the stored dtype is not the default.

    Raises:
        TypeError: it is neither. `argument` names it.
        ValueError: `init_kwargs` are given for a model that is already loaded.
    """
    if isinstance(model, str):
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32", **init_kwargs})
        return loaded
    if not isinstance(model, nn.Module):
        raise type_error(argument, "a model, or the path or name of one", model)
    if init_kwargs:
        raise argument_error(f"{argument}_init_kwargs", "none for a model that is already loaded", init_kwargs)
    return model


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether ranks hold parts of parameters already, whoever has sharded them."""
    # DeepSpeed's have an id, and no shape.
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model on the device of the run, in place; all ranks have to come here together.

    FSDP's `cpu_ram_efficient_loading` gives the weights of what is loaded to one rank alone: the others get them here.
    """
    empty = _is_empty(model)
    if accelerator.num_processes > 1 and any(gather_object([empty])):
        if empty:
            model = model.to_empty(device=accelerator.device)
            _tie(model)
        model = model.to(accelerator.device)
        for tensor in chain(model.parameters(), model.buffers()):
            distributed.broadcast(tensor.data, 0)
    elif _is_elsewhere(model, accelerator):
        model = model.to(accelerator.device)
    return model


@contextmanager
def placed_for_now(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Inside, the model is on the device of the run; afterwards, if it was not, where engines that shard expect it."""
    empty, elsewhere = _is_empty(model), _is_elsewhere(model, accelerator)
    model = placed(model, accelerator)
    try:
        yield
    finally:
        if elsewhere:
            model.to("cpu")
        if empty:
            _take_weights(model)


def _is_empty(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))


def _is_elsewhere(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether the model has to be moved; quantised ones refuse even a move to where they are."""
    # With an index, which the accelerator's own does not have in one process.
    return next(model.parameters()).device != torch.empty(0, device=accelerator.device).device


def _take_weights(model: nn.Module) -> None:
    """Leave the parameters of the model without contents, and its buffers as they are."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    _tie(model)


def _tie(model: nn.Module) -> None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.tie_weights()


def add_adapter(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """The model with a fresh adapter.

    Raises:
        TypeError: `peft_config` is not one.
        ValueError: the model has an adapter already.
    """
    if not isinstance(peft_config, PeftConfig):
        raise type_error("peft_config", "a peft.PeftConfig such as LoraConfig", peft_config)
    if isinstance(model, PeftModel):
        raise argument_error("peft_config", "None for a model that has an adapter already", peft_config.peft_type)
    adapted: PeftModel = get_peft_model(model, peft_config)
    return adapted


def load_tokenizer(processing_class: PreTrainedTokenizerBase | None, model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one saved beside the model; with a padding token (end of sequence where it has none).

    Raises:
        TypeError: `processing_class` is not a tokenizer.
        ValueError: none was given and the model does not say where it came from.
    """
    if processing_class is None:
        path = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not path:
            raise argument_error("processing_class", "the tokenizer, as the model was not loaded from a path", None)
        processing_class = AutoTokenizer.from_pretrained(path)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise type_error("processing_class", "a tokenizer", processing_class)
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    if processing_class.pad_token_id is None:
        raise argument_error("processing_class", "a tokenizer with a padding or an end-of-sequence token", "neither")
    return processing_class


def layer_parameters(model: Any) -> tuple[int, int]:
    """Parameters that every token meets: those of the layers, and those of the LM head. Input embeddings are looked up.

    Args:
        model: a causal language model of transformers or peft.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    outside = [*base.get_input_embeddings().parameters(), *(() if head is None else head.parameters())]
    counted = {id(parameter) for parameter in outside}
    body = sum(parameter.numel() for parameter in base.parameters() if id(parameter) not in counted)
    return body, 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
