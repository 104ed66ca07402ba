"""What tokenizers and tokenised rows are recognised by: hashes of their contents, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json

import datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from robust_dpo.data.lengths import token_columns


def json_fingerprint(value: object) -> str:
    """Hash of what JSON makes of a value; sets are sorted, as their own order changes from process to process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of how a tokenizer makes ids of texts, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # A tokenizer in Python: its state has no common form. Datasets knows how to hash it, paths included.
        return str(Hasher.hash(tokenizer))
    rules = json.loads(backend.to_str())
    # What the last call asked for, not what the tokenizer is.
    del rules["truncation"], rules["padding"]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_fingerprint({"rules": rules, "special": special})


def rows_fingerprint(tokenised: datasets.Dataset) -> str:
    """Hash of the token ids of all groups, in order, and of how they are cut into prompts and responses."""
    digest = hashlib.sha256()
    for columns in token_columns(tokenised):
        for values in columns:
            digest.update(values.data)
    return digest.hexdigest()


def _plain(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
