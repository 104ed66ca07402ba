"""How rows are cut into chunks, and that gradients are made once and multiplied only where they must be."""

from __future__ import annotations

import importlib
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import make_problem

from robust_dpo.kernels.row_logprob import RowLogprob
from robust_dpo.ops import chunking, grouped_head, linear_preference_loss, sequence_logps
from robust_dpo.ops.chunking import CPU_BYTES, ChunkRows, chunk_rows
from robust_dpo.ops.gemm_head import GemmHead
from robust_dpo.ops.head import HeadWeights, LinearHead
from robust_dpo.ops.rows import ResponseRows, cut_groups
from robust_dpo.ops.scaling import product

CPU = torch.device("cpu")


def native_head(dtype: torch.dtype) -> ModuleType:
    """Its launchers; skips the test where they cannot run."""
    pytest.importorskip("robust_dpo._cpu", reason="the native extension is not built")
    module = importlib.import_module("robust_dpo.kernels.linear_head_cpu")
    if reason := module.unsupported_reason(dtype):
        pytest.skip(reason)
    return module


def rows_of(lengths: list[int]) -> ResponseRows:
    offsets = [0, *accumulate(lengths)]
    empty = torch.empty(0, dtype=torch.int64)
    return ResponseRows(None, None, empty, None, torch.tensor(lengths), torch.tensor(offsets), offsets)


@pytest.mark.parametrize(("dtype", "usual"), [(torch.float32, 256), (torch.bfloat16, 512)], ids=str)
def test_default_on_a_cpu(dtype: torch.dtype, usual: int) -> None:
    assert chunk_rows(32_000, dtype, CPU, None, 10_000) == (usual, CPU_BYTES // (32_000 * dtype.itemsize))
    assert chunk_rows(32_000, dtype, CPU, None, 100) == (100, 100)
    few = CPU_BYTES // (1_000_000 * dtype.itemsize)
    assert chunk_rows(1_000_000, dtype, CPU, None, 10_000) == (few, few), "a huge vocabulary has fewer rows than usual"


def test_asked_for_bytes_are_taken_as_they_are() -> None:
    assert chunk_rows(1_000, torch.float32, CPU, 4_000 * 700, 10_000) == (700, 700)


@given(
    groups=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=12),
    usual=st.integers(1, 50),
    more=st.integers(0, 50),
)
def test_cut(groups: list[list[int]], usual: int, more: int) -> None:
    rows = rows_of([length for group in groups for length in group])
    chunks = cut_groups(rows, [len(group) for group in groups], ChunkRows(usual, usual + more))
    assert [group for chunk in chunks for group in range(*chunk.groups)] == list(range(len(groups)))
    reached = 0
    for chunk in chunks:
        count = sum(sum(group) for group in groups[slice(*chunk.groups)])
        pieces = [stop - start for start, stop in chunk.pieces]
        assert chunk.pieces[0][0] == reached and all(a[1] == b[0] for a, b in pairwise(chunk.pieces))
        assert sum(pieces) == count and max(pieces) <= usual + more
        assert count <= usual or chunk.groups[1] - chunk.groups[0] == 1
        assert len(pieces) == 1 or count > usual + more
        reached += count


def test_a_group_of_more_than_the_usual_rows_is_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of 3 and of 30 rows, with 8 usual: chunks of whole groups, and no second look."""
    seen: list[int] = []
    own = grouped_head.GroupedHead._log_probs

    def watched(self: grouped_head.GroupedHead, chunk: grouped_head.Chunk, *, keep: bool) -> object:
        seen.append(sum(stop - start for start, stop in chunk.pieces))
        kept = own(self, chunk, keep=keep)
        assert kept is not None
        return kept

    monkeypatch.setattr(grouped_head.GroupedHead, "_log_probs", watched)
    monkeypatch.setattr(chunking, "CPU_COLUMN_BYTES", 8 * torch.float32.itemsize)
    hidden, weight = torch.randn(36, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    lengths, targets = torch.tensor([1, 2, 15, 15, 2, 1]), torch.randint(50, (36,))
    linear_preference_loss(hidden, weight, targets, seq_lens=lengths, ref_logps=torch.zeros(6)).loss.backward()
    assert seen == [3, 30, 3]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_head_that_writes_no_logits_takes_more_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: type[LinearHead] = GemmHead
    if backend == "cpu":
        native_head(torch.float32)
        from robust_dpo.ops.native_head import NativeHead as kind
    monkeypatch.setattr(chunking, "CPU_COLUMN_BYTES", 8 * torch.float32.itemsize)
    seen: list[int] = []
    own = kind.forward

    def watched(self: LinearHead, head: HeadWeights, x: torch.Tensor, *rest: Any, **options: Any) -> RowLogprob:
        seen.append(len(x))
        return own(self, head, x, *rest, **options)

    monkeypatch.setattr(kind, "forward", watched)
    hidden, weight, targets = torch.randn(4, 6, 5), torch.randn(50, 5), torch.randint(50, (4, 6))
    logps = sequence_logps(hidden, weight, targets, backend=backend)
    assert seen == ([24] if backend == "cpu" else [8, 8, 8])
    expected = (hidden @ weight.T).log_softmax(2).gather(2, targets[..., None]).sum((1, 2))
    torch.testing.assert_close(logps, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 40, 1040], ids="{} rows".format)
def test_the_native_head_overwrites_a_weight_gradient(rows: int, dtype: torch.dtype) -> None:
    head = native_head(dtype)
    x, weight, targets = torch.randn(rows, 70).to(dtype), torch.randn(530, 70).to(dtype), torch.randint(530, (rows,))
    tile = head.Tile.allocate(rows, 530, dtype)
    forward = head.head_forward(x, weight, targets, tile=tile)
    found = [torch.zeros(530, 70), torch.full((530, 70), float("nan"))]
    for gradient, overwrite in zip(found, (False, True), strict=True):
        head.head_backward(
            tile,
            x,
            weight,
            targets,
            forward.lse,
            torch.ones(rows),
            grad_weight=gradient,
            overwrite_weight=overwrite,
        )
    assert torch.equal(*found)


def test_the_mean_leaves_nothing_to_multiply_the_weight_gradient_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are finished after the forward pass, whatever the number of chunks."""
    factors: list[torch.Tensor] = []
    own = grouped_head.GroupedHead.solve

    def watched(self: grouped_head.GroupedHead, *arguments: object) -> grouped_head.GroupedResult:
        result = own(self, *arguments)
        factors.append(result.grad_factor)
        return result

    monkeypatch.setattr(grouped_head.GroupedHead, "solve", watched)
    problem = make_problem([2, 3, 2, 2, 4, 2, 2]).to(torch.float32)
    linear_preference_loss(*problem.args, **problem.kwargs, chunk_bytes=1).loss.backward()
    linear_preference_loss(*problem.args, **problem.kwargs, robust="kl", chunk_bytes=1).loss.backward()
    assert factors[0] == 1 != factors[1]


def test_a_factor_of_one_is_nothing_to_do() -> None:
    gradient = torch.randn(3, 4)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert product(gradient, one, torch.float32, reuse=True) is gradient
    copy = product(gradient, one, torch.float32, reuse=False)
    assert copy is not gradient and torch.equal(copy, gradient), "a kept graph needs its gradient again"
    assert product(gradient, one, torch.bfloat16, reuse=True).dtype == torch.bfloat16
    expected = 2 * gradient
    assert torch.equal(product(gradient, two, torch.float32, reuse=True), expected)
