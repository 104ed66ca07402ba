"""The row formats that are understood: one converter each, found by a file's columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robust_dpo.data.rows import (
    BadRow,
    Message,
    Prompt,
    Reason,
    Row,
    as_messages,
    as_numbers,
    as_texts,
    optional_fields,
    require,
    text_field,
)

Record = Mapping[str, Any]

ASSISTANT_MARKER = "\n\nAssistant:"
"""Raw HH dialogues open every assistant turn with this; the response follows the last one."""

# Scripts that put spaces between words (Latin, Greek, Cyrillic); in others any place between two characters will do.
_LETTERS = "A-Za-z0-9\u00c0-\u024f\u0370-\u04ff"
_LETTER = re.compile(f"[{_LETTERS}]")
_LAST_WORD = re.compile(rf"\s?[{_LETTERS}]*\Z")

_ANNOTATIONS = frozenset({"id", "probs", "sources", "source"})
_PAIR = frozenset({"chosen", "rejected", "chosen_source", "rejected_source"})


@dataclass(frozen=True)
class Format:
    """How rows of one format are recognised and read.

    Args:
        name: what reports call it.
        signature: the fields that a row must have, for messages.
        columns: the columns that the converter reads; others are ignored and reported.
        matches: whether a record looks like this format. Formats exclude each other.
        convert: record → Row; raises BadRow.
    """

    name: str
    signature: str
    columns: frozenset[str]
    matches: Callable[[Record], bool]
    convert: Callable[[Record], Row]


FORMATS: dict[str, Format] = {}


def register_format(
    name: str, signature: str, columns: frozenset[str], matches: Callable[[Record], bool]
) -> Callable[[Callable[[Record], Row]], Callable[[Record], Row]]:
    """Decorator: add a converter to `FORMATS`. Nothing else has to know about a new format."""

    def add(convert: Callable[[Record], Row]) -> Callable[[Record], Row]:
        FORMATS[name] = Format(name, signature, columns | _ANNOTATIONS, matches, convert)
        return convert

    return add


def detect_format(records: Sequence[Record]) -> Format | None:
    """The format that most of the records match, or None if no record matches any.

    A majority, so that one damaged row at the top does not decide how the file is read.
    """
    votes = {name: sum(fmt.matches(record) for record in records) for name, fmt in FORMATS.items()}
    best = max(votes, key=lambda name: votes[name])
    return FORMATS[best] if votes[best] else None


def _sides(record: Record) -> list[Any]:
    return [record[side] for side in ("chosen", "rejected") if record.get(side) is not None]


def _is_text_pair(record: Record) -> bool:
    return ("chosen" in record or "rejected" in record) and not _is_conversational(record)


def _is_conversational(record: Record) -> bool:
    return any(isinstance(side, Sequence) and not isinstance(side, str) for side in _sides(record))


def _has_marker(record: Record) -> bool:
    return any(isinstance(side, str) and ASSISTANT_MARKER in side for side in _sides(record))


def _pair(record: Record, prompt: Prompt, chosen: str, rejected: str) -> Row:
    """A Row of two responses with the annotations that pairs can carry."""
    extra = optional_fields(record, 2)
    if "sources" not in extra and any(record.get(f"{side}_source") is not None for side in ("chosen", "rejected")):
        names = (f"{side}_source" for side in ("chosen", "rejected"))
        extra["sources"] = [text_field(record, name) for name in names]
    return Row(prompt, [chosen, rejected], **extra)


def _text_sides(record: Record) -> tuple[str, str]:
    return text_field(record, "chosen"), text_field(record, "rejected")


def _listwise(record: Record, prompt: Prompt) -> Row:
    responses = as_texts(require(record, "responses"), "responses")
    scores = record.get("scores")
    numbers = None if scores is None else as_numbers(scores, "scores", Reason.BAD_SCORE)
    return Row(prompt, responses, numbers, **optional_fields(record, len(responses)))


@register_format(
    "canonical",
    "prompt, responses",
    frozenset({"prompt", "responses", "scores"}),
    lambda row: "responses" in row and row.get("query") is None,
)
def convert_canonical(record: Record) -> Row:
    """{"prompt": text or messages, "responses": [text, …], "scores"?, "probs"?, "sources"?, "id"?}."""
    prompt = require(record, "prompt")
    return _listwise(record, prompt if isinstance(prompt, str) else as_messages(prompt, "prompt"))


@register_format(
    "DoRA",
    "query, responses, scores",
    frozenset({"query", "responses", "scores"}),
    lambda row: "responses" in row and row.get("query") is not None,
)
def convert_dora(record: Record) -> Row:
    """{"query", "responses", "scores", "probs"?}, the rows of the DoRA authors; their `prompt` form is canonical."""
    require(record, "scores")
    return _listwise(record, text_field(record, "query"))


@register_format(
    "explicit prompt",
    "prompt, chosen, rejected",
    _PAIR | {"prompt"},
    lambda row: _is_text_pair(row) and row.get("prompt") is not None,
)
def convert_explicit(record: Record) -> Row:
    """{"prompt", "chosen", "rejected"}, all text (TRL's explicit prompt)."""
    return _pair(record, text_field(record, "prompt"), *_text_sides(record))


@register_format(
    "raw HH dialogue",
    "chosen, rejected with 'Assistant:' turns",
    _PAIR,
    lambda row: _is_text_pair(row) and row.get("prompt") is None and _has_marker(row),
)
def convert_dialogue(record: Record) -> Row:
    """{"chosen", "rejected"}, each a whole dialogue; the prompt runs up to and including the last assistant marker."""
    prompts, responses = [], []
    for side, text in zip(("chosen", "rejected"), _text_sides(record), strict=True):
        head, marker, response = text.rpartition(ASSISTANT_MARKER)
        if not marker:
            raise BadRow(Reason.MISSING_FIELD, f"{side} has no {ASSISTANT_MARKER!r} before its response")
        prompts.append(head + marker)
        responses.append(response)
    if prompts[0] != prompts[1]:
        raise BadRow(Reason.MISMATCHED_PROMPTS, f"chosen and rejected differ before their last {ASSISTANT_MARKER!r}")
    if not prompts[0].removesuffix(ASSISTANT_MARKER).strip():
        raise BadRow(Reason.EMPTY_PROMPT, f"nothing stands before the last {ASSISTANT_MARKER!r}")
    return _pair(record, prompts[0], *responses)


@register_format(
    "implicit prompt",
    "chosen, rejected with a shared beginning",
    _PAIR,
    lambda row: _is_text_pair(row) and row.get("prompt") is None and not _has_marker(row),
)
def convert_implicit(record: Record) -> Row:
    """{"chosen", "rejected"} that begin with the same text: the prompt is what they share, up to the end of a word."""
    chosen, rejected = _text_sides(record)
    if chosen == rejected:
        raise BadRow(Reason.IDENTICAL_RESPONSES, "chosen and rejected are the same text")
    cut = _end_of_shared_words(chosen, rejected)
    return _pair(record, chosen[:cut], chosen[cut:], rejected[cut:])


def _end_of_shared_words(chosen: str, rejected: str) -> int:
    """Length of the prefix that both share, cut so that no word is torn and responses keep their leading space."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((index for index, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))]
    torn = any(_LETTER.match(text, len(shared)) for text in (chosen, rejected))
    tail = _LAST_WORD.search(shared) if torn or shared[-1:].isspace() else None
    return len(shared) if tail is None else tail.start()


@register_format("conversational", "chosen, rejected as lists of messages", _PAIR | {"prompt"}, _is_conversational)
def convert_conversational(record: Record) -> Row:
    """{"prompt"?, "chosen", "rejected"} of messages; the response is the assistant message at the end (TRL's format).

    A text `prompt` beside whole conversations repeats their first turn and is not needed; beside a lone assistant
    message it becomes the user's turn.
    """
    given = record.get("prompt")
    prompts, responses = [], []
    for side in ("chosen", "rejected"):
        messages = as_messages(require(record, side), side)
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(Reason.MESSAGE_ROLES, f"the last message of {side} must be the assistant's")
        prompts.append(_conversation_before(messages[:-1], given, side))
        responses.append(messages[-1]["content"])
    if prompts[0] != prompts[1]:
        raise BadRow(Reason.MISMATCHED_PROMPTS, "the messages before the last differ between chosen and rejected")
    return _pair(record, prompts[0], *responses)


def _conversation_before(messages: list[Message], given: Any, side: str) -> list[Message]:
    """The messages before the response: those of the side itself, or the explicit prompt."""
    if given is None or (isinstance(given, str) and messages):
        return messages
    prompt = [Message(role="user", content=given)] if isinstance(given, str) else as_messages(given, "prompt")
    if messages and messages != prompt:
        raise BadRow(Reason.MISMATCHED_PROMPTS, f"{side} holds messages before its response that differ from prompt")
    return prompt
