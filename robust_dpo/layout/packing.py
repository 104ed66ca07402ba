"""Groups laid out in rows: which token stands where, and what each may see. Everything else derives from this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_dpo.errors import argument_error

IGNORED = -100
"""Label of positions that are not part of a response."""


_ON_HOST = ("seq_lens", "group_sizes")


class Group(NamedTuple):
    """A prompt and its responses as token ids, none of them empty.

    Args:
        prompt: what the responses share.
        responses: what follows it.
        labels: of each response, what its tokens count as: themselves, or IGNORED where they are read and not
            scored; None: all count.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]] | None = None


class GroupSpan(NamedTuple):
    """Where a group stands.

    Args:
        start: flat place (row · T + column) of the prompt's first token.
        prompt: tokens of the prompt.
        responses: tokens of each response that are run: all but its last, which predicts nothing.
    """

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True, eq=False)
class PackedGroups:
    """Groups in R rows of T places: each prompt once, followed by its responses.

    A response sees its prompt and itself, and its positions continue from the prompt's end. The last token of a
    prompt predicts the first token of every response, so its place occurs once per response in `rows`.

    Args:
        input_ids: [R, T] int64; 0 where nothing is.
        position_ids: [R, T] int64, place within prompt and response; 0 where nothing is.
        group_ids: [R, T] int64, the group of each token, in the order of `spans`; -1 where nothing is.
        response_ids: [R, T] int64, 0 in a prompt, else 1 + index of the response within its group.
        rows: [N] int64, flat place that predicts each token of the responses, responses in the order of the batch.
        targets: [N] int64, those tokens; IGNORED where one does not count.
        seq_lens: [S] int64 on the CPU, tokens of each response; they sum to N.
        group_sizes: [G] int64 on the CPU, responses of each group of the batch.
        spans: where the groups stand, in the order of the batch.
        shared: whether the responses of a group share a prompt; otherwise a group here is one response and its prompt.
    """

    input_ids: Tensor
    position_ids: Tensor
    group_ids: Tensor
    response_ids: Tensor
    rows: Tensor
    targets: Tensor
    seq_lens: Tensor
    group_sizes: Tensor
    spans: tuple[GroupSpan, ...]
    shared: bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedGroups:
        """The same on a device; `seq_lens` and `group_sizes` stay on the CPU, where the fused operators want them."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedGroups:
        """The same in page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Any) -> PackedGroups:
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _ON_HOST}
        return replace(self, **{name: move(value) for name, value in tensors.items() if isinstance(value, Tensor)})

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        return max(span.prompt + max(span.responses) for span in self.spans)


def pack_groups(
    groups: Sequence[Group], *, shared: bool = True, row_tokens: int | None = None, row_multiple: int = 1
) -> PackedGroups:
    """Lay out groups in rows, first-fit by falling length; a function of its arguments only.

    Args:
        groups: of the batch.
        shared: run each prompt once; False runs it once for every response.
        row_tokens: T, the places of a row; a longer group makes all rows as long as itself. None: one row.
        row_multiple: T is rounded up to a multiple of this.

    Raises:
        ValueError: no groups, or one whose prompt or response is empty; a row of no place.
    """
    if not groups:
        raise argument_error("groups", "at least one group", "none")
    if row_tokens is not None and row_tokens < 1:
        raise argument_error("row_tokens", "at least 1, or None", row_tokens)
    if row_multiple < 1:
        raise argument_error("row_multiple", "at least 1", row_multiple)
    for index, group in enumerate(groups):
        if not group.prompt or not group.responses or not all(group.responses):
            raise argument_error("groups", "prompts and responses of at least one token", f"group {index}")
    units = [*groups] if shared else [Group(group.prompt, [each]) for group in groups for each in group.responses]
    sizes = [(len(unit.prompt), tuple(len(response) - 1 for response in unit.responses)) for unit in units]
    lengths = [prompt + sum(responses) for prompt, responses in sizes]
    if row_tokens is None:
        places, count, width = [0, *accumulate(lengths[:-1])], 1, _rounded_up(sum(lengths), row_multiple)
    else:
        places, count, width = first_fit(lengths, max(row_tokens, *lengths), row_multiple)
    spans = tuple(GroupSpan(start, *size) for start, size in zip(places, sizes, strict=True))

    flat = torch.zeros(4, count * width, dtype=torch.int64)
    flat[2] = -1
    rows: list[int] = []
    for index, (unit, span) in enumerate(zip(units, spans, strict=True)):
        columns = slice(span.start, span.start + span.length)
        tokens, positions, members = [*unit.prompt], [*range(span.prompt)], [0] * span.prompt
        for member, (response, run) in enumerate(zip(unit.responses, span.responses, strict=True), start=1):
            rows += [span.start + span.prompt - 1, *range(span.start + len(tokens), span.start + len(tokens) + run)]
            tokens += response[:-1]
            positions += range(span.prompt, span.prompt + run)
            members += [member] * run
        flat[:2, columns] = torch.tensor([tokens, positions])
        flat[2, columns] = index
        flat[3, columns] = torch.tensor(members)
    responses = [response for group in groups for response in group.responses]
    targets = [labels for group in groups for labels in group.labels or group.responses]
    input_ids, position_ids, group_ids, response_ids = flat.view(4, count, width).unbind(0)
    return PackedGroups(
        input_ids=input_ids,
        position_ids=position_ids,
        group_ids=group_ids,
        response_ids=response_ids,
        rows=torch.tensor(rows),
        targets=torch.tensor([token for response in targets for token in response]),
        seq_lens=torch.tensor([len(response) for response in responses]),
        group_sizes=torch.tensor([len(group.responses) for group in groups]),
        spans=spans,
        shared=shared,
    )


def first_fit(lengths: Sequence[int], width: int, multiple: int = 1) -> tuple[list[int], int, int]:
    """First-fit by falling length, ties by index: (flat start of each, rows, places of a row).

    Args:
        lengths: each at most `width`.
        width: places of a row that may be used.
        multiple: of which a row then has as many places as are used, rounded up.
    """
    filled: list[int] = []
    spots = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        row = next((row for row, used in enumerate(filled) if used + lengths[index] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        spots[index] = (row, filled[row])
        filled[row] += lengths[index]
    places = _rounded_up(max(filled), multiple)
    return [row * places + column for row, column in spots], len(filled), places


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def groups_of(batch: dict[str, Any]) -> list[Group]:
    """The groups of a padded batch, whoever made it. Reads the batch on the host.

    The prompt of a group is what its rows begin with alike, up to the first label of any. Whatever follows belongs to
    the responses, so that a token without a label (a turn of a tool, a masked end of sequence) stays where it is.

    Raises:
        ValueError: rows of a group have no first token in common, or a row has less than two tokens.
    """
    ids, real, labels = (batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
    rows = []
    for tokens, present, wanted in zip(ids, real, labels, strict=True):
        kept = [(token, label) for token, here, label in zip(tokens, present, wanted, strict=True) if here]
        rows.append(([token for token, _ in kept], [label for _, label in kept]))
    stops = [*accumulate(batch["group_sizes"].tolist())]
    return [_group(rows[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]


def _group(rows: Sequence[tuple[list[int], list[int]]]) -> Group:
    """The group of rows given as (tokens, labels)."""
    cut = min(_prompt_length(tokens, labels) for tokens, labels in rows)
    first = rows[0][0]
    cut = min(_common_length(first[:cut], tokens) for tokens, _ in rows)
    if cut < 1:
        raise argument_error("batch", "a prompt for all responses of a group (else use layout='padded')", "none")
    return Group(first[:cut], [tokens[cut:] for tokens, _ in rows], [labels[cut:] for _, labels in rows])


def _prompt_length(tokens: list[int], labels: list[int]) -> int:
    """Tokens before the first label that something predicts; a row without any keeps one token as its response."""
    last = len(tokens) - 1
    return next((place for place in range(1, last) if labels[place] != IGNORED), last)


def _common_length(prompt: list[int], tokens: list[int]) -> int:
    """How many tokens the two begin with alike."""
    return next(
        (place for place, (one, other) in enumerate(zip(prompt, tokens, strict=False)) if one != other), len(prompt)
    )
