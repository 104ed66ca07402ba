"""Loading models and tokenizers for the commands, with one readable error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robust_dpo.cli.failures import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(name: str, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model from a directory or the Hub.

    Raises:
        ModelError: there is none, or it is not one.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name}: {_first_line(error)}") from error
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with a padding token (end of sequence where it has none of its own).

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"tokenizer {name}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
