"""The model that every arm starts from: from scratch with its own tokenizer or pretrained, then a short warm-up."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from robust_dpo.data import PreferenceCollator, tokenize_groups
from robust_dpo.demo.settings import Budget

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Roles as plain words: a small vocabulary has no room for special tokens of a chat format.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if not loop.last or message['role'] != 'assistant' %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def texts_of(rows: Dataset) -> Iterator[str]:
    """Every prompt and response."""
    for row in rows:
        prompt = row["prompt"]
        yield prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt)
        yield from row["responses"]


def build_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: no text is out of its vocabulary. BOS before and EOS after are the data stage's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, budget: Budget, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights that follow from the seed."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=budget.hidden_size,
            intermediate_size=3 * budget.hidden_size,
            num_hidden_layers=budget.layers,
            num_attention_heads=budget.heads,
            max_position_embeddings=budget.max_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )


def load_pretrained(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a directory or the Hub, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_length: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Supervised fine-tuning, in place, on every response of `rows`, preferred or not: no label is used.

    Returns:
        The mean loss of the last steps, nats per token.
    """
    groups = tokenize_groups(rows, tokenizer, max_length=max_length, on_bad_row="drop")
    singles = Dataset.from_dict(
        {
            "prompt_ids": [row["prompt_ids"] for row in groups for _ in row["response_ids"]],
            "response_ids": [[response] for row in groups for response in row["response_ids"]],
        }
    )
    collate = PreferenceCollator.for_tokenizer(tokenizer)

    def language_modelling(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        collated = collate(batch)
        return {key: collated[key] for key in ("input_ids", "attention_mask", "labels")}

    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=0.1,
            save_strategy="no",
            seed=seed,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = Trainer(model, args, train_dataset=singles, data_collator=language_modelling)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return next(float(log["loss"]) for log in reversed(trainer.state.log_history) if "loss" in log)
