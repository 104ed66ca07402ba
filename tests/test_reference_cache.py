"""Fingerprints, journal and files of the reference cache: every change is noticed, nothing torn is believed."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from robust_dpo.data import PreferenceCollator
from robust_dpo.reference_cache import (
    BrokenEntry,
    CacheKey,
    Journal,
    ReferenceCache,
    base_tensors,
    collator_fingerprint,
    configuration_fingerprint,
    exclusive_journal,
    model_tensors,
    weights_fingerprint,
)

KEY = CacheKey(*(name * 4 for name in "abcdefghi"))
SIZES = np.array([2, 3, 1, 2])
DIGEST = KEY.digest


def values(count: int, seed: int = 0) -> np.ndarray:
    return -100 * np.random.default_rng(seed).random(count)


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=33, **shape, **options))


def fingerprint(model: nn.Module) -> str:
    return weights_fingerprint(model_tensors(model).items())


@given(data=st.data())
def test_every_value_counts(data: st.DataObject) -> None:
    """One unit in the last place of any one value of any one tensor is another fingerprint."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64]
    shapes = data.draw(st.lists(st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4)]), min_size=1, max_size=4))
    tensors = {
        f"t{index}": (100 * torch.randn(shape)).to(data.draw(st.sampled_from(dtypes)))
        for index, shape in enumerate(shapes)
    }
    before = weights_fingerprint(tensors.items())
    assert weights_fingerprint([(name, tensor.clone()) for name, tensor in reversed(tensors.items())]) == before
    name = data.draw(st.sampled_from([*tensors]))
    raw = tensors[name].view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    raw[place] ^= 1
    assert weights_fingerprint(tensors.items()) != before
    raw[place] ^= 1
    assert weights_fingerprint(tensors.items()) == before


def test_tensors_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_dpo.reference_cache.fingerprint._PIECE_BYTES", 64)
    tensor = torch.randn(33, 5)
    found = {weights_fingerprint([("a", tensor)])}
    for row in range(33):
        changed = tensor.clone()
        changed[row, 4] += 1
        found.add(weights_fingerprint([("a", changed)]))
    assert len(found) == 34
    assert weights_fingerprint([("a", tensor.t().contiguous().t())]) in found, "not how it lies in memory"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: {"b": tensor},
        lambda tensor: {"a": tensor.view(2, 8)},
        lambda tensor: {"a": tensor.view(torch.int32)},
        lambda tensor: {"a": tensor, "b": torch.zeros(0)},
        lambda tensor: {"a": tensor[:8], "b": tensor[8:]},
    ],
    ids=["name", "shape", "dtype", "one more", "cut in two"],
)
def test_same_bytes_are_not_the_same_weights(change: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    tensor = torch.randn(16)
    assert weights_fingerprint(change(tensor).items()) != weights_fingerprint([("a", tensor)])


def test_buffers_that_are_not_saved_count() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    assert before == fingerprint(tiny_llama())
    model.model.rotary_emb.inv_freq[1] *= 2
    assert "model.rotary_emb.inv_freq" not in model.state_dict()
    assert fingerprint(model) != before
    assert fingerprint(tiny_llama().bfloat16()) != before


def test_configuration_counts_but_not_where_it_came_from(tmp_path: Path) -> None:
    model = tiny_llama()
    before = configuration_fingerprint(model, adapters=True)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._name_or_path != model.config._name_or_path
    assert configuration_fingerprint(again, adapters=True) == before
    assert configuration_fingerprint(tiny_llama(rms_norm_eps=1e-4), adapters=True) != before


def test_scale_of_an_adapter_counts_where_it_takes_part() -> None:
    def adapted(alpha: int) -> nn.Module:
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj", "k_proj"], "init_lora_weights": False}
        return get_peft_model(tiny_llama(), LoraConfig(lora_alpha=alpha, **settings))

    small, large = adapted(4), adapted(8)
    assert fingerprint(small) == fingerprint(large), "the scale is no weight"
    with_adapter = {configuration_fingerprint(model, adapters=True) for model in (small, large, adapted(4))}
    assert len(with_adapter) == 2
    bases = {configuration_fingerprint(model.get_base_model(), adapters=False) for model in (small, large)}
    assert len(bases) == 1


def test_adapters_of_transformers_count_too() -> None:
    def adapted(alpha: int) -> Any:
        model = tiny_llama()
        model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        return model

    disabled = adapted(4)
    disabled.disable_adapters()
    models = [adapted(4), adapted(8), disabled, tiny_llama()]
    assert len({configuration_fingerprint(model, adapters=True) for model in models}) == 4
    assert configuration_fingerprint(adapted(4), adapters=True) == configuration_fingerprint(models[0], adapters=True)


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True),
    "saved modules": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "shared buffers": VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "scales": IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "virtual tokens": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "prompts of layers": AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_tensors_outside_of_the_adapter(name: str) -> None:
    """All of them, trained or not, and none of the adapter's."""
    plain = tiny_llama(tie_word_embeddings=False)
    expected = sorted(tensor.sum().item() for tensor in model_tensors(plain).values())
    adapted = get_peft_model(plain, copy.deepcopy(ADAPTERS[name]))
    for trained in (True, False):
        adapted.requires_grad_(trained)
        assert sorted(tensor.sum().item() for tensor in base_tensors(adapted).values()) == expected


@dataclass(frozen=True)
class _Collator(PreferenceCollator):
    mask_ends: bool = False


def test_collators_are_told_apart() -> None:
    known = [PreferenceCollator(), _Collator(), _Collator(mask_ends=True), lambda rows: {}]
    assert len({collator_fingerprint(each) for each in known}) == 4
    assert collator_fingerprint(_Collator(mask_ends=True)) == collator_fingerprint(known[2])
    assert collator_fingerprint(PreferenceCollator(3, 8)) == collator_fingerprint(known[0])
    with pytest.raises(ValueError, match="data_collator: expected one that can be pickled"):
        collator_fingerprint(row for row in [])


def _configuration_of_adapter(_: int) -> str:
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "k_proj", "o_proj", "up_proj"])
    return configuration_fingerprint(get_peft_model(tiny_llama(), settings), adapters=True)


@pytest.mark.slow
def test_configuration_is_the_same_in_every_process() -> None:
    """Sets of names are ordered by hashes that each process draws anew."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        assert len(set(pool.map(_configuration_of_adapter, range(4), chunksize=1))) == 1


@pytest.mark.parametrize("name", [field.name for field in fields(CacheKey)])
def test_every_field_of_the_key_counts(name: str) -> None:
    other = replace(KEY, **{name: 2 if name == "format" else "other"})
    assert other.digest != KEY.digest
    assert KEY.differences(other.__dict__) == [name]


def test_saved_values_come_back_memory_mapped(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "new" / "folder")
    assert cache.load(KEY, SIZES) is None
    path = cache.save(KEY, values(8), SIZES)
    stored = cache.load(KEY, SIZES)
    assert stored is not None
    flat = [number for row in stored for number in row["ref_logps"]]
    assert flat == values(8).tolist()
    assert [len(row) for row in stored["ref_logps"]] == SIZES.tolist()
    assert stored.cache_files == [{"filename": str(path)}]
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing but the file is left"


@given(data=st.data())
def test_damaged_files_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut anywhere, or with another value anywhere among the values."""
    cache = ReferenceCache(tmp_path_factory.mktemp("cache"))
    path = cache.save(KEY, values(8), SIZES)
    whole = path.read_bytes()
    start = whole.index(values(8).tobytes())
    if data.draw(st.booleans(), "cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, start + 63))])
    else:
        place = data.draw(st.integers(start, start + 63))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :])
    with pytest.raises(BrokenEntry, match=r"cannot be read|checksum|rows"):
        cache.load(KEY, SIZES)
    cache.save(KEY, values(8), SIZES)
    assert cache.load(KEY, SIZES) is not None


def test_a_file_of_another_key_or_other_rows_is_refused(tmp_path: Path) -> None:
    cache, other = ReferenceCache(tmp_path), replace(KEY, weights="other")
    cache.save(KEY, values(8), SIZES)
    cache.path(KEY).rename(cache.path(other))
    with pytest.raises(BrokenEntry, match="made for another key"):
        cache.load(other, SIZES)
    cache.save(KEY, values(8), SIZES)
    for sizes in (SIZES[::-1], SIZES[:-1]):
        with pytest.raises(BrokenEntry, match=r"its 4 rows do not have the responses of the \d rows"):
            cache.load(KEY, sizes)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ReferenceCache(tmp_path)
    path = cache.save(KEY, values(8), SIZES)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("robust_dpo.reference_cache.store.os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            cache.save(KEY, values(8, seed=1), SIZES)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_miss_is_explained_by_the_closest_entry(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache")
    assert cache.why_missing(KEY) == ""
    cache.save(replace(KEY, rows="x", weights="x", head="x"), values(8), SIZES)
    cache.save(replace(KEY, truncation="x"), values(8), SIZES)
    (tmp_path / "cache" / "ref_logps-torn.arrow").write_bytes(b"torn")
    assert cache.why_missing(KEY) == "; the closest entry has another truncation"


@given(counts=st.lists(st.integers(0, 5), max_size=6), data=st.data())
def test_journal_keeps_whole_records(
    counts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut or damaged anywhere, what comes before is read and what is appended afterwards follows it."""
    path = tmp_path_factory.mktemp("journal") / "partial"
    journal = Journal(path, DIGEST)
    ends = [path.stat().st_size]
    parts = [values(count, seed) for seed, count in enumerate(counts)]
    for part in parts:
        journal.append(part)
        ends.append(path.stat().st_size)
    journal.close()
    cut = data.draw(st.integers(ends[0], ends[-1]), "cut")
    content = path.read_bytes()
    torn = content[:cut]
    if data.draw(st.booleans(), "rubbish follows"):
        torn += bytes(byte ^ 0xFF for byte in content[cut:])
    path.write_bytes(torn)
    whole = sum(end <= cut for end in ends[1:])
    kept = np.concatenate([np.empty(0), *parts[:whole]])
    journal = Journal(path, DIGEST)
    np.testing.assert_array_equal(journal.values, kept)
    journal.append(values(3))
    journal.close()
    again = Journal(path, DIGEST)
    np.testing.assert_array_equal(again.values, np.concatenate([kept, values(3)]))
    again.close()


def test_journal_of_something_else_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    for digest, content in ((DIGEST, None), (replace(KEY, rows="x").digest, None), (DIGEST, b"rubbish")):
        if content is not None:
            path.write_bytes(content)
        journal = Journal(path, digest)
        assert len(journal.values) == 0
        journal.append(values(2))
        journal.close()


def test_a_journal_has_one_writer_and_goes_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "partial"
    with exclusive_journal(path, DIGEST) as first:
        assert first is not None
        first.append(values(2))
        with exclusive_journal(path, DIGEST) as second:
            assert second is None
        with pytest.raises(KeyboardInterrupt), exclusive_journal(path, DIGEST) as third:
            assert third is None
            raise KeyboardInterrupt
    assert [*path.parent.iterdir()] == []
    with pytest.raises(KeyboardInterrupt), exclusive_journal(path, DIGEST) as killed:
        assert killed is not None
        killed.append(values(3))
        raise KeyboardInterrupt
    with exclusive_journal(path, DIGEST) as resumed:
        assert resumed is not None
        assert resumed.values.tolist() == values(3).tolist()
