"""Which layout a model can take: asked of its declarations, and then of the model itself."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from robust_dpo.errors import argument_error
from robust_dpo.layout.attention import (
    AttentionBackend,
    LayoutUnsupportedError,
    attending,
    resolve_backend,
    usable_backends,
)
from robust_dpo.layout.packing import Group, PackedGroups, pack_groups

logger = logging.getLogger(__name__)

LAYOUTS = ("auto", "group", "packed", "padded")

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Token counts of the probe: prompts and responses of different length, so that nothing fits by accident.
_PROBE = ((6, (4, 3)), (3, (2, 5)))
# Allowed root mean square of the difference of logits, in units of eps · that of the logits. A layer rounds a few
# times, and another order of sums turns into other roundings; a mask that is wrong moves logits by far more.
_ROUNDINGS = 8.0
_SMALLEST_EPS = 1e-5
# On a CPU oneDNN compiles a kernel for every number of rows that it multiplies in half precision, and torch keeps a
# thousand of them, 0.6 MiB each. Batches of every length then cost more than some rows of nothing.
_HALF_ROW_MULTIPLE = 128


@dataclass(frozen=True)
class LayoutPlan:
    """How batches are laid out for a model.

    Args:
        kind: "group", "packed" (each response with a prompt of its own) or "padded".
        attention: backend of the first two.
        row_tokens: places of a row; None: one row for all.
        row_multiple: of which a row has so many places.
        reason: why it is not what was asked for, or not "group" where that was left open; else empty.
    """

    kind: str
    attention: AttentionBackend | None = None
    row_tokens: int | None = None
    row_multiple: int = 1
    reason: str = ""

    def pack(self, groups: Sequence[Group]) -> PackedGroups:
        """Lay out groups as this plan says; not for "padded"."""
        shared = self.kind == "group"
        return pack_groups(groups, shared=shared, row_tokens=self.row_tokens, row_multiple=self.row_multiple)


PADDED = LayoutPlan("padded")


def plan_layout(
    model: nn.Module,
    layout: str = "auto",
    *,
    attention: str = "auto",
    row_tokens: int | None = None,
    trains: bool = True,
) -> LayoutPlan:
    """The layout that the model is run in.

    A layout other than "padded" is compared with it on a tiny batch, in eval mode and without gradients, and not taken
    where the logits differ by more than rounding. A model that trains is then run in training mode, forward and
    backward. Where no layout can be taken the plan is "padded", with the `reason`. Of several attention backends the
    first is taken that passes.

    Args:
        model: a causal language model, not wrapped, on its device.
        layout: one of LAYOUTS; "auto" takes the first that the model can.
        attention: name of a backend, or "auto".
        row_tokens: places of a row; None takes the backend's own.
        trains: whether gradients will flow through the model, with its dropout.

    Raises:
        ValueError: an argument is no such name.
        RuntimeError: the attention backend cannot run on the model's device.
        Exception: what the model raises with a backend that was asked for by name.
    """
    if layout not in LAYOUTS:
        raise argument_error("layout", f"one of {', '.join(LAYOUTS)}", repr(layout))
    if layout == "padded":
        return PADDED
    device = next(model.parameters()).device
    backends = usable_backends(device) if attention == "auto" else [resolve_backend(attention, device)]
    if reason := why_not_packed(model):
        return LayoutPlan("padded", reason=reason)
    reasons: list[str] = []
    for kind in ("group", "packed") if layout == "auto" else (layout,):
        for backend in backends:
            tokens = backend.row_tokens if row_tokens is None else row_tokens
            plan = LayoutPlan(kind, backend, tokens, _row_multiple(model))
            found = _why_not(model, plan, trains=trains, may_fail=attention == "auto")
            if not found:
                # What kept it from "group"; for "packed" by name there is nothing to say.
                return replace(plan, reason="" if kind in ("group", layout) else reasons[0])
            reasons.append(found)
    return LayoutPlan("padded", reason=reasons[0])


def _why_not(model: nn.Module, plan: LayoutPlan, *, trains: bool, may_fail: bool) -> str:
    """Why the model does not take a plan; a failure is such a reason where another plan may stand by."""
    assert plan.attention is not None
    try:
        return why_layouts_differ(model, plan) or (why_not_trained(model, plan) if trains else "")
    # What runs here is the code of any model: one that looks into its mask raises what it likes, and still trains in
    # padded batches.
    except Exception as failure:
        if not may_fail:
            raise
        name, kind = plan.attention.name, type(failure).__name__
        logger.warning("layout_attention %r fails on this model: %s: %s", name, kind, failure)
        return f"attention {name!r} fails on it"


def why_not_packed(model: Any) -> str:
    """What a model declares that no packed row can give; empty where there is nothing."""
    adapters = getattr(model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "its adapter puts virtual tokens in front of every row"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel) or not base.is_backend_compatible():
        return "its attention does not go through transformers' attention interface"
    if base.config.is_encoder_decoder:
        return "it has an encoder"
    if base._is_stateful:
        return "it carries a state from token to token"
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if getattr(base.config.get_text_config(), "attn_temperature_tuning", False):
        return "its attention is scaled by the place in the row"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "it takes no position_ids"
    return ""


def why_layouts_differ(model: nn.Module, plan: LayoutPlan) -> str:
    """Run a tiny batch padded and as planned; how the logits differ, empty where they agree up to rounding."""
    device = next(model.parameters()).device
    assert plan.attention is not None
    # Without autocast the comparison is sharper; only a backend that needs it is tried in it.
    autocast = plan.attention.half_precision and torch.is_autocast_enabled(device.type)
    groups = _probe(_vocabulary(model))
    packed = plan.pack(groups).to(device)
    try:
        with _mode(model, training=False), torch.no_grad(), torch.autocast(device.type, enabled=autocast):
            expected = _padded_logits(model, groups, device)
            logits = model_output(model, packed, plan).logits.flatten(0, 1)[packed.rows].float()
    except LayoutUnsupportedError as unsupported:
        return str(unsupported)
    error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    dtype = _matmul_dtype(model, autocast)
    allowed = _ROUNDINGS * _eps(dtype, device)
    return "" if error <= allowed else f"its logits change by {error:.3g} of their size with the layout {plan.kind!r}"


def why_not_trained(model: Any, plan: LayoutPlan) -> str:
    """Run a tiny batch as planned, in training mode, forward and backward; why that cannot be, empty where it can.

    Gradients are taken of the embedded tokens only: every layer runs backward, and no parameter gets a gradient.
    """
    device = next(model.parameters()).device
    packed = plan.pack(_probe(_vocabulary(model))).to(device)
    embedded: list[Tensor] = []

    def start(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        embedded.append(hidden.detach().requires_grad_())
        # No leaf, which a model may not change in place.
        return embedded[-1] * 1

    handle = model.get_input_embeddings().register_forward_hook(start)
    # What dropout draws here must not change what training draws.
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        with generators, _mode(model, training=True), torch.enable_grad():
            logits = model_output(model, packed, plan).logits
            torch.autograd.grad(logits.float().sum(), embedded, allow_unused=True)
    except LayoutUnsupportedError as unsupported:
        return str(unsupported)
    finally:
        handle.remove()
    return ""


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside, every module is in one mode and none is checkpointed (some forms allow only whole backward passes)."""
    modes = [(module, module.training) for module in model.modules()]
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    model.train(training)
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in checkpointed:
            module.gradient_checkpointing = True


def model_output(model: nn.Module, groups: PackedGroups, plan: LayoutPlan, **options: Any) -> Any:
    """What a model gives for packed groups on its device, with further options of its own; a gradient may flow."""
    assert plan.attention is not None
    with attending(model, plan.attention, groups):
        return model(
            input_ids=groups.input_ids,
            position_ids=groups.position_ids,
            # Says that nothing is hidden by padding; without it transformers would look for sequences in the positions.
            attention_mask=torch.ones_like(groups.input_ids),
            use_cache=False,
            **options,
        )


def _row_multiple(model: nn.Module) -> int:
    device = next(model.parameters()).device
    half = _matmul_dtype(model, torch.is_autocast_enabled(device.type)).itemsize == 2
    return _HALF_ROW_MULTIPLE if device.type == "cpu" and half else 1


def _matmul_dtype(model: nn.Module, autocast: bool) -> torch.dtype:
    first = next(model.parameters())
    return torch.get_autocast_dtype(first.device.type) if autocast else first.dtype


def _probe(vocabulary: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    return [Group(tokens(prompt), [tokens(size) for size in responses]) for prompt, responses in _PROBE]


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _padded_logits(model: nn.Module, groups: list[Group], device: torch.device) -> Tensor:
    """[N, V] float32, in the order of `PackedGroups.rows`."""
    pairs = [(group.prompt, response) for group in groups for response in group.responses]
    ids = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).to(device)
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    rows = [slice(len(prompt) - 1, len(prompt) + len(response) - 1) for prompt, response in pairs]
    return torch.cat([each[row] for each, row in zip(logits, rows, strict=True)]).float()


def _eps(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return 2.0**-10
    return max(torch.finfo(dtype).eps, _SMALLEST_EPS)
