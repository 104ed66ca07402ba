"""Tiny random models of several families, a tokenizer and preference rows for the trainer's tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
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
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SHAPE, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**_SHAPE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_SHAPE, "sliding_window": None}),
    "gemma2-softcap": ("Gemma2Config", {**_SHAPE, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "gpt2-tied": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "cohere-scale": ("CohereConfig", {**_SHAPE, "logit_scale": 0.25}),
    "granite-divides": ("GraniteConfig", {**_SHAPE, "logits_scaling": 4.0}),
    "mixtral-experts": (
        "MixtralConfig",
        # The grouped products of the default take no float64.
        {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
}


def _build_model(family: str = "llama", seed: int = 0, **fields: Any) -> PreTrainedModel:
    name, shape = _FAMILIES[family]
    # Twice the usual spread, so that logits and log-ratios differ visibly.
    config = getattr(transformers, name)(**{**_COMMON, "initializer_range": 0.15, **shape, **fields})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _build_rows(
    count: int = 12, size: int = 2, seed: int = 0, **columns: Callable[[random.Random], float]
) -> list[dict[str, Any]]:
    """Ragged prompts and responses; preferred responses use other words than the rest. `columns` draw K values."""
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


@pytest.fixture(params=list(_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    """family, seed, configuration fields → model."""
    return _build_model


@pytest.fixture
def build_rows() -> Callable[..., list[dict[str, Any]]]:
    """count, size (K), seed, columns → rows."""
    return _build_rows


@pytest.fixture(scope="session")
def module_models() -> tuple[Callable[..., PreTrainedModel], Callable[..., list[dict[str, Any]]]]:
    """`build_model` and `build_rows` for fixtures that outlive a test."""
    return _build_model, _build_rows


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
        own = (
            "ref_model",
            "train_dataset",
            "eval_dataset",
            "peft_config",
            "callbacks",
            "processing_class",
            "data_collator",
        )
        arguments = {name: options.pop(name) for name in own if name in options}
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        arguments.setdefault("train_dataset", _build_rows())
        arguments.setdefault("processing_class", tokenizer)
        config = RobustDPOConfig(**{**defaults, **options})
        return RobustDPOTrainer(_build_model() if model is None else model, args=config, **arguments)

    return make


@pytest.fixture
def whole_batch() -> Callable[[RobustDPOTrainer], dict[str, Any]]:
    """All training rows of a trainer, collated."""
    return lambda trainer: trainer.data_collator([*trainer.train_dataset])


@pytest.fixture
def response_logps() -> Callable[[Any, dict[str, Any]], Tensor]:
    """model, batch → [S] float64: the specification, token by token from the model's own logits."""

    def compute(model: Any, batch: dict[str, Any]) -> Tensor:
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        table = logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        chosen = table.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return (chosen * (labels != -100)).sum(1)

    return compute


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost a hundred times what these tiny products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
