"""The code in the README runs, and the API page is what the docstrings say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_cases import TRANSFORMS, check_errors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from robust_dpo import dispatch
from robust_dpo.cli.live_checks import check_backend

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    letters = {character: index for index, character in enumerate("</s> abcdefghijklmnopqrstuvwxyz")}
    vocabulary = {"</s>": 0, "<unk>": 1} | {letter: index + 2 for letter, index in letters.items()}
    backbone = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backbone.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    names = {
        "model": LlamaForCausalLM(config),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=backbone, eos_token="</s>", unk_token="<unk>"),
        "pairs": [
            {"prompt": "say a word ", "responses": ["good", "bad"], "probs": [0.8, 0.3]},
            {"prompt": "say another ", "responses": ["fine", "worse"], "probs": [0.6, 0.4]},
        ]
        * 4,
    }
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_backend_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text("utf-8"), flags=re.DOTALL)
    (tmp_path / "my_backend.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(dispatch, "_REGISTRY", dict(dispatch._REGISTRY))
    launcher = importlib.import_module("my_backend").row_logprob
    assert check_backend("mine").sound
    for transform in TRANSFORMS:
        for dtype, vocab in ((torch.float32, 1), (torch.float32, 37), (torch.bfloat16, 517)):
            check_errors(launcher, dtype, 5, vocab, transform)
    tile, targets = torch.full((2, 7), -torch.inf), torch.tensor([3, -100])
    tile[0, 3] = 0.5
    result = launcher(tile, targets, entropy=True, grad_out=tile)
    assert [*map(torch.Tensor.tolist, result)] == [[0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]
    assert not tile.any()


def test_api_page_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_api.py"), "--check"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ, PYTHONPATH=str(ROOT))
    )
    assert result.returncode == 0, result.stderr
