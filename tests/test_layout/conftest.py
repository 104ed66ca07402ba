"""Tiny random models of several attention designs, random groups, and the padded layout they are compared with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from robust_dpo.layout import Group, LayoutPlan, PackedGroups
from robust_dpo.layout.choice import model_output

VOCAB = 97
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHAPE),
    "qwen2": ("Qwen2Config", {**_SHAPE, "tie_word_embeddings": True}),
    # The second layer looks back 6 tokens, less than most prompts and responses have.
    "qwen2-window": (
        "Qwen2Config",
        {**_SHAPE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**_SHAPE, "head_dim": 8}),
    "mistral-window": ("MistralConfig", {**_SHAPE, "sliding_window": 6}),
    # Softcapped scores, and a window in every other layer.
    "gemma2": ("Gemma2Config", {**_SHAPE, "head_dim": 8, "attn_logit_softcapping": 2.0, "sliding_window": 6}),
    "gpt2-learned-positions": ("GPT2Config", {**_GPT2, "n_positions": 256}),
    "llama4-chunks": (
        "Llama4TextConfig",
        {
            **_SHAPE,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 6,
            "num_local_experts": 2,
            "attn_temperature_tuning": False,
        },
    ),
}


def _build(family: str, **fields: Any) -> PreTrainedModel:
    name, shape = FAMILIES[family]
    config = getattr(transformers, name)(**{**_COMMON, **shape, **fields})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    """family, configuration fields → model with eager attention, in training mode."""
    return _build


@pytest.fixture
def draw_groups() -> Callable[..., list[Group]]:
    """count, size (K), seed → groups with prompts of 1 to 24 tokens and responses of 1 to 14."""

    def draw(count: int = 4, size: int = 2, seed: int | None = None) -> list[Group]:
        rng = random.Random(seed)

        def tokens(most: int) -> list[int]:
            return [rng.randrange(VOCAB) for _ in range(rng.randint(1, most))]

        return [Group(tokens(24), [tokens(14) for _ in range(size)]) for _ in range(count)]

    return draw


@pytest.fixture
def padded_token_logps() -> Callable[[Any, list[Group]], Tensor]:
    """model, groups → [N]: every response behind its own copy of the prompt, the model's own attention."""
    return lambda model, groups: _padded(model, groups)


@pytest.fixture
def exact_token_logps() -> Callable[[Any, list[Group]], Tensor]:
    """model, groups → the same [N], one by one: in float64, padding under a window is NaN in eager attention."""
    return lambda model, groups: torch.cat(
        [_padded(model, [Group(group.prompt, [response])]) for group in groups for response in group.responses]
    )


def _padded(model: Any, groups: list[Group]) -> Tensor:
    pairs = [([*group.prompt], [*response]) for group in groups for response in group.responses]
    ids = [torch.tensor(prompt + response) for prompt, response in pairs]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    padded = pad_sequence(ids, batch_first=True)
    table = model(input_ids=padded, attention_mask=mask, use_cache=False).logits.double().log_softmax(-1)
    return torch.cat(
        [
            rows[len(prompt) - 1 : len(prompt) + len(response) - 1].gather(1, torch.tensor(response)[:, None])[:, 0]
            for rows, (prompt, response) in zip(table, pairs, strict=True)
        ]
    )


@pytest.fixture
def packed_token_logps() -> Callable[[Any, PackedGroups, LayoutPlan], Tensor]:
    """model, layout, plan → the same [N] through packed rows."""

    def compute(model: Any, packed: PackedGroups, plan: LayoutPlan) -> Tensor:
        logits = model_output(model, packed, plan).logits.flatten(0, 1)[packed.rows]
        return logits.double().log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]

    return compute


@pytest.fixture
def in_float64() -> Callable[[Any], Any]:
    """Model → a copy of it in float64."""
    return lambda model: copy.deepcopy(model).double()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost a hundred times what these tiny products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
