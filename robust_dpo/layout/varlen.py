"""Attention over shared prompts out of plain attention calls, merged by their log-sum-exp.

A response sees its prompt and itself. Both parts are ordinary attention: of the response over itself (causal), and of
the responses of a group over their prompt (every key visible). With the log-sum-exp of each part, l₁ and l₂,

    l = log(e^{l₁} + e^{l₂}),   out = e^{l₁ − l} · out₁ + e^{l₂ − l} · out₂.

The backward pass of a part needs only the merged l and out: probabilities of the whole softmax are e^{score − l}, and
the row sum in dS = P ∘ (dP − Σ dO ∘ out) is that of the merged output. So each part's own backward kernel, given them,
yields its share of dq, dk and dv. No mask is ever made, and nothing that a mask would hide is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from robust_dpo.layout.packing import PackedGroups


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin in packed queries and keys.

    Args:
        queries, keys: tokens of each sequence.
        query_starts, key_starts: [B + 1] int32 on the device, their running sums from 0.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor

    @staticmethod
    def of(queries: list[int], keys: list[int], device: torch.device) -> Sequences:
        starts = [torch.tensor([0, *accumulate(lens)], dtype=torch.int32) for lens in (queries, keys)]
        return Sequences(tuple(queries), tuple(keys), *(_placed(each, device) for each in starts))


@dataclass(frozen=True)
class Scoring:
    """How scores are made: softcap · tanh(scale · q·k / softcap), over all keys or over those up to the query.

    A causal query of fewer queries than keys stands at the end of the keys. `window` is how many keys a causal query
    sees, itself included.
    """

    scale: float
    causal: bool
    softcap: float | None = None
    window: int | None = None


class VarlenAttention(Protocol):
    """Attention of packed sequences that also gives the log-sum-exp of the scores of each query."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        """[Nq, heads, D], [Nk, kv_heads, D] twice → out like the query, log-sum-exp [heads, Nq] fp32 or wider."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, given out and log-sum-exp of the whole softmax."""
        ...


@dataclass(frozen=True)
class SharedPrompts:
    """The attention calls that a layout takes.

    Args:
        own: every prompt and every response over itself, in the order of the flattened rows, gaps between as well.
        cross: the responses of each group over their prompt; None where no response has a token that is run.
        responses: [Nr] int64, flat places of the queries of `cross`.
        prompts: [Np] int64, flat places of its keys.
    """

    own: Sequences
    cross: Sequences | None
    responses: Tensor
    prompts: Tensor

    @staticmethod
    def of(groups: PackedGroups) -> SharedPrompts:
        device = groups.input_ids.device
        runs, reached = [], 0
        for span in sorted(groups.spans):
            runs += [span.start - reached, span.prompt, *span.responses]
            reached = span.start + span.length
        runs.append(groups.input_ids.numel() - reached)
        own = [run for run in runs if run]
        crossing = [span for span in groups.spans if span.length > span.prompt]
        responses = [torch.arange(span.start + span.prompt, span.start + span.length) for span in crossing]
        prompts = [torch.arange(span.start, span.start + span.prompt) for span in crossing]
        queries, keys = [len(each) for each in responses], [len(each) for each in prompts]
        return SharedPrompts(
            own=Sequences.of(own, own, device),
            cross=Sequences.of(queries, keys, device) if crossing else None,
            responses=_joined(responses, device),
            prompts=_joined(prompts, device),
        )


def _joined(places: list[Tensor], device: torch.device) -> Tensor:
    return _placed(torch.cat(places) if places else torch.zeros(0, dtype=torch.int64), device)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for what runs there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def flattened(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each [R, heads, T, D] as [R·T, heads, D], all in one dtype: that of autocast where it is on."""
    dtype, device = query.dtype, query.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).transpose(1, 2).flatten(0, 1)

    return flat(query), flat(key), flat(value)


def shared_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrompts,
    attention: VarlenAttention,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of packed groups in flattened rows, differentiable.

    Args:
        query: [R·T, heads, D].
        key, value: [R·T, kv_heads, D].
        layout: of the groups.
        attention: what computes a part.
        scale, softcap: see `Scoring`.

    Returns:
        [R·T, heads, D].
    """
    out: Tensor = _SharedPromptAttention.apply(query, key, value, layout, attention, scale, softcap)
    return out


class _SharedPromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SharedPrompts,
        attention: VarlenAttention,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        own, cross = Scoring(scale, True, softcap), Scoring(scale, False, softcap)
        out, lse = attention.forward(query, key, value, layout.own, own)
        if layout.cross is not None:
            at, seen = layout.responses, layout.prompts
            far, far_lse = attention.forward(query[at], key[seen], value[seen], layout.cross, cross)
            near, near_lse = out[at], lse[:, at]
            merged = torch.logaddexp(near_lse, far_lse)
            share = (far_lse - merged).exp_().t()[..., None]
            out[at] = torch.lerp(near.to(share.dtype), far.to(share.dtype), share).to(out.dtype)
            lse[:, at] = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts = layout, attention, own, cross
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout, attention, own, cross = ctx.parts
        grads = attention.backward(grad, query, key, value, out, lse, layout.own, own)
        if layout.cross is not None:
            at, seen = layout.responses, layout.prompts
            far = attention.backward(
                grad[at], query[at], key[seen], value[seen], out[at], lse[:, at], layout.cross, cross
            )
            for total, places, part in zip(grads, (at, seen, seen), far, strict=True):
                total.index_add_(0, places, part)
        return *grads, None, None, None, None


@dataclass(frozen=True)
class WindowedSequences:
    """The same attention for windows shorter than a prompt and its response: keys copied to every response.

    A window counts from the query, and the distance to a prompt's key is the same for no two responses, so here every
    response has its prompt's keys in front of its own.

    Args:
        sequences: every prompt and every response, in the order of the flattened rows, gaps between as well.
        keys: [Nk] int64, flat places of their keys.
    """

    sequences: Sequences
    keys: Tensor

    @staticmethod
    def of(groups: PackedGroups) -> WindowedSequences:
        queries: list[int] = []
        keys: list[Tensor] = []

        def add(start: int, stop: int, *before: Tensor) -> None:
            if stop > start:
                queries.append(stop - start)
                keys.append(torch.cat([*before, torch.arange(start, stop)]))

        reached = 0
        for span in sorted(groups.spans):
            prompt = torch.arange(span.start, span.start + span.prompt)
            add(reached, span.start)
            reached = span.start + span.prompt
            add(span.start, reached)
            for run in span.responses:
                add(reached, reached + run, prompt)
                reached += run
        add(reached, groups.input_ids.numel())
        device = groups.input_ids.device
        return WindowedSequences(Sequences.of(queries, [len(each) for each in keys], device), _joined(keys, device))


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: WindowedSequences, attention: VarlenAttention, scoring: Scoring
) -> Tensor:
    """Attention of packed groups under a sliding window, differentiable; shapes as in `shared_prompt_attention`."""
    keys, values = key.index_select(0, layout.keys), value.index_select(0, layout.keys)
    out: Tensor = _WindowedAttention.apply(query, keys, values, layout.sequences, attention, scoring)
    return out


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        attention: VarlenAttention,
        scoring: Scoring,
    ) -> Tensor:
        out, lse = attention.forward(query, key, value, sequences, scoring)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = attention, sequences, scoring
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attention, sequences, scoring = ctx.call
        return *attention.backward(grad, *ctx.saved_tensors, sequences, scoring), None, None, None
