"""What models are recognised by: hashes of their contents, whatever their files are called."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pickle import PicklingError
from typing import Any

import torch
from datasets.fingerprint import Hasher
from peft import PeftModel
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from robust_dpo.data import PreferenceCollator
from robust_dpo.data.fingerprint import json_fingerprint
from robust_dpo.errors import argument_error

# Threads share the pieces of a tensor, so that a large embedding does not leave all but one of them idle; of what lies
# on a GPU, one piece per thread is on the host at a time.
_PIECE_BYTES = 16 << 20
_MOST_THREADS = 8

# Fields of a model's configuration that say where it came from or how it is run, and not what it computes.
_INCIDENTAL = (
    "_name_or_path",
    "architectures",
    "base_model_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
# Where peft puts what was there before; the rest of such a module is the adapter's.
_WRAPPED = {
    PeftModel: "base_model",
    BaseTuner: "model",
    BaseTunerLayer: "base_layer",
    AuxiliaryTrainingWrapper: "original_module",
    AdaptedAttention: "model",
}


def weights_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of every value of named tensors, with their names, dtypes and shapes; their order does not matter.

    Reads everything once (some 2 GB per second and thread), so no change goes unnoticed.
    """
    named = sorted(tensors, key=lambda pair: pair[0])
    pieces = ((index, piece) for index, (_, tensor) in enumerate(named) for piece in _pieces(tensor))
    digests = [hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()) for name, tensor in named]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for index, of_piece in pool.map(lambda piece: (piece[0], _digest(piece[1])), pieces):
            digests[index].update(of_piece)
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(digest.digest())
    return whole.hexdigest()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers (also those that are not saved) and whatever else the state of a model holds, by name.

    The state of quantised layers has more than their parameters: scales, for example.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {**dict(model.named_buffers()), **state}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model_tensors` without those of peft's adapters, whether or not they are trained."""
    wrapped = {
        path: place
        for path, module in model.named_modules()
        for kind, place in _WRAPPED.items()
        if isinstance(module, kind)
    }

    def is_base(name: str) -> bool:
        parts = name.split(".")
        return all(wrapped.get(".".join(parts[:depth]), part) == part for depth, part in enumerate(parts))

    return {name: tensor for name, tensor in model_tensors(model).items() if is_base(name)}


def collator_fingerprint(collator: Any) -> str:
    """Name of what makes batches of rows, with a hash of its settings and code; that of the package is just named.

    Raises:
        ValueError: it cannot be pickled.
    """
    # Its settings are padding and layout, of which log-probs do not depend beyond rounding.
    if type(collator) is PreferenceCollator:
        return PreferenceCollator.__qualname__
    try:
        return f"{type(collator).__module__}.{type(collator).__qualname__} {Hasher.hash(collator)}"
    except (TypeError, AttributeError, PicklingError) as failure:
        expected = "one that can be pickled, so that the cache of log-probs can tell it from others"
        raise argument_error("data_collator", expected, failure) from failure


def configuration_fingerprint(model: Any, *, adapters: bool) -> str:
    """Hash of what a model is besides its weights: class, configuration, and the settings of its active adapters.

    Args:
        model: a causal language model of transformers or peft.
        adapters: whether adapters take part.
    """
    described: dict[str, Any] = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    described["config"] = _without_incidental(model.config.to_dict())
    if adapters and (active := _active_adapters(model)):
        settings = {name: model.peft_config[name].to_dict() for name in active}
        described["adapters"] = {name: _without_incidental(each) for name, each in settings.items()}
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        described["disabled"] = any(layer.disable_adapters for layer in layers)
    return json_fingerprint(described)


def _active_adapters(model: Any) -> list[str]:
    """Adapters that take part: peft's, or those that transformers added to a model by itself."""
    if isinstance(model, PeftModel):
        return list(model.active_adapters)
    return list(model.active_adapters()) if getattr(model, "_hf_peft_config_loaded", False) else []


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as bytes, cut into pieces, where it lies."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    yield from flat.split(_PIECE_BYTES)


def _digest(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy().data).digest()


def _without_incidental(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _INCIDENTAL}
