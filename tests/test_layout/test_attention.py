"""Masks, merged attention and the switching of a model's attention, by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layout_primitives import TorchVarlenAttention
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from robust_dpo.layout import Group, LayoutPlan, LayoutUnsupportedError, attending, flex, pack_groups, resolve_backend
from robust_dpo.layout.choice import model_output
from robust_dpo.layout.cpu_varlen import CpuVarlenAttention
from robust_dpo.layout.dense import SDPA
from robust_dpo.layout.flex import block_mask
from robust_dpo.layout.mask import dense_mask, is_causal_up_to, span_mask
from robust_dpo.layout.masked import masked_attention
from robust_dpo.layout.packing import PackedGroups
from robust_dpo.layout.segments import SEGMENTS
from robust_dpo.layout.varlen import (
    Scoring,
    SharedPrompts,
    WindowedSequences,
    shared_prompt_attention,
    windowed_attention,
)

WINDOW = 5
MASKS = {"causal": causal_mask_function, "window": sliding_window_causal_mask_function(WINDOW)}


@pytest.fixture(params=[None, 70], ids=["one-row", "rows-of-70"])
def packed(request: pytest.FixtureRequest, draw_groups: Callable[..., list[Group]]) -> PackedGroups:
    one_token = Group([3, 4], [[5], [6]])  # nothing of its responses is run
    return pack_groups([*draw_groups(3, 3), one_token, *draw_groups(1, 2)], row_tokens=request.param)


def draw(packed: PackedGroups, heads: int = 6, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    count = packed.input_ids.numel()
    return [torch.randn(count, each, 8, dtype=dtype, requires_grad=True) for each in (heads, kv_heads, kv_heads)]


def expected(packed: PackedGroups, inputs: list[Tensor], mask: Tensor, **scoring: Any) -> Tensor:
    """The same with an explicit mask over whole rows, flattened."""
    shaped = [each.unflatten(0, packed.input_ids.shape).transpose(1, 2) for each in inputs]
    return masked_attention(*shaped, mask, **scoring).transpose(1, 2).flatten(0, 1)


def assert_same(packed: PackedGroups, ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Outputs and gradients, where there is a token."""
    real = (packed.group_ids.flatten() >= 0)[:, None, None]
    torch.testing.assert_close(ours * real, theirs * real, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(ours) * real
    gradients = [torch.autograd.grad(each, inputs, upstream) for each in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", list(MASKS))
def test_masks_by_definition(kind: str, packed: PackedGroups) -> None:
    mask = dense_mask(packed, MASKS[kind])
    groups, responses, places = packed.group_ids, packed.response_ids, packed.position_ids
    for row in range(len(groups)):
        for query in range(groups.shape[1]):
            for key in range(groups.shape[1]):
                distance = int(places[row, query] - places[row, key])
                visible = (
                    groups[row, query] == groups[row, key]
                    and responses[row, key] in (0, responses[row, query])
                    and 0 <= distance < (WINDOW if kind == "window" else 1_000)
                )
                assert bool(mask[row, 0, query, key]) == visible
    assert mask.any(-1).all()  # nobody sees nobody: a softmax over nothing is NaN


@pytest.mark.parametrize("kind", list(MASKS))
def test_the_mask_of_a_group_is_its_part_of_the_row(kind: str, packed: PackedGroups) -> None:
    whole = dense_mask(packed, MASKS[kind])
    for span in packed.spans:
        row, column = divmod(span.start, packed.input_ids.shape[1])
        here = slice(column, column + span.length)
        assert torch.equal(span_mask(span, MASKS[kind], torch.device("cpu")), whole[row, 0, here, here])


@pytest.mark.parametrize("kind", list(MASKS))
def test_block_mask_holds_the_same_function(kind: str, packed: PackedGroups) -> None:
    mask = block_mask(packed, MASKS[kind])
    rows, width = packed.input_ids.shape
    index = [torch.arange(rows)[:, None, None], torch.zeros(1, 1, 1, dtype=torch.int64)]
    found = mask.mask_mod(*index, torch.arange(width)[:, None], torch.arange(width))
    assert torch.equal(found, dense_mask(packed, MASKS[kind])[:, 0])


@pytest.mark.parametrize("entries", [1, 1 << 17, 1 << 24], ids=["block row by block row", "some rows", "at once"])
@pytest.mark.parametrize("kind", list(MASKS))
def test_block_mask_in_strips_is_that_of_torch(kind: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_ENTRIES", entries)
    groups = [Group([1] * prompt, [[2] * size for size in sizes]) for prompt, *sizes in ((300, 150, 140), (40, 5, 70))]
    packed = pack_groups(groups, row_tokens=620)
    rows, width = packed.input_ids.shape
    ours = block_mask(packed, MASKS[kind])
    expected = create_block_mask(ours.mask_mod, rows, None, width, width, device="cpu")
    assert ours.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, places = (getattr(expected, f"{name}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), counts)
        named = torch.arange(places.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(ours, f"{name}_indices") * named, places * named)


def test_is_causal_up_to_the_window() -> None:
    device = torch.device("cpu")
    assert is_causal_up_to(causal_mask_function, 1000, device)
    assert is_causal_up_to(MASKS["window"], WINDOW, device)
    assert not is_causal_up_to(MASKS["window"], WINDOW + 1, device)


@pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=["no-gqa", "gqa", "one-kv-head"])
@pytest.mark.parametrize("attention", [CpuVarlenAttention(), TorchVarlenAttention()], ids=["cpu", "torch"])
def test_merged_parts_are_one_softmax(attention: Any, kv_heads: int, packed: PackedGroups) -> None:
    inputs = draw(packed, kv_heads=kv_heads)
    ours = shared_prompt_attention(*inputs, SharedPrompts.of(packed), attention, 0.3)
    assert_same(packed, ours, expected(packed, inputs, dense_mask(packed, causal_mask_function), scale=0.3), inputs)


def test_merged_parts_with_softcap(packed: PackedGroups) -> None:
    inputs = draw(packed)
    ours = shared_prompt_attention(*inputs, SharedPrompts.of(packed), TorchVarlenAttention(), 0.7, 1.5)
    theirs = expected(packed, inputs, dense_mask(packed, causal_mask_function), scale=0.7, softcap=1.5)
    assert_same(packed, ours, theirs, inputs)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_windows_by_gathered_keys(softcap: float | None, packed: PackedGroups) -> None:
    inputs = draw(packed)
    scoring = Scoring(0.7, True, softcap, WINDOW)
    ours = windowed_attention(*inputs, WindowedSequences.of(packed), TorchVarlenAttention(), scoring)
    theirs = expected(packed, inputs, dense_mask(packed, MASKS["window"]), scale=0.7, softcap=softcap)
    assert_same(packed, ours, theirs, inputs)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_huge_scores_merge_without_overflow(scale: float, packed: PackedGroups) -> None:
    """A prompt whose scores dwarf those of the response, and the reverse, for some heads and queries."""
    inputs = draw(packed, dtype=torch.float32)
    ours = shared_prompt_attention(*inputs, SharedPrompts.of(packed), CpuVarlenAttention(), scale)
    wide = [each.detach().double() for each in inputs]
    theirs = expected(packed, wide, dense_mask(packed, causal_mask_function), scale=scale)
    real = packed.group_ids.flatten() >= 0
    # Rounding of a score is its size times eps, and moves its weight by as much.
    tolerance = 4 * torch.finfo(torch.float32).eps * scale * 30
    torch.testing.assert_close(ours[real].double(), theirs[real], rtol=0, atol=max(1e-5, tolerance))
    assert all(each.isfinite().all() for each in torch.autograd.grad(ours[real].sum(), inputs))


def test_gradcheck(draw_groups: Callable[..., list[Group]]) -> None:
    packed = pack_groups([Group([1, 2], [[3, 4, 5], [6, 7]]), Group([1], [[2], [3, 4]])])
    layout = SharedPrompts.of(packed)
    inputs = tuple(draw(packed, heads=2, kv_heads=1))
    assert torch.autograd.gradcheck(
        lambda *each: shared_prompt_attention(*each, layout, CpuVarlenAttention(), 0.5), inputs
    )


@pytest.mark.parametrize("backend", [SEGMENTS, SDPA], ids=lambda backend: backend.name)
def test_the_model_is_its_own_again(backend: Any, build_model: Callable[..., Any]) -> None:
    model = build_model("llama").eval()
    tokens = torch.tensor([[5, 9, 11, 7]])
    before = model(tokens).logits
    packed = pack_groups([Group([1, 2], [[3, 4], [5, 6]])])
    with torch.no_grad():
        model_output(model, packed, LayoutPlan("group", backend))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(KeyError), attending(model, backend, packed):
        raise KeyError
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(tokens).logits, before)


def test_layouts_nest(build_model: Callable[..., Any]) -> None:
    """As where a reference runs inside of the policy's pass."""
    outer, inner = build_model("llama"), build_model("gemma2")
    first, second = (pack_groups([Group([1] * size, [[3, 4], [5, 6]])]) for size in (2, 7))
    with attending(outer, SEGMENTS, first):
        model_output(inner, second, LayoutPlan("group", SDPA))
        assert inner.config._attn_implementation == "eager"
        assert outer.config._attn_implementation == SEGMENTS.implementation
        logits = outer(
            first.input_ids, position_ids=first.position_ids, attention_mask=torch.ones_like(first.input_ids)
        ).logits
    assert torch.equal(logits, model_output(outer, first, LayoutPlan("group", SEGMENTS)).logits)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"s_aux": torch.zeros(4)}, "its attention takes s_aux"),
        ({"position_bias": torch.zeros(1)}, "its attention takes position_bias"),
        ({"is_causal": False}, "its attention is not causal"),
    ],
)
def test_what_a_row_cannot_express_is_refused(
    options: dict[str, Any], reason: str, build_model: Callable[..., Any]
) -> None:
    with pytest.raises(LayoutUnsupportedError, match=reason):
        packed = pack_groups([Group([1], [[3, 4]])])
        with attending(build_model("llama"), SEGMENTS, packed) as _:
            model = build_model("llama")
            with attending(model, SEGMENTS, packed):
                model(packed.input_ids, position_ids=packed.position_ids, use_cache=False, **options)


def test_backends_by_name() -> None:
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu) is SEGMENTS
    assert resolve_backend("sdpa", cpu) is SDPA
    with pytest.raises(ValueError, match="layout_attention: expected one of auto, flex, flash, segments, sdpa"):
        resolve_backend("eager", cpu)
    with pytest.raises(RuntimeError, match="layout_attention='flash' cannot run on cpu: flash-attn runs on NVIDIA"):
        resolve_backend("flash", cpu)
    with pytest.raises(RuntimeError, match="layout_attention='flex' cannot run on cpu: flex_attention has no backward"):
        resolve_backend("flex", cpu)
    with pytest.raises(RuntimeError, match="layout_attention='segments' cannot run on cuda"):
        resolve_backend("segments", torch.device("cuda"))
