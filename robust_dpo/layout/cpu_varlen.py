"""Packed sequences through PyTorch's fused CPU attention, one call per sequence.

Half precision is attended in fp32. That is no slower where there are no matrix units for bf16, more exact, and does not
go through oneDNN, which compiles and keeps a kernel for every length it meets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robust_dpo.layout.varlen import Scoring, Sequences

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuVarlenAttention:
    """Scores without softcap or window; sequences as long as their keys where they are causal."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = torch.empty(query.shape[1], len(query), dtype=exact)
        for queries, keys in _slices(sequences):
            part, sums = _forward(
                _heads_first(query[queries]),
                _heads_first(key[keys]),
                _heads_first(value[keys]),
                is_causal=scoring.causal,
                scale=scoring.scale,
            )
            out[queries], lse[:, queries] = part[0].transpose(0, 1), sums[0]
        return out, lse

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
        inputs = (query, key, value)
        grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in inputs]
        for queries, keys in _slices(sequences):
            parts = _backward(
                _heads_first(grad[queries]),
                _heads_first(query[queries]),
                _heads_first(key[keys]),
                _heads_first(value[keys]),
                _heads_first(out[queries]),
                lse[None, :, queries],
                dropout_p=0.0,
                is_causal=scoring.causal,
                scale=scoring.scale,
            )
            for total, places, part in zip(grads, (queries, keys, keys), parts, strict=True):
                total[places] = part[0].transpose(0, 1)
        return grads[0], grads[1], grads[2]


def _slices(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    at, seen = 0, 0
    for queries, keys in zip(sequences.queries, sequences.keys, strict=True):
        yield slice(at, at + queries), slice(seen, seen + keys)
        at, seen = at + queries, seen + keys


def _heads_first(tensor: Tensor) -> Tensor:
    """[L, heads, D] → [1, heads, L, D] in fp32 or wider; a view where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).transpose(0, 1)[None]
