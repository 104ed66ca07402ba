"""Tiny random models of several families, a tokenizer and preference rows for the trainer's tests."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

WORDS = [f"w{index}" for index in range(190)]
VOCAB = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{word: index + 4 for index, word in enumerate(WORDS)}}

_COMMON = {"vocab_size": len(VOCAB), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SHAPE, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**_SHAPE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_SHAPE, "sliding_window": None}),
    "gemma2-softcap": (
        "Gemma2Config",
        {**_SHAPE, "head_dim": 8, "final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    ),
    "gpt2-tied": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "cohere-scale": ("CohereConfig", {**_SHAPE, "logit_scale": 0.25}),
    "granite-divides": ("GraniteConfig", {**_SHAPE, "logits_scaling": 4.0}),
}


def build_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A model with random weights, large enough that its logits differ."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**_COMMON, initializer_range=0.15, **fields)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=fields.get("attn_implementation"))


def build_rows(count: int = 12, size: int = 2, seed: int = 0, **columns: Callable[[random.Random], float]) -> list[dict]:
    """Rows with ragged prompts and responses; the preferred response uses other words than the rest."""
    rng = random.Random(seed)

    def text(words: list[str]) -> str:
        return " ".join(rng.choices(words, k=rng.randint(2, 9)))

    half = len(WORDS) // 2
    return [
        {
            "id": f"row-{index}",
            "prompt": text(WORDS),
            "responses": [text(WORDS[:half])] + [text(WORDS[half:]) for _ in range(size - 1)],
            **{name: [draw(rng) for _ in range(size)] for name, draw in columns.items()},
        }
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., RobustDPOTrainer]:
    """A trainer for a tiny model; keywords are arguments of the trainer or of its configuration."""

    def make(model: Any = None, **options: Any) -> RobustDPOTrainer:
        own = ("ref_model", "train_dataset", "eval_dataset", "peft_config", "callbacks", "processing_class")
        arguments = {name: options.pop(name) for name in own if name in options}
        options.setdefault("output_dir", str(tmp_path / "run"))
        options = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 3, **options}
        quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        arguments.setdefault("train_dataset", build_rows())
        arguments.setdefault("processing_class", tokenizer)
        config = RobustDPOConfig(**{**quiet, **options})
        return RobustDPOTrainer(build_model() if model is None else model, args=config, **arguments)

    return make


def first_batch(trainer: RobustDPOTrainer, count: int | None = None) -> dict[str, Any]:
    """The collated first rows of the trainer's training data."""
    rows = trainer.train_dataset
    return trainer.data_collator([rows[index] for index in range(count or len(rows))])


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


__all__ = ["FAMILIES", "build_model", "build_rows", "first_batch", "warnings"]
