"""What one comparison trains: a model, lists of responses, a reference and a dtype."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

BETA = 0.1
LAM = 1.0
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
IGNORE = -100
DTYPES = ("fp32", "bf16")
REFERENCES = ("live", "precomputed")


@dataclass(frozen=True)
class ModelShape:
    """A Llama-type model with random weights."""

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    def build(self, seed: int, attention: str) -> PreTrainedModel:
        """In fp32 on the CPU; the same weights for the same seed."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=0,
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return model


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 512, 32, 64, 2, 4, 2, False),
        ModelShape("small", 32_000, 256, 688, 4, 4, 4, False),
        ModelShape("smollm2-135m", 49_152, 576, 1_536, 30, 9, 3, True),
    )
}
"""By name; `tiny` only shows that everything runs."""


@dataclass(frozen=True)
class Setting:
    """One comparison, as every process is told.

    Args:
        model: what is trained; the reference has the same shape and other random weights.
        dtype: "fp32", "bf16" for autocast over fp32 weights, or "fp64", to see what is right.
        reference: "live", or "precomputed" before the first step.
        responses: K of every group. 2: `sigmoid` (DPO), the mean over pairs. More: `plackett_luce` and the calibrated
            worst case, λ log mean exp(h ℓ / λ).
        groups: in a step.
        max_length: most tokens of a prompt and a response.
        warmups, rounds: untimed and timed steps.
        device: "cpu" or "cuda".
        attention: implementation that the models are built with.
        seed: of everything random.
    """

    model: ModelShape
    dtype: str
    reference: str
    responses: int
    groups: int
    max_length: int
    warmups: int
    rounds: int
    device: str
    attention: str
    seed: int

    @property
    def name(self) -> str:
        kind = "pairs" if self.pairs else f"lists of {self.responses}"
        return f"{self.model.name}, {kind}, {self.reference} reference, {self.dtype}"

    @property
    def pairs(self) -> bool:
        return self.responses == 2

    @property
    def live(self) -> bool:
        return self.reference == "live"

    @property
    def steps(self) -> int:
        return self.warmups + self.rounds

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def policy(self) -> PreTrainedModel:
        """The model at its start, on the CPU: in fp64, or in fp32."""
        return self._wide(self.model.build(self.seed, self.attention))

    def reference_model(self) -> PreTrainedModel:
        """Other weights than the policy's, so that losses differ from log 2 from the first step on."""
        return self._wide(self.model.build(self.seed + 1, self.attention))

    def _wide(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.double() if self.dtype == "fp64" else model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def use_one_gpu() -> None:
    """Hide all GPUs but the first from this process: trainers would spread over them. Before CUDA is used."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the arguments that both trainers give it."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
