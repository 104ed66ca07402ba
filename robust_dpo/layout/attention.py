"""Attention backends for packed groups, and how a model is made to use one through transformers' interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from robust_dpo.errors import argument_error
from robust_dpo.layout.mask import MaskFunction
from robust_dpo.layout.packing import PackedGroups

_PREFIX = "robust_dpo_"
_ALTERING = ("s_aux", "position_bias", "alibi", "head_mask", "relative_position_bias")
"""Arguments of attention functions that change the scores by something a packed row does not carry."""


class LayoutUnsupportedError(RuntimeError):
    """The model asks attention for something that a packed layout cannot give; the message says what."""


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention over packed groups.

    Args:
        name: of the option.
        prepare: (groups, the model's own mask function, dtype) → what the attention function is given as its mask;
            called once per forward pass and kind of mask, not per layer.
        attend: an attention function with transformers' signature.
        why_not: (device) → why it cannot run there; empty where it can.
        row_tokens: places of a row unless the user says otherwise; None: all groups in one row.
        half_precision: whether it takes nothing but fp16 and bf16.
    """

    name: str
    prepare: Callable[[PackedGroups, MaskFunction, torch.dtype], Any]
    attend: Callable[..., tuple[Tensor, Any]]
    why_not: Callable[[torch.device], str]
    row_tokens: int | None
    half_precision: bool = False

    @property
    def implementation(self) -> str:
        """The name that transformers knows it by."""
        # Whatever has "flash" in its name, transformers takes for its own FlashAttention, with mask rules of its own.
        return _PREFIX + self.name.replace("flash", "varlen")


_BACKENDS: dict[str, AttentionBackend] = {}
_ACTIVE: ContextVar[PackedGroups] = ContextVar("packed_groups")


def register_backend(backend: AttentionBackend) -> AttentionBackend:
    """Make a backend known here and to transformers."""

    def mask(mask_function: MaskFunction, dtype: torch.dtype = torch.float32, **_: Any) -> Any:
        return backend.prepare(_ACTIVE.get(), mask_function, dtype)

    # Some models name the mask, so it is called what transformers calls it.
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        _refuse(module, query, key, attention_mask, options)
        return backend.attend(module, query, key, value, attention_mask, **options)

    _BACKENDS[backend.name] = backend
    AttentionInterface.register(backend.implementation, attend)
    AttentionMaskInterface.register(backend.implementation, mask)
    return backend


def available_backends() -> tuple[str, ...]:
    """Names of the registered backends, best first."""
    return tuple(_BACKENDS)


def usable_backends(device: torch.device) -> list[AttentionBackend]:
    """The backends that can run on a device, best first."""
    return [backend for backend in _BACKENDS.values() if not backend.why_not(device)]


def resolve_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend of a name, or with "auto" the first one that can run on the device.

    Raises:
        ValueError: there is none of that name.
        RuntimeError: it cannot run on the device.
    """
    if name == "auto":
        return usable_backends(device)[0]
    if name not in _BACKENDS:
        raise argument_error("layout_attention", f"one of auto, {', '.join(_BACKENDS)}", repr(name))
    backend = _BACKENDS[name]
    if reason := backend.why_not(device):
        raise RuntimeError(f"layout_attention={name!r} cannot run on {device}: {reason}")
    return backend


@contextmanager
def attending(model: nn.Module, backend: AttentionBackend, groups: PackedGroups) -> Iterator[None]:
    """Inside, the model's attention is that of `backend` over `groups`; afterwards it is the model's own again.

    Checkpointed layers run once more in the backward pass, when this block has been left, so their checkpoint
    function is made to enter it again.
    """
    with _switched(model, backend.implementation, groups):
        layers = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)]
        functions = [layer.__dict__.get("_gradient_checkpointing_func") for layer in layers]
        try:
            for layer, function in zip(layers, functions, strict=True):
                if function is not None:
                    layer.__dict__["_gradient_checkpointing_func"] = _reentering(model, backend, groups, function)
            yield
        finally:
            for layer, function in zip(layers, functions, strict=True):
                if function is not None:
                    layer.__dict__["_gradient_checkpointing_func"] = function


@contextmanager
def _switched(model: nn.Module, implementation: str, groups: PackedGroups) -> Iterator[None]:
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    own = [(each, each._attn_implementation) for each in configs.values() if hasattr(each, "_attn_implementation")]
    token = _ACTIVE.set(groups)
    try:
        for each, _ in own:
            each._attn_implementation = implementation
        yield
    finally:
        for each, name in own:
            each._attn_implementation = name
        _ACTIVE.reset(token)


def _reentering(
    model: nn.Module, backend: AttentionBackend, groups: PackedGroups, checkpoint: Callable[..., Any]
) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def inside(*inner: Any, **options: Any) -> Any:
            with _switched(model, backend.implementation, groups):
                return function(*inner, **options)

        return checkpoint(inside, *args, **kwargs)

    return run


def _refuse(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
    """Raise for what a packed row cannot express.

    Raises:
        LayoutUnsupportedError: a bias, a sink or a cache; attention that is not causal; a mask of the model's own.
    """
    given = [name for name in _ALTERING if options.get(name) is not None]
    if given:
        raise LayoutUnsupportedError(f"its attention takes {', '.join(given)}")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise LayoutUnsupportedError("its attention is not causal")
    if query.shape[2] != key.shape[2]:
        raise LayoutUnsupportedError("its attention has other keys than those of the row")
    if mask is None:
        raise LayoutUnsupportedError("its attention takes no mask from transformers' mask functions")
