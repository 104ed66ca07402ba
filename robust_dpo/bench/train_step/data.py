"""Token ids of preference groups: from a file, or drawn at random with lengths like those of dialogues."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from robust_dpo.bench.train_step.setting import Setting
from robust_dpo.data import load_preferences, tokenize_groups
from robust_dpo.errors import DataError

END = "<|end|>"
# A vocabulary as large as the model's would learn a small file by heart. With 8,192 entries a token of the HH pairs is
# 3.9 characters long, as in English text under the tokenizers of large models.
_VOCABULARY = 8_192
# Medians of lognormal lengths, and their spread, like those of the HH pairs.
_PROMPT, _RESPONSE = (96.0, 0.75), (28.0, 0.95)

Row = dict[str, Any]
"""id, prompt_ids [P], response_ids K × [L], calibration (float)."""


@dataclass(frozen=True)
class Workload:
    """The groups of all steps, in order.

    Args:
        rows: groups × steps of them.
        source: where they come from, for people.
    """

    rows: list[Row]
    source: str

    @property
    def prompt_share(self) -> float:
        """Share of the tokens that are prompt, where every response brings its own copy."""
        prompt = sum(len(row["prompt_ids"]) * len(row["response_ids"]) for row in self.rows)
        return prompt / sum(_tokens(row) for row in self.rows)

    def tokens(self, groups: int) -> list[int]:
        """Tokens of every step of `groups` groups: prompt and response of each response, without padding."""
        return [sum(map(_tokens, batch)) for batch in self.batches(groups)]

    def padding_share(self, groups: int) -> float:
        """Share of padding in batches that are as wide as their longest sequence."""
        padded = sum(
            sum(len(row["response_ids"]) for row in batch)
            * max(len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in batch)
            for batch in self.batches(groups)
        )
        return 1 - sum(self.tokens(groups)) / padded

    def batches(self, groups: int) -> list[list[Row]]:
        return [self.rows[start : start + groups] for start in range(0, len(self.rows), groups)]


def _tokens(row: Row) -> int:
    return sum(len(row["prompt_ids"]) + len(response) for response in row["response_ids"])


def make_workload(setting: Setting, path: Path | None) -> Workload:
    """The groups of a setting.

    Args:
        setting: how many, of how many responses, and how long.
        path: preferences in any format that `load_preferences` reads; None draws token ids at random.

    Raises:
        DataError: the file has too few usable groups.
    """
    rng = random.Random(setting.seed)
    if path is None:
        rows = _random_rows(setting, rng)
        source = "random token ids with lengths like those of short dialogues"
    else:
        rows, source = _rows_of_file(setting, path, rng)
    for row in rows:
        row["calibration"] = rng.uniform(0.25, 2.0)
    return Workload(rows, source)


def _random_rows(setting: Setting, rng: random.Random) -> list[Row]:
    def ids(median: float, spread: float, most: int) -> list[int]:
        length = min(max(1, round(median * rng.lognormvariate(0.0, spread))), most)
        return [rng.randrange(1, setting.model.vocab) for _ in range(length)]

    half = setting.max_length // 2
    return [
        {
            "id": str(index),
            "prompt_ids": ids(*_PROMPT, half),
            "response_ids": [ids(*_RESPONSE, half) for _ in range(setting.responses)],
        }
        for index in range(setting.groups * setting.steps)
    ]


def _rows_of_file(setting: Setting, path: Path, rng: random.Random) -> tuple[list[Row], str]:
    """Groups in a random order; lists longer than those of the file borrow responses of other prompts."""
    dataset = load_preferences(path, on_bad_row="drop").dataset
    tokenizer = train_tokenizer(
        [text for row in dataset for text in (row["prompt"], *row["responses"])], min(_VOCABULARY, setting.model.vocab)
    )
    tokenised = tokenize_groups(dataset, tokenizer, max_length=setting.max_length, on_bad_row="drop").shuffle(
        seed=setting.seed
    )
    needed = setting.groups * setting.steps
    if len(tokenised) < needed:
        raise DataError(f"expected at least {needed} usable groups, found {len(tokenised)}", path=path)
    own: Sequence[Row] = tokenised.select_columns(["id", "prompt_ids", "response_ids"]).to_list()
    rows = [_with_responses(row, setting, own, rng) for row in own[:needed]]
    borrowed = sum(max(0, setting.responses - len(row["response_ids"])) for row in own[:needed])
    source = f"{path.name}, byte-level BPE with {len(tokenizer)} entries trained on it"
    return rows, source + (f"; {borrowed} responses borrowed from other prompts" if borrowed else "")


def _with_responses(row: Row, setting: Setting, others: Sequence[Row], rng: random.Random) -> Row:
    responses = row["response_ids"][: setting.responses]
    room = setting.max_length - len(row["prompt_ids"])
    while len(responses) < setting.responses:
        responses = [*responses, rng.choice(rng.choice(others)["response_ids"])[:room]]
    return {**row, "response_ids": responses}


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` entries; entry 0 ends and pads."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """What the trainers ask for the id to pad with: 0. The rows are tokenised already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({END: 0}, unk_token=END)), eos_token=END, pad_token=END
    )
