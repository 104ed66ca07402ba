"""Rows of packed groups: every token in its place, once."""

from __future__ import annotations

import pickle
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_dpo.data import PreferenceCollator
from robust_dpo.layout import Group, PackedGroups, groups_of, pack_groups
from robust_dpo.layout.packing import IGNORED, first_fit

TOKENS = st.integers(1, 1000)
GROUPS = st.lists(
    st.builds(
        Group,
        st.lists(TOKENS, min_size=1, max_size=9),
        st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=4),
        st.none(),
    ),
    min_size=1,
    max_size=6,
)
PAIR = Group([10, 11, 12], [[20, 21, 22], [30]])


def contexts(packed: PackedGroups, positions: list[int]) -> list[list[int]]:
    """The tokens that each flat place stands behind, itself included, by who is who and in order of position."""
    ids, places, groups, responses = (
        tensor.flatten().tolist()
        for tensor in (packed.input_ids, packed.position_ids, packed.group_ids, packed.response_ids)
    )
    found = []
    for at in positions:
        seen = [
            (places[other], ids[other])
            for other in range(len(ids))
            if groups[other] == groups[at] and responses[other] in (0, responses[at]) and places[other] <= places[at]
        ]
        assert [place for place, _ in sorted(seen)] == list(range(len(seen)))  # positions are 0, 1, 2, … without a gap
        found.append([token for _, token in sorted(seen)])
    return found


def test_a_pair_by_hand() -> None:
    packed = pack_groups([PAIR])
    assert packed.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert packed.response_ids.tolist() == [[0, 0, 0, 1, 1]]
    assert packed.rows.tolist() == [2, 3, 4, 2]  # the prompt's last token predicts the first of both responses
    assert packed.targets.tolist() == [20, 21, 22, 30]
    assert packed.seq_lens.tolist() == [3, 1]


@given(
    groups=GROUPS,
    shared=st.booleans(),
    row_tokens=st.none() | st.integers(1, 40),
    row_multiple=st.sampled_from([1, 7, 64]),
)
def test_every_target_is_predicted_from_its_prompt_and_response(
    groups: list[Group], shared: bool, row_tokens: int | None, row_multiple: int
) -> None:
    packed = pack_groups(groups, shared=shared, row_tokens=row_tokens, row_multiple=row_multiple)
    assert packed.input_ids.shape[1] % row_multiple == 0
    expected = [
        ([*group.prompt, *response[:index]], token)
        for group in groups
        for response in group.responses
        for index, token in enumerate(response)
    ]
    found = zip(contexts(packed, packed.rows.tolist()), packed.targets.tolist(), strict=True)
    assert [*found] == expected
    assert packed.seq_lens.tolist() == [len(response) for group in groups for response in group.responses]
    assert packed.longest == max(len(group.prompt) + len(max(group.responses, key=len)) - 1 for group in groups)


@given(groups=GROUPS, shared=st.booleans(), row_tokens=st.none() | st.integers(1, 40))
def test_nothing_is_run_twice_or_in_vain(groups: list[Group], shared: bool, row_tokens: int | None) -> None:
    packed = pack_groups(groups, shared=shared, row_tokens=row_tokens)
    run = sum(
        len(group.prompt) * (1 if shared else len(group.responses)) + sum(len(each) - 1 for each in group.responses)
        for group in groups
    )
    assert int((packed.group_ids >= 0).sum()) == run == sum(span.length for span in packed.spans)
    if row_tokens is None:
        assert packed.input_ids.shape == (1, run)
    else:
        longest = max(span.length for span in packed.spans)
        assert packed.input_ids.shape[1] <= max(row_tokens, longest)
        # First-fit leaves at most one row half empty.
        fill = (packed.group_ids >= 0).sum(1).tolist()
        assert sum(2 * used <= max(row_tokens, longest) for used in fill) <= 1


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    spare=st.integers(0, 20),
    multiple=st.integers(1, 9),
)
def test_first_fit_does_not_overlap(lengths: list[int], spare: int, multiple: int) -> None:
    width = max(lengths) + spare
    starts, rows, used = first_fit(lengths, width, multiple)
    assert used % multiple == 0 and used < width + multiple
    taken = sorted((start, start + length) for start, length in zip(starts, lengths, strict=True))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert all(start // used == (stop - 1) // used for start, stop in taken)  # none is cut by the end of a row
    assert {start // used for start in starts} == set(range(rows))


def test_a_function_of_the_batch_only() -> None:
    rng = random.Random()
    groups = [Group([rng.randrange(9)] * rng.randint(1, 5), [[1] * rng.randint(1, 5)] * 2) for _ in range(20)]
    first, second = (pack_groups(groups, row_tokens=16) for _ in range(2))
    assert first.spans == second.spans
    assert torch.equal(first.input_ids, second.input_ids)


def test_packed_groups_travel() -> None:
    packed = pack_groups([PAIR])
    for moved in (packed.to("cpu"), pickle.loads(pickle.dumps(packed))):
        assert moved.spans == packed.spans
        assert torch.equal(moved.rows, packed.rows)
    on_meta = packed.to("meta")
    assert on_meta.input_ids.device.type == "meta"
    assert on_meta.seq_lens.device.type == "cpu"


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([], {}, "groups: expected at least one group, got none"),
        ([PAIR, Group([], [[1]])], {}, "groups: expected prompts and responses of at least one token, got group 1"),
        ([Group([1], [[2], []])], {}, "groups: expected prompts and responses of at least one token, got group 0"),
        ([Group([1], [])], {}, "groups: expected prompts and responses of at least one token, got group 0"),
        ([PAIR], {"row_tokens": 0}, "row_tokens: expected at least 1, or None, got 0"),
        ([PAIR], {"row_multiple": 0}, "row_multiple: expected at least 1, got 0"),
    ],
)
def test_refused(groups: list[Group], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_groups(groups, **options)


@given(groups=GROUPS)
def test_a_padded_batch_gives_its_groups_back(groups: list[Group]) -> None:
    rows = [{"prompt_ids": group.prompt, "response_ids": group.responses} for group in groups]
    batch = PreferenceCollator(shared=True, row_tokens=30, row_multiple=16)(rows)
    assert groups_of(batch) == [Group(group.prompt, group.responses, group.responses) for group in groups]
    assert batch["packed"].spans == pack_groups(groups, row_tokens=30, row_multiple=16).spans


def test_tokens_without_a_label_stay_in_their_response() -> None:
    """Masked in front of, between and behind what counts; the collator's own -100 only marks the prompt."""
    batch = PreferenceCollator()([{"prompt_ids": [1, 2], "response_ids": [[3, 4, 5, 6], [7, 8], [9, 9]]}])
    batch["labels"][0, [2, 4, 5]] = IGNORED
    batch["labels"][2] = IGNORED
    (group,) = groups_of(batch)
    ignored = [IGNORED, 4, IGNORED, IGNORED]
    assert group == Group([1, 2], [[3, 4, 5, 6], [7, 8], [9, 9]], [ignored, [7, 8], [IGNORED] * 2])
    packed = pack_groups([group])
    assert packed.targets.tolist() == [*ignored, 7, 8, IGNORED, IGNORED]
    assert packed.rows.tolist() == [1, 2, 3, 4, 1, 5, 1, 6]


def test_prompts_that_differ_share_what_they_begin_with() -> None:
    batch = PreferenceCollator()([{"prompt_ids": [1, 2], "response_ids": [[3], [4]]}])
    batch["input_ids"][1, 1] = 9
    assert groups_of(batch) == [Group([1], [[2, 3], [9, 4]], [[IGNORED, 3], [IGNORED, 4]])]
    batch["input_ids"][1, 0] = 9
    with pytest.raises(ValueError, match="batch: expected a prompt for all responses of a group"):
        groups_of(batch)
