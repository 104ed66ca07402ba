"""What the head operator reads from a device, proven without one: tensors without contents cannot give up a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robust_dpo.ops import batch_layout, host
from robust_dpo.ops.batch_layout import BatchLayout
from robust_dpo.ops.chunking import ChunkRows
from robust_dpo.ops.grouped_head import GroupedHead, GroupedResult, Reference
from robust_dpo.ops.head import HeadWeights
from robust_dpo.ops.objective import Objective
from robust_dpo.ops.row_selection import RowSelection
from robust_dpo.robust import DrDPO, KLRobust, Mean, RobustObjective

VOCAB, WIDTH = 37, 8
LENGTHS = [5, 3, 0, 9, 4, 4]


DEVICE = torch.device("meta")


def read(seq_lens: Tensor | None, group_sizes: Tensor | None, padded: bool) -> BatchLayout:
    shape = (len(LENGTHS), max(LENGTHS)) if padded else (sum(LENGTHS),)
    targets = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    groups = len(LENGTHS) // 2
    calibration, scores = torch.ones(groups, device=DEVICE), torch.zeros(len(LENGTHS), device=DEVICE)
    size = None if group_sizes is not None else 2
    return BatchLayout.read(targets, seq_lens, size, group_sizes, VOCAB, None, calibration, scores, torch.float32)


def solve(layout: BatchLayout, robust: RobustObjective, loss: Any, reference: str) -> GroupedResult:
    head = HeadWeights(torch.zeros(VOCAB, WIDTH, device=DEVICE), bias=torch.zeros(VOCAB, device=DEVICE), softcap=9.0)
    hidden = torch.zeros(sum(LENGTHS), WIDTH, device=DEVICE)
    given = {
        "none": None,
        "cached": torch.zeros(len(LENGTHS), device=DEVICE),
        "live": Reference(head, hidden),
    }[reference]
    scores = torch.zeros(len(LENGTHS), device=DEVICE)
    run = GroupedHead(head, hidden, layout, given, scores, rows=ChunkRows(8, 8), backend="auto", tile_dtype=None)
    return run.solve(Objective.resolve(loss, None, {}, robust), None, hidden=True, weight=True, bias=True)


def own_loss(groups: Any) -> Tensor:
    return -torch.nn.functional.logsigmoid(groups.logps[:, 0] - groups.logps[:, 1])


# A chunk size of 8 gives several chunks; the last pair is larger and takes the log-prob pass first.
@pytest.mark.parametrize("sizes", [None, [1, 3, 2]], ids=["pairs", "ragged"])
@pytest.mark.parametrize("robust", [Mean(), KLRobust(), KLRobust(radius=0.1), DrDPO()], ids=lambda r: r.key)
@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        ("sigmoid", "cached"),
        ("ipo", "live"),
        ("plackett_luce", "live"),
        ("rrhf", "none"),
        ("aot_unpaired", "live"),
        ("lire", "none"),
        (own_loss, "none"),
    ],
    ids=["sigmoid", "ipo", "plackett_luce", "rrhf", "aot_unpaired", "lire", "own"],
)
def test_packed_rows_of_known_lengths_read_nothing(
    sizes: list[int] | None, robust: RobustObjective, loss: Any, reference: str
) -> None:
    seq_lens = torch.tensor(LENGTHS)
    layout = read(seq_lens, None if sizes is None else torch.tensor(sizes), padded=False)
    assert layout.rows.offsets == [0, 5, 8, 8, 17, 21, 25]
    result = solve(layout, robust, loss, reference)
    assert result.loss.device == DEVICE
    assert result.grad_weight.shape == (VOCAB, WIDTH)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_rows_of_unknown_lengths_are_read_once(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seq_lens = None if padded else torch.zeros(len(LENGTHS), dtype=torch.int64, device=DEVICE)
    with pytest.raises((NotImplementedError, RuntimeError)):
        read(seq_lens, None, padded)
    fetched: list[int] = []

    def fetch(*vectors: Tensor | None) -> list[list[int]]:
        fetched.append(sum(vector is not None for vector in vectors))
        # Lengths, the least and sum of them, no wrong target; no group sizes; no flag of a wrong value.
        return [[*LENGTHS, 0, len(LENGTHS) * max(LENGTHS) if padded else sum(LENGTHS), 0, 0], [], [0, 0]]

    monkeypatch.setattr(batch_layout, "fetch", fetch)
    layout = read(seq_lens, None, padded)
    assert layout.rows.count == sum(LENGTHS)
    assert fetched == [2]


@pytest.mark.parametrize("vector", ["ref_logps", "calibration", "scores"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_wrong_values_that_nobody_reads_make_nan(vector: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowSelection, "begin", staticmethod(lambda *given: RowSelection(*given, None)))
    given: dict[str, Any] = {
        "ref_logps": torch.zeros(6), "calibration": torch.ones(6), "scores": torch.arange(6.0),
    }  # fmt: skip
    given[vector][4] = wrong
    targets, seq_lens = torch.zeros(sum(LENGTHS), dtype=torch.int64), torch.tensor(LENGTHS)
    layout = BatchLayout.read(targets, seq_lens, 2, None, VOCAB, **given, dtype=torch.float32)
    assert layout.calibration is not None
    assert layout.calibration.isnan().tolist() == [False, False, True]


class TestDeviceCopies:
    """What is sent to a device is kept, as long as somebody may read it there."""

    CPU = torch.device("cpu")

    def test_same_vector_is_sent_once_for_each_stream(self) -> None:
        copies = host.DeviceCopies()
        first = copies.for_stream((1, 2, 3), self.CPU, stream=7)
        assert first.tolist() == [1, 2, 3]
        assert copies.for_stream((1, 2, 3), self.CPU, stream=7) is first
        assert copies.for_stream((1, 2, 3), self.CPU, stream=8) is not first

    def test_the_least_recent_is_let_go_but_not_what_a_graph_reads(self) -> None:
        copies = host.DeviceCopies(size=2)
        kept = copies.for_stream((1,), self.CPU, stream=0)
        assert copies.for_graph((1,), self.CPU) is kept
        for number in range(2, 9):
            copies.for_stream((number,), self.CPU, stream=0)
        assert copies.for_graph((1,), self.CPU) is kept
        assert copies.for_stream((1,), self.CPU, stream=0) is not kept

    def test_a_capture_needs_a_call_before_it(self) -> None:
        with pytest.raises(RuntimeError, match=r"seq_lens and group_sizes: expected lengths .* before the capture"):
            host.DeviceCopies().for_graph((1, 2), self.CPU)


def test_a_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert host.send([1, 2], torch.device("cpu")).tolist() == [1, 2]
