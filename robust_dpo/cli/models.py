"""Loading models and tokenizers for the commands, with one readable error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robust_dpo.cli.failures import ModelError

# A name with one of these is a file that is not there, and the Hub would be asked for it for most of a minute.
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(name: str, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model from a directory or the Hub.

    Raises:
        ModelError: there is none, or it is not one.
    """
    from transformers import AutoModelForCausalLM

    _refuse_missing_path("model", name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name}: {_reason(name, error)}") from error
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, with a padding token (end of sequence where it has none of its own).

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    _refuse_missing_path("tokenizer", name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"tokenizer {name}: {_reason(name, error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _refuse_missing_path(kind: str, name: str) -> None:
    """Refuse a path that is not there, where the name cannot be one of the Hub, without asking it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(name).exists():
        return
    reason = f"{kind} {name}: no such directory, and no name that the Hub could know"
    if Path(name).suffix in _FILE_SUFFIXES:
        raise ModelError(reason)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(reason) from error


def _reason(name: str, error: Exception) -> str:
    """The first line of the error, and that there is no such directory, which the error of the Hub does not say."""
    first = str(error).strip().partition("\n")[0]
    return first if Path(name).exists() else f"no such directory, and not found on the Hub: {first}"
