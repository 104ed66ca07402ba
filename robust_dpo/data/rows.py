"""The canonical row, and the checks that every row passes whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, TypedDict

from datasets import Features, List, Value


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | list[Message]

COLUMNS = ("id", "prompt", "responses", "scores", "probs", "sources")
"""The canonical columns, in order."""

DROP_HINT = "on_bad_row='drop' (--on-bad-row drop) leaves such rows out and counts them"

ROLES = ("system", "developer", "user", "assistant", "tool")


class Reason(str, Enum):
    """Why a row cannot be used; the value is what reports and messages say."""

    INVALID_JSON = "invalid JSON"
    NOT_UTF8 = "not UTF-8"
    INVALID_TEXT = "invalid text"
    MISSING_FIELD = "missing field"
    WRONG_TYPE = "wrong type"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    MISMATCHED_PROMPTS = "mismatched prompts"
    IDENTICAL_RESPONSES = "identical responses"
    TOO_FEW_RESPONSES = "fewer than two responses"
    LENGTH_MISMATCH = "length mismatch"
    BAD_SCORE = "score not a finite number"
    TIED_SCORES = "all scores tied"
    BAD_PROBABILITY = "probability outside (0, 1)"
    MESSAGE_ROLES = "message roles"
    CHAT_TEMPLATE = "chat template"
    NO_TOKENS = "no tokens"
    MIXED_PROMPTS = "text and conversational prompts mixed"


class BadRow(ValueError):
    """A row that cannot be used: a `Reason` to count by and the detail of this row."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason.value}: {detail}")


@dataclass(frozen=True)
class Row:
    """One group: a prompt with K ≥ 2 responses, best first unless scored.

    Args:
        prompt: text, or the messages before the response.
        responses: K texts.
        scores: K finite numbers, higher is better, not all the same; or None.
        probs: K probabilities in (0, 1) that the response is of the target distribution; or None.
        sources: K names of where each response came from; or None.
        id: name of the row; None lets the loader make one of the file and line.
    """

    prompt: Prompt
    responses: list[str]
    scores: list[float] | None = None
    probs: list[float] | None = None
    sources: list[str] | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        """Raises BadRow if a value cannot be used."""
        turns = [self.prompt] if isinstance(self.prompt, str) else [turn["content"] for turn in self.prompt]
        if not any(turn.strip() for turn in turns):
            raise BadRow(Reason.EMPTY_PROMPT, "the prompt has no text")
        count = len(self.responses)
        if count < 2:
            raise BadRow(Reason.TOO_FEW_RESPONSES, f"a group needs K >= 2, got {count}")
        for index, response in enumerate(self.responses):
            if not response.strip():
                raise BadRow(Reason.EMPTY_RESPONSE, f"responses[{index}] has no text")
        if all(response == self.responses[0] for response in self.responses):
            raise BadRow(Reason.IDENTICAL_RESPONSES, f"all {count} responses are the same text")
        for field in ("scores", "probs", "sources"):
            values = getattr(self, field)
            if values is not None and len(values) != count:
                raise BadRow(Reason.LENGTH_MISMATCH, f"{count} responses but {len(values)} {field}")
        if self.scores is not None:
            for index, score in enumerate(self.scores):
                if not math.isfinite(score):
                    raise BadRow(Reason.BAD_SCORE, f"scores[{index}] is {score}")
            if min(self.scores) == max(self.scores):
                raise BadRow(Reason.TIED_SCORES, f"every score is {self.scores[0]}, so nothing is preferred")
        for index, prob in enumerate(self.probs or ()):
            if not 0.0 < prob < 1.0:  # also refuses NaN
                raise BadRow(Reason.BAD_PROBABILITY, f"probs[{index}] is {prob}")
        for text in [*turns, *self.responses, *(self.sources or ()), self.id or ""]:
            check_encodable(text)


def check_encodable(text: str) -> None:
    """Refuse half of a surrogate pair: JSON can spell it, but no file or tokenizer can hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(Reason.INVALID_TEXT, f"unpaired surrogate {text[error.start]!a}") from None


def features(conversational: bool) -> Features:
    """Types of COLUMNS: `prompt` is text, or a list of messages."""
    message = {"role": Value("string"), "content": Value("string")}
    return Features(
        {
            "id": Value("string"),
            "prompt": List(message) if conversational else Value("string"),
            "responses": List(Value("string")),
            "scores": List(Value("float64")),
            "probs": List(Value("float64")),
            "sources": List(Value("string")),
        }
    )


def require(record: Mapping[str, Any], field: str) -> Any:
    """The value of a field that has to be there; an absent field and null are the same (Parquet has no absence)."""
    value = record.get(field)
    if value is None:
        raise BadRow(Reason.MISSING_FIELD, f"{field!r} (the row has {', '.join(sorted(record)) or 'no fields'})")
    return value


def as_text(value: Any, field: str) -> str:
    """A string, or BadRow naming the field."""
    if not isinstance(value, str):
        raise BadRow(Reason.WRONG_TYPE, f"{field} must be a string, got {kind_of(value)}")
    return value


def text_field(record: Mapping[str, Any], field: str) -> str:
    """The text of a field that has to be there, or BadRow naming it."""
    return as_text(require(record, field), field)


def as_list(value: Any, field: str) -> list[Any]:
    """A list, or BadRow naming the field."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadRow(Reason.WRONG_TYPE, f"{field} must be a list, got {kind_of(value)}")
    return list(value)


def as_texts(value: Any, field: str) -> list[str]:
    """A list of strings, or BadRow naming the element."""
    return [as_text(item, f"{field}[{index}]") for index, item in enumerate(as_list(value, field))]


def as_numbers(value: Any, field: str, reason: Reason) -> list[float]:
    """A list of floats, or BadRow of `reason` naming the element; NaN passes, it is refused with its own message."""
    numbers = []
    for index, item in enumerate(as_list(value, field)):
        if isinstance(item, bool) or not isinstance(item, Real):
            raise BadRow(reason, f"{field}[{index}] is {kind_of(item)}, not a number")
        try:
            numbers.append(float(item))
        except OverflowError:
            raise BadRow(reason, f"{field}[{index}] is too large for a float") from None
    return numbers


def as_messages(value: Any, field: str) -> list[Message]:
    """A list of {"role", "content"} messages with known roles, or BadRow naming the message."""
    messages: list[Message] = []
    for index, item in enumerate(as_list(value, field)):
        place = f"{field}[{index}]"
        if not isinstance(item, Mapping):
            raise BadRow(Reason.WRONG_TYPE, f"{place} must be a message with role and content, got {kind_of(item)}")
        role, content = (as_text(require(item, key), f"{place}.{key}") for key in ("role", "content"))
        if role not in ROLES:
            raise BadRow(Reason.MESSAGE_ROLES, f"{place} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        messages.append({"role": role, "content": content})
    return messages


def optional_fields(record: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields `id`, `probs`, `sources` or `source` that a record of `count` responses has, as arguments of Row."""
    found: dict[str, Any] = {}
    identifier = record.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int, type(None))):
        raise BadRow(Reason.WRONG_TYPE, f"id must be a string or an integer, got {kind_of(identifier)}")
    if identifier is not None:
        found["id"] = str(identifier)
    if record.get("probs") is not None:
        found["probs"] = as_numbers(record["probs"], "probs", Reason.BAD_PROBABILITY)
    if record.get("sources") is not None:
        found["sources"] = as_texts(record["sources"], "sources")
    elif record.get("source") is not None:
        found["sources"] = [as_text(record["source"], "source")] * count
    return found


def kind_of(value: Any) -> str:
    """The type as a JSON reader knows it."""
    names = {"NoneType": "null", "bool": "true/false", "dict": "an object", "list": "a list", "str": "a string"}
    return names.get(type(value).__name__, type(value).__name__)
