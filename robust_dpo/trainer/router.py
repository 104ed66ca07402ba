"""Whether a model has routers whose load is balanced by a loss, and that ours is the one that the model computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_dpo.errors import argument_error
from robust_dpo.expert_load import RouterPass, load_balancing_loss
from robust_dpo.layout import PackedGroups
from robust_dpo.ops.host import send
from robust_dpo.trainer.dropout import evaluating

_ARGUMENT = "router_aux_loss_coef"
# Models take the softmax in the dtype of their logits, so the allowed relative error is this times its eps. One expert
# more or less per token would be an error of 1 / experts per token.
_ROUNDINGS = 8.0
_SMALLEST_EPS = 1e-5


@dataclass(frozen=True)
class RouterLoss:
    """The auxiliary loss of a model's routers.

    Args:
        coefficient: > 0, what it is multiplied with.
        top_k: how many experts a token is sent to.
    """

    coefficient: float
    top_k: int


def plan_router_loss(model: Any, coefficient: float | None, *, trial: bool) -> RouterLoss | None:
    """The auxiliary loss of a run; None where there is none.

    Args:
        model: a causal language model, not wrapped.
        coefficient: of the loss, 0 for none; None takes the model's own where its configuration has
            `output_router_logits=True`, which is when transformers adds the loss to that of labels.
        trial: whether to compare with the `aux_loss` that the model gives for a tiny batch.

    Raises:
        ValueError: the loss is wanted and the model does not give it, or gives another.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if coefficient is None:
        if not getattr(config, "output_router_logits", False):
            return None
        coefficient = getattr(base, _ARGUMENT, None)
        if coefficient is None:
            raise argument_error(_ARGUMENT, "a number: the model asks for router logits and has none", None)
    if coefficient == 0:
        return None
    top_k = getattr(base, "num_experts_per_tok", None)
    if top_k is None or not hasattr(config, "output_router_logits"):
        raise argument_error(_ARGUMENT, f"0 or None for {type(base).__name__}, which has no such loss", coefficient)
    loss = RouterLoss(float(coefficient), int(top_k))
    if trial and (reason := _why_not(base, loss)):
        raise argument_error(_ARGUMENT, f"0 for {type(base).__name__}: {reason}", coefficient)
    return loss


def may_reenter(model: nn.Module) -> str | None:
    """How a model checkpoints its activations; None where it does not, or in the form that is not reentrant.

    The logits of routers are gathered by hooks. A reentrant checkpoint runs these without a graph, and a function that
    does not say which form it is counts as one.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant") is not False:
                return f"{type(module).__name__} with {function}"
    return None


class CountedPlaces(NamedTuple):
    """Which tokens of a batch count, so that it is the same ones in every layout.

    Those of the padded batch: a prompt once for each of its responses, and every token of a response but the last,
    which predicts nothing, so that packed rows do not run it.

    Args:
        owners: [R, T] int64, the group of each place of the rows; any where its weight is 0.
        weights: [R, T] int64, how many of those tokens stand in it.
    """

    owners: Tensor
    weights: Tensor


def router_pass(loss: RouterLoss, output: Any, places: CountedPlaces, groups: int) -> RouterPass:
    """The routers of a forward pass with `output_router_logits=True`.

    Args:
        loss: of the run.
        output: of the model.
        places: of the rows that were run.
        groups: of the batch.
    """
    rows, width = places.owners.shape
    # Without the virtual tokens that prompt-learning adapters put in front.
    logits = [layer.unflatten(0, (rows, -1))[:, -width:].flatten(0, 1) for layer in _layers(output)]
    return RouterPass(tuple(logits), places.owners.flatten(), places.weights.flatten(), groups, loss.top_k)


def padded_places(attention_mask: Tensor, group_sizes: Tensor) -> CountedPlaces:
    """The tokens [S, T] of a padded batch."""
    numbers = torch.arange(len(group_sizes), device=group_sizes.device)
    of_response = numbers.repeat_interleave(group_sizes, output_size=len(attention_mask)).to(attention_mask.device)
    real = attention_mask.long()
    followed = real.cumsum(1) < real.sum(1, keepdim=True)
    return CountedPlaces(of_response[:, None].expand_as(real), real * followed)


def packed_places(packed: PackedGroups) -> CountedPlaces:
    """The tokens [R, T] of packed rows."""
    device, sizes = packed.group_ids.device, packed.group_sizes.tolist()
    # A span is a group, or where prompts are not shared one response with its prompt.
    owners = [group for group, size in enumerate(sizes) for _ in range(1 if packed.shared else size)]
    responses = [len(span.responses) for span in packed.spans]
    spans, prompt = packed.group_ids.clamp(min=0), packed.response_ids == 0
    weights = send(responses, device)[spans].where(prompt, 1).where(packed.group_ids >= 0, 0)
    return CountedPlaces(send(owners, device)[spans], weights)


def _layers(output: Any) -> tuple[Tensor, ...]:
    """[N, E] of each layer with a router; none where the model does not give them."""
    layers = getattr(output, "router_logits", None) or ()
    return tuple(layer.flatten(0, -2) for layer in layers if layer is not None)


def _why_not(model: Any, loss: RouterLoss) -> str:
    """Run a tiny batch; why `loss` is not what the model computes, empty where it is."""
    device = next(model.parameters()).device
    input_ids = torch.arange(1, 25, device=device).view(3, 8) % model.get_input_embeddings().num_embeddings
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    with torch.no_grad(), evaluating(model):
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_router_logits=True)
    layers, aux = _layers(output), getattr(output, "aux_loss", None)
    if not layers or aux is None:
        return "it gives no router_logits and aux_loss when asked for them"
    # All tokens, as the model counts them.
    places = CountedPlaces(torch.zeros_like(input_ids), attention_mask)
    ours = float(load_balancing_loss(router_pass(loss, output, places, 1).load().total()))
    allowed = _ROUNDINGS * max(torch.finfo(layers[0].dtype).eps, _SMALLEST_EPS)
    if math.isclose(ours, float(aux), rel_tol=allowed):
        return ""
    return f"its aux_loss on a tiny batch is {float(aux):.6g}, not {ours:.6g} as by the formula of load_balancing_loss"
