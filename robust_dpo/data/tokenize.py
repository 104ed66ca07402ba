"""Canonical rows to token ids, with an exact boundary between prompt and response."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
from datasets import List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from robust_dpo.data.fingerprint import json_fingerprint, tokenizer_fingerprint
from robust_dpo.data.rows import DROP_HINT, BadRow, Message, Prompt, Reason
from robust_dpo.errors import DataError, argument_error, type_error

logger = logging.getLogger(__name__)

Cut = Callable[[list[int], int], list[int]]

TRUNCATIONS: dict[str, Cut] = {
    "keep_end": lambda ids, keep: ids[len(ids) - keep :],
    "keep_start": lambda ids, keep: ids[:keep],
}
"""Which part of a prompt that is too long stays."""

_STATUS = "__status"
# Raised when the same text under the same limits gives other ids than before.
_RULES = 1


def tokenize_groups(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 512,
    max_prompt_length: int | None = None,
    truncation: str = "keep_end",
    on_bad_row: str = "error",
    add_bos: bool | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Turn canonical rows into token ids.

    Prompt and response are tokenised one by one and joined, so the first response token begins where the response text
    begins. A tokenizer that merges across that place would give other ids for the joined text; in exchange all
    responses of a group have the same prompt ids, and no prompt token depends on the response.

    A prompt begins with one BOS where the tokenizer uses one; every whole response ends with one EOS where the
    tokenizer has one. Neither is written twice if the text or the chat template holds it already. Conversational
    prompts go through the tokenizer's chat template with its generation prompt; the response is what the template
    writes after that.

    Truncation, where a prompt and its longest response exceed `max_length`: first the prompt gives way, down to half
    of `max_length`; then responses lose their end, and with it their EOS: their text did not end there. BOS stays.

    Args:
        dataset: canonical rows (`load_preferences(...).dataset`).
        tokenizer: the model's tokenizer.
        max_length: most tokens of prompt and response together, at least 2; None is no limit.
        max_prompt_length: most tokens of the prompt, applied first; None is no limit of its own.
        truncation: which part of a long prompt stays: "keep_end" or "keep_start".
        on_bad_row: what to do with rows whose prompt or response has no token, or that the chat template refuses:
            "error", or "drop" with a warning that counts them.
        add_bos: write BOS before the prompt; None does what the tokenizer itself does.
        num_proc: processes.
        cache_dir: directory to keep the ids in; rows that were tokenised before by the same tokenizer under the same
            limits are then read from there. None keeps nothing.

    Returns:
        The dataset without prompt and responses, with prompt_ids (list of P int32), response_ids (K lists of int32),
        prompt_cut and response_cut (tokens that truncation removed: int32, and K int32). All other columns stay.

    Raises:
        DataError: no chat template for conversational rows; with "error", a row that cannot be used, and why; with
            "drop", no row that can.
        TypeError, ValueError: an argument that cannot be used.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise type_error("dataset", "a datasets.Dataset of canonical rows (load_preferences(...).dataset)", dataset)
    for column in ("id", "prompt", "responses"):
        if column not in dataset.column_names:
            raise argument_error("dataset", f"the canonical column {column!r}", dataset.column_names)
    if not isinstance(dataset.features["responses"], List):
        raise argument_error("dataset", "a list of texts in the column responses", dataset.features["responses"])
    if on_bad_row not in ("error", "drop"):
        raise argument_error("on_bad_row", "'error' or 'drop'", repr(on_bad_row))
    encoder = GroupEncoder.build(tokenizer, add_bos)
    if isinstance(dataset.features["prompt"], List) and not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations, but the tokenizer has no chat template; set tokenizer.chat_template, or "
            "use the tokenizer of an instruction-tuned model, or give the prompts as text"
        )
    limits = Limits(max_length, max_prompt_length, truncation)
    encode = partial(_encode_batch, encoder=encoder, limits=limits)
    ids = {"prompt_ids": List(Value("int32")), "response_ids": List(List(Value("int32")))}
    cuts = {"prompt_cut": Value("int32"), "response_cut": List(Value("int32"))}
    kept = {name: kind for name, kind in dataset.features.items() if name not in ("prompt", "responses")}
    # Datasets would hash the function with everything that it refers to, library versions and paths among it.
    recipe = (
        _RULES,
        dataset._fingerprint,
        tokenizer_fingerprint(tokenizer),
        tokenizer.chat_template,
        encoder.bos,
        str(limits),
    )
    fingerprint = json_fingerprint(recipe)[:32]
    tokenised = dataset.map(
        encode,
        batched=True,
        num_proc=num_proc,
        remove_columns=["prompt", "responses"],
        features=datasets.Features({**kept, **ids, **cuts, _STATUS: Value("string")}),
        load_from_cache_file=cache_dir is not None,
        cache_file_name=None if cache_dir is None else _cache_file(Path(cache_dir), fingerprint),
        new_fingerprint=fingerprint,
        desc="Tokenising",
    )
    return _usable(tokenised, on_bad_row)


def _cache_file(directory: Path, fingerprint: str) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    return str(directory / f"tokens-{fingerprint}.arrow")


@dataclass(frozen=True)
class Limits:
    """How long a prompt and its responses may be."""

    max_length: int | None
    max_prompt_length: int | None
    truncation: str

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise argument_error("truncation", f"one of {', '.join(TRUNCATIONS)}", repr(self.truncation))
        if self.max_length is not None and self.max_length < 2:
            raise argument_error("max_length", "at least 2, one token of prompt and one of response", self.max_length)
        if self.max_prompt_length is not None:
            if self.max_prompt_length < 1:
                raise argument_error("max_prompt_length", "at least 1", self.max_prompt_length)
            if self.max_length is not None and self.max_prompt_length >= self.max_length:
                expected = f"less than max_length ({self.max_length}), so that the response has room"
                raise argument_error("max_prompt_length", expected, self.max_prompt_length)

    def apply(
        self, prompt: list[int], responses: list[list[int]], bos: int | None
    ) -> tuple[list[int], list[list[int]]]:
        """The ids that stay; `bos` at the start of a prompt is not cut away."""
        if self.max_prompt_length is not None:
            prompt = self._cut_prompt(prompt, self.max_prompt_length, bos)
        if self.max_length is not None:
            room = self.max_length - max(map(len, responses), default=0)
            prompt = self._cut_prompt(prompt, max(room, self.max_length // 2), bos)
            responses = [ids[: self.max_length - len(prompt)] for ids in responses]
        return prompt, responses

    def _cut_prompt(self, prompt: list[int], keep: int, bos: int | None) -> list[int]:
        if len(prompt) <= keep:
            return prompt
        head = prompt[:1] if prompt[0] == bos and keep > 1 else []
        return head + TRUNCATIONS[self.truncation](prompt[len(head) :], keep - len(head))


@dataclass(frozen=True)
class GroupEncoder:
    """The boundary rules of one tokenizer.

    Args:
        tokenizer: the tokenizer.
        bos: the id that every prompt begins with, or None.
        eos: the id that every whole response ends with, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    eos: int | None

    @staticmethod
    def build(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> GroupEncoder:
        """Find out whether the tokenizer writes BOS itself, unless `add_bos` says it."""
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise type_error("tokenizer", "a transformers tokenizer", tokenizer)
        bos = tokenizer.bos_token_id
        if add_bos and bos is None:
            raise argument_error("add_bos", "None or False for a tokenizer without a BOS token", add_bos)
        if add_bos is None:
            add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        return GroupEncoder(tokenizer, bos if add_bos else None, tokenizer.eos_token_id)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text and nothing else."""
        if not texts:  # a fast tokenizer fails on an empty batch
            return []
        # verbose=False: the warning about model_max_length is about inputs, and these are cut afterwards
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def texts(self, prompt: Prompt, responses: Sequence[str]) -> tuple[str, list[str]]:
        """The texts to tokenise: those of the row, or what the chat template makes of its messages (or BadRow)."""
        if isinstance(prompt, str):
            return prompt, list(responses)
        head = self._render(prompt, add_generation_prompt=True)
        return head, [self._render_response(prompt, head, response) for response in responses]

    def begin(self, prompt: list[int]) -> list[int]:
        """The prompt with its BOS."""
        return prompt if self.bos is None or prompt[:1] == [self.bos] else [self.bos, *prompt]

    def end(self, response: list[int]) -> list[int]:
        """The response with its EOS."""
        return response if self.eos is None or response[-1:] == [self.eos] else [*response, self.eos]

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:  # templates raise for roles or an order of turns that they do not know
            raise BadRow(Reason.CHAT_TEMPLATE, f"it refuses the conversation: {error}") from error
        return str(text)

    def _render_response(self, prompt: list[Message], head: str, response: str) -> str:
        turn = Message(role="assistant", content=response)
        whole = self._render([*prompt, turn], add_generation_prompt=False)
        if not whole.startswith(head):
            raise BadRow(
                Reason.CHAT_TEMPLATE,
                "it writes the prompt differently once a response follows, so there is no boundary between them; with "
                f"the generation prompt the prompt ends in {head[-40:]!r}, with the response "
                f"{whole[max(0, len(head) - 40) : len(head) + 20]!r} stands there",
            )
        text = whole[len(head) :]
        # Templates put a line break after the turn's EOS; generation stops before it, so it is no part of the response.
        eos = self.tokenizer.eos_token
        return text.rstrip() if eos and text.rstrip().endswith(eos) else text


def _encode_batch(batch: Mapping[str, list[Any]], encoder: GroupEncoder, limits: Limits) -> dict[str, list[Any]]:
    """The new columns of a batch of rows; the status column holds what is wrong with a row, or null."""
    statuses: list[str | None] = []
    texts: list[tuple[str, list[str]]] = []
    for row in zip(batch["prompt"], batch["responses"], strict=True):
        try:
            texts.append(encoder.texts(*row))
            statuses.append(None)
        except BadRow as bad:
            texts.append(("", []))
            statuses.append(str(bad))
    prompts = encoder.encode([prompt for prompt, _ in texts])
    flat = encoder.encode([response for _, responses in texts for response in responses])
    bounds = accumulate((len(responses) for _, responses in texts), initial=0)
    groups = [flat[start:stop] for start, stop in pairwise(bounds)]
    columns: dict[str, list[Any]] = {
        name: [] for name in ("prompt_ids", "response_ids", "prompt_cut", "response_cut", _STATUS)
    }
    for status, prompt_ids, responses in zip(statuses, prompts, groups, strict=True):
        prompt = encoder.begin(prompt_ids)
        whole = [encoder.end(response) for response in responses]
        kept_prompt, kept = limits.apply(prompt, whole, encoder.bos)
        columns["prompt_ids"].append(kept_prompt)
        columns["response_ids"].append(kept)
        columns["prompt_cut"].append(len(prompt) - len(kept_prompt))
        columns["response_cut"].append([len(all_) - len(some) for all_, some in zip(whole, kept, strict=True)])
        columns[_STATUS].append(status or _missing_tokens(prompt, responses))
    return columns


def _missing_tokens(prompt: list[int], responses: list[list[int]]) -> str | None:
    """Why a row cannot be trained on, or None: the token before a response predicts its first token."""
    if prompt and responses and all(responses):
        return None
    empty = "prompt" if not prompt else f"responses[{responses.index([])}]" if responses else "responses"
    return f"{Reason.NO_TOKENS.value}: the tokenizer makes nothing of {empty}"


def _usable(tokenised: datasets.Dataset, on_bad_row: str) -> datasets.Dataset:
    """Drop or refuse the rows whose status says why they cannot be used."""
    statuses = tokenised[_STATUS][:]
    tokenised = tokenised.remove_columns(_STATUS)
    bad = {index: status for index, status in enumerate(statuses) if status is not None}
    if not bad:
        return tokenised
    index, status = next(iter(bad.items()))
    first = f"row {tokenised[index]['id']}: {status}"
    if on_bad_row == "error":
        raise DataError(f"{first} ({len(bad)} of {len(statuses)} rows cannot be tokenised; {DROP_HINT})")
    if len(bad) == len(statuses):
        raise DataError(f"{first} (none of the {len(statuses)} rows can be tokenised)")
    counts = Counter(status.partition(":")[0] for status in bad.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    logger.warning("dropped %d of %d rows after tokenisation (%s); %s", len(bad), len(statuses), reasons, first)
    return tokenised.select([index for index in range(len(statuses)) if index not in bad])
