"""The boundary between prompt and response, BOS and EOS, chat templates, truncation."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from robust_dpo.data import length_statistics, load_preferences, tokenize_groups
from robust_dpo.errors import DataError

CORPUS = [
    "the colour of the sky is blue and the colour of grass is green",
    "what is the colour of the sea? the sea is blue, the answer is: blue!",
    "Human: hello there\n\nAssistant: hello, how are you today?",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS once at the start of the conversation, EOS after every answer
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# neither BOS nor EOS
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# says at the top how many turns there are, so the prompt changes when a response follows
COUNTING = "{{ messages | length }} turns. {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def byte_level(**special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE: text → ids → text is exact, nothing is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.add_special_tokens({"additional_special_tokens": names[2:]})
    return wrapped


def with_post_processor() -> PreTrainedTokenizerFast:
    """The same, writing <s> … </s> around every text as Llama-like tokenizers do."""
    wrapped = byte_level(bos_token="<s>", eos_token="</s>")
    ids = [(name, wrapped.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ids
    )
    return wrapped


def letters_only() -> PreTrainedTokenizerFast:
    """A tokenizer that makes nothing of most texts."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace(r"?", "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


NO_SPECIAL = byte_level()
GPT_STYLE = byte_level(bos_token="<s>", eos_token="</s>")  # has BOS and EOS, writes neither
LLAMA_STYLE = with_post_processor()
BOS, EOS = LLAMA_STYLE.bos_token_id, LLAMA_STYLE.eos_token_id


def chat(template: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = with_post_processor()
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    return tokenizer


def rows(*responses: str, prompt: Any = "the colour is:", **columns: Any) -> datasets.Dataset:
    return load_preferences([{"prompt": prompt, "responses": list(responses), **columns}]).dataset


def conversation(*responses: str) -> datasets.Dataset:
    turns = ["hello", "hi there", "the sky?"]
    roles = ["user", "assistant", "user"]
    return rows(*responses, prompt=[{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)])


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("tokenizer", "bos", "eos"),
    [(NO_SPECIAL, [], []), (GPT_STYLE, [], [EOS]), (LLAMA_STYLE, [BOS], [EOS])],
    ids=["no special tokens", "BOS and EOS not written", "BOS and EOS written"],
)
def test_boundary_and_special_tokens(tokenizer: PreTrainedTokenizerFast, bos: list[int], eos: list[int]) -> None:
    row = tokenize_groups(rows(" blue", " the sea", "\n\nblue!"), tokenizer)[0]
    assert row["prompt_ids"] == bos + ids_of(tokenizer, "the colour is:")
    assert row["response_ids"] == [ids_of(tokenizer, text) + eos for text in (" blue", " the sea", "\n\nblue!")]
    assert row["prompt_cut"] == 0
    assert row["response_cut"] == [0, 0, 0]


@pytest.mark.parametrize(("add_bos", "bos"), [(True, [BOS]), (False, [])])
@pytest.mark.parametrize("tokenizer", [GPT_STYLE, LLAMA_STYLE], ids=["not written", "written"])
def test_add_bos_overrides_the_tokenizer(tokenizer: PreTrainedTokenizerFast, add_bos: bool, bos: list[int]) -> None:
    row = tokenize_groups(rows("a", "b"), tokenizer, add_bos=add_bos)[0]
    assert row["prompt_ids"] == bos + ids_of(tokenizer, "the colour is:")


def test_special_tokens_in_the_text_are_not_written_twice() -> None:
    row = tokenize_groups(rows(" blue</s>", " green", prompt="<s>the sky"), LLAMA_STYLE)[0]
    assert row["prompt_ids"] == [BOS, *ids_of(LLAMA_STYLE, "the sky")]
    assert row["response_ids"] == [[*ids_of(LLAMA_STYLE, text), EOS] for text in (" blue", " green")]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(prompt=text, responses=st.lists(text, min_size=2, max_size=4, unique=True))
def test_no_character_crosses_the_boundary(prompt: str, responses: list[str]) -> None:
    """Decoding each side of the boundary gives back exactly its own text (byte-level, any unicode)."""
    batch = tokenize_groups(rows(*responses, prompt=prompt), LLAMA_STYLE, max_length=None)[0]
    decode = LLAMA_STYLE.backend_tokenizer.decode
    assert decode(batch["prompt_ids"], skip_special_tokens=True) == prompt
    assert [decode(ids, skip_special_tokens=True) for ids in batch["response_ids"]] == responses
    assert batch["prompt_ids"].count(BOS) == 1
    assert [ids.count(EOS) for ids in batch["response_ids"]] == [1] * len(responses)


CHATS = {
    # template, eos token, text of the prompt after BOS, text of the response " blue" before EOS
    "ChatML, the turn's end is EOS": (
        CHATML,
        "<|im_end|>",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
        "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n",
        "blue",
    ),
    "ChatML, EOS of its own": (
        CHATML,
        "</s>",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
        "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n",
        "blue<|im_end|>\n",
    ),
    "Llama, writes BOS and EOS": (LLAMA, "</s>", "[INST] hello [/INST] hi there</s>[INST] the sky? [/INST]", " blue"),
    "plain, writes neither": (PLAIN, "</s>", "user: hello\nassistant: hi there\nuser: the sky?\nassistant: ", "blue\n"),
}


@pytest.mark.parametrize(("template", "eos", "prompt", "response"), CHATS.values(), ids=CHATS)
def test_chat_template(template: str, eos: str, prompt: str, response: str) -> None:
    tokenizer = chat(template, eos)
    row = tokenize_groups(conversation("blue", "green"), tokenizer)[0]
    assert row["prompt_ids"] == [BOS, *ids_of(tokenizer, prompt)]
    assert row["response_ids"][0] == [*ids_of(tokenizer, response), tokenizer.eos_token_id]
    assert [ids.count(tokenizer.eos_token_id) for ids in row["response_ids"]] == [1, 1]
    # what the model sees is what the template makes of the whole conversation, but for BOS, EOS and the last line break
    whole = tokenizer.decode(row["prompt_ids"] + row["response_ids"][0])
    messages = [*conversation("blue", "green")[0]["prompt"], {"role": "assistant", "content": "blue"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert (
        whole.removeprefix("<s>").removesuffix(eos).strip()
        == rendered.removeprefix("<s>").strip().removesuffix(eos).strip()
    )


def test_no_chat_template() -> None:
    with pytest.raises(DataError, match=r"the tokenizer has no chat template; set tokenizer\.chat_template, or"):
        tokenize_groups(conversation("a", "b"), LLAMA_STYLE)


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (COUNTING, "user", "row row:1: chat template: it writes the prompt differently once a response follows"),
        (LLAMA, "system", "row row:1: chat template: it refuses the conversation: only user and assistant"),
    ],
    ids=["no prefix", "unknown role"],
)
def test_chat_template_that_cannot_be_used(template: str, role: str, message: str) -> None:
    data = rows("a", "b", prompt=[{"role": role, "content": "x"}])
    with pytest.raises(DataError, match=message):
        tokenize_groups(data, chat(template))
    with pytest.raises(DataError, match=r"none of the 1 rows can be tokenised"):
        tokenize_groups(data, chat(template), on_bad_row="drop")


def test_row_that_the_chat_template_refuses_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    talks = [[{"role": role, "content": "x"}] for role in ("user", "system", "user")]
    data = load_preferences([{"prompt": talk, "responses": ["a", "b"]} for talk in talks]).dataset
    with caplog.at_level(logging.WARNING):
        kept = tokenize_groups(data, chat(LLAMA), on_bad_row="drop")
    assert kept["id"][:] == ["row:1", "row:3"]
    assert "dropped 1 of 3 rows after tokenisation (1 chat template); row row:2: chat template" in caplog.text


def test_row_without_tokens(caplog: pytest.LogCaptureFixture) -> None:
    data = load_preferences(
        [{"prompt": p, "responses": [a, b]} for p, a, b in [("a", "b", "a"), ("a", "b", "?"), ("??", "a", "b")]]
    ).dataset
    with pytest.raises(
        DataError, match=r"row row:2: no tokens: the tokenizer makes nothing of responses\[1\] \(2 of 3 rows"
    ):
        tokenize_groups(data, letters_only())
    with caplog.at_level(logging.WARNING):
        assert tokenize_groups(data, letters_only(), on_bad_row="drop")["id"][:] == ["row:1"]
    assert "dropped 2 of 3 rows after tokenisation (2 no tokens)" in caplog.text


# 10 prompt tokens with BOS, responses of 2 and 6 tokens with EOS; one letter is one token
PROMPT, RESPONSES = "q w x z j", ("k", "k v k")
TRUNCATION = {
    # max_length, max_prompt_length, truncation: prompt tokens, response tokens
    "nothing to do": ({"max_length": 100}, "<s>q w x z j", ("k</s>", "k v k</s>")),
    "no limit": ({"max_length": None}, "<s>q w x z j", ("k</s>", "k v k</s>")),
    "exact fit": ({"max_length": 16}, "<s>q w x z j", ("k</s>", "k v k</s>")),
    "prompt loses its beginning": ({"max_length": 14}, "<s>w x z j", ("k</s>", "k v k</s>")),
    "prompt loses its end": ({"max_length": 14, "truncation": "keep_start"}, "<s>q w x z", ("k</s>", "k v k</s>")),
    "prompt to half, then responses": ({"max_length": 6}, "<s> j", ("k</s>", "k v")),
    "smallest": ({"max_length": 2}, "j", ("k", "k")),
    "prompt limit": ({"max_length": 100, "max_prompt_length": 3}, "<s> j", ("k</s>", "k v k</s>")),
    "prompt limit of one": ({"max_length": 100, "max_prompt_length": 1}, "j", ("k</s>", "k v k</s>")),
    "prompt limit without a limit": ({"max_length": None, "max_prompt_length": 3}, "<s> j", ("k</s>", "k v k</s>")),
    "both limits": ({"max_length": 6, "max_prompt_length": 5}, "<s> j", ("k</s>", "k v")),
}


@pytest.mark.parametrize(("options", "prompt", "responses"), TRUNCATION.values(), ids=TRUNCATION)
def test_truncation(options: dict[str, Any], prompt: str, responses: tuple[str, ...]) -> None:
    row = tokenize_groups(rows(*RESPONSES, prompt=PROMPT), LLAMA_STYLE, **options)[0]
    assert LLAMA_STYLE.decode(row["prompt_ids"]) == prompt
    assert tuple(LLAMA_STYLE.decode(ids) for ids in row["response_ids"]) == responses
    whole = tokenize_groups(rows(*RESPONSES, prompt=PROMPT), LLAMA_STYLE)[0]
    assert row["prompt_cut"] == len(whole["prompt_ids"]) - len(row["prompt_ids"])
    pairs = zip(whole["response_ids"], row["response_ids"], strict=True)
    assert row["response_cut"] == [len(full) - len(cut) for full, cut in pairs]


@settings(max_examples=60, deadline=None)
@given(
    prompt=text,
    responses=st.lists(text, min_size=2, max_size=4, unique=True),
    max_length=st.integers(2, 40),
    max_prompt_length=st.none() | st.integers(1, 39),
    truncation=st.sampled_from(["keep_end", "keep_start"]),
)
def test_truncation_keeps_its_promises(
    prompt: str, responses: list[str], max_length: int, max_prompt_length: int | None, truncation: str
) -> None:
    if max_prompt_length is not None:
        max_prompt_length = min(max_prompt_length, max_length - 1)
    data = rows(*responses, prompt=prompt)
    whole = tokenize_groups(data, LLAMA_STYLE, max_length=None)[0]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation": truncation}
    row = tokenize_groups(data, LLAMA_STYLE, **limits)[0]
    ids = row["prompt_ids"]
    assert 1 <= len(ids) <= (max_prompt_length or max_length)
    assert len(ids) == 1 or ids[0] == BOS
    assert truncation == "keep_start" or len(ids) == 1 or whole["prompt_ids"][1:][-(len(ids) - 1) :] == ids[1:]
    for full, cut in zip(whole["response_ids"], row["response_ids"], strict=True):
        assert cut
        assert full[: len(cut)] == cut
        assert len(ids) + len(cut) <= max_length
    # nothing is cut for nothing
    longest = max(map(len, whole["response_ids"]))
    if max_prompt_length is None and len(whole["prompt_ids"]) + longest <= max_length:
        assert row == whole


def test_other_columns_stay() -> None:
    data = rows("a", "b", scores=[1, 2], probs=[0.25, 0.5], id="x").add_column("calibration", [1.5])
    row = tokenize_groups(data, LLAMA_STYLE)[0]
    assert (row["id"], row["scores"], row["probs"], row["calibration"]) == ("x", [1.0, 2.0], [0.25, 0.5], 1.5)
    assert "prompt" not in row
    assert "responses" not in row


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of forks in threaded processes
def test_processes_give_the_same() -> None:
    data = load_preferences([{"prompt": f"p {i}", "responses": ["a" * (i + 1), "b"]} for i in range(7)]).dataset
    assert tokenize_groups(data, LLAMA_STYLE, num_proc=2).to_list() == tokenize_groups(data, LLAMA_STYLE).to_list()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": [1]}, TypeError, r"dataset: expected a datasets\.Dataset of canonical rows .*, got list"),
        (
            {"dataset": datasets.Dataset.from_list([{"id": "a", "prompt": "b"}])},
            ValueError,
            "dataset: expected the canonical column 'responses'",
        ),
        (
            {"dataset": datasets.Dataset.from_list([{"id": "a", "prompt": "b", "responses": "c"}])},
            ValueError,
            "dataset: expected a list of texts in the column responses",
        ),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer: expected a transformers tokenizer, got str"),
        ({"max_length": 1}, ValueError, "max_length: expected at least 2, .*, got 1"),
        ({"max_prompt_length": 0}, ValueError, "max_prompt_length: expected at least 1, got 0"),
        ({"max_prompt_length": 512}, ValueError, r"max_prompt_length: expected less than max_length \(512\)"),
        ({"truncation": "middle"}, ValueError, "truncation: expected one of keep_end, keep_start, got 'middle'"),
        ({"on_bad_row": "skip"}, ValueError, "on_bad_row: expected 'error' or 'drop', got 'skip'"),
        (
            {"tokenizer": NO_SPECIAL, "add_bos": True},
            ValueError,
            "add_bos: expected None or False for a tokenizer without a BOS token, got True",
        ),
    ],
    ids=["dataset", "column", "responses", "tokenizer", "max_length", "max_prompt_length", "prompt limit too large",
         "truncation", "on_bad_row", "add_bos"],
)  # fmt: skip
def test_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"dataset": rows("a", "b"), "tokenizer": LLAMA_STYLE, **arguments}
    with pytest.raises(error, match=message):
        tokenize_groups(options.pop("dataset"), options.pop("tokenizer"), **options)


def test_length_statistics() -> None:
    data = load_preferences(
        [{"prompt": PROMPT, "responses": list(RESPONSES)}, {"prompt": "q", "responses": ["k", "v", "k v k"]}]
    ).dataset
    statistics = length_statistics(tokenize_groups(data, LLAMA_STYLE), batch_groups=2)
    # group 1: prompt 10, responses 2 and 6 tokens; group 2: prompt 2, responses 2, 2 and 6
    assert (statistics.groups, statistics.responses, statistics.tokens) == (2, 5, 12 + 16 + 4 + 4 + 8)
    assert (statistics.mean_prompt, statistics.mean_response) == (6.0, 18 / 5)
    assert statistics.max_length == 16
    assert statistics.prompt_share == pytest.approx(26 / 44)
    assert statistics.repeated_prompt_share == pytest.approx((10 + 4) / 44)
    assert statistics.padding_share == pytest.approx(1 - 44 / (5 * 16))
    assert statistics.padded_tokens == 5 * 16
    assert statistics.packed_tokens == 44 - 5, "the last token of a response is not run"
    assert statistics.group_tokens == 10 + 2 + (2 + 6 + 2 + 2 + 6) - 5
    assert (statistics.truncated_prompts, statistics.truncated_responses) == (0, 0)
    alone = length_statistics(tokenize_groups(data, LLAMA_STYLE), batch_groups=1)
    assert alone.padding_share == pytest.approx(1 - 44 / (2 * 16 + 3 * 8))
    cut = length_statistics(tokenize_groups(data, LLAMA_STYLE, max_length=7))
    assert (cut.truncated_prompts, cut.truncated_responses) == (1, 2)
    assert "2 groups, 5 responses" in str(cut)
    assert "truncated: 1 prompts, 2 responses" in str(cut)


def test_padding_share_counts_every_batch() -> None:
    """Counted batch by batch, with groups of different K and a last batch that is not full."""
    lengths = [3, 9, 4, 17, 5, 6, 30, 2]
    kinds = {"prompt_ids": [0], "prompt_cut": 0}
    table = [{**kinds, "response_ids": [[1] * n] * (2 + n % 3), "response_cut": [0] * (2 + n % 3)} for n in lengths]
    tokenised = datasets.Dataset.from_list(table)
    order = np.random.default_rng(0).permutation(len(lengths))
    padded = tokens = 0
    for start in range(0, len(order), 3):
        batch = [table[index]["response_ids"] for index in order[start : start + 3]]
        padded += sum(map(len, batch)) * max(1 + len(ids) for group in batch for ids in group)
        tokens += sum(1 + len(ids) for group in batch for ids in group)
    assert length_statistics(tokenised, batch_groups=3).padding_share == pytest.approx(1 - tokens / padded)


@pytest.mark.parametrize("shared", [True, False])
def test_expected_speedup_is_the_ratio_of_the_products(shared: bool) -> None:
    """Counted layer by layer and token by token for a live reference: three passes of the policy and one of that."""
    rng = np.random.default_rng(3)
    table = [
        {
            "prompt_ids": [1] * rng.integers(1, 30),
            "response_ids": [[1] * rng.integers(1, 20) for _ in range(size)],
            "prompt_cut": 0,
            "response_cut": [0] * size,
        }
        for size in rng.integers(1, 5, 12)
    ]
    statistics = length_statistics(datasets.Dataset.from_list(table), batch_groups=12)
    sequences = [(len(row["prompt_ids"]), len(ids)) for row in table for ids in row["response_ids"]]
    width = max(prompt + response for prompt, response in sequences)
    repeated = sum(len(row["prompt_ids"]) * (len(row["response_ids"]) - 1) for row in table) if shared else 0
    run = sum(prompt + response - 1 for prompt, response in sequences) - repeated
    head = 4 * 500 * sum(response for _, response in sequences)
    padded, laid_out = 4 * 70 * len(sequences) * width + head, 4 * 70 * run + head
    assert statistics.expected_speedup(70, 500, shared=shared) == pytest.approx(padded / laid_out)
    assert statistics.expected_speedup(0, 500, shared=shared) == 1, "a layout saves nothing in the head"


def test_length_statistics_of_selected_rows() -> None:
    """An indices mapping is followed: the numbers are those of the rows that are seen."""
    lengths = [3, 9, 4, 17]
    table = [
        {"prompt_ids": [0] * n, "response_ids": [[1] * n], "prompt_cut": n % 2, "response_cut": [n % 2]}
        for n in lengths
    ]
    picked = datasets.Dataset.from_list(table).select([3, 0, 2])
    again = datasets.Dataset.from_list([table[index] for index in (3, 0, 2)])
    assert length_statistics(picked) == length_statistics(again)
    assert length_statistics(picked).truncated_prompts == 2


def test_length_statistics_refuses_other_data() -> None:
    with pytest.raises(TypeError, match=r"tokenised: expected the datasets\.Dataset"):
        length_statistics([1])
    with pytest.raises(ValueError, match="tokenised: expected rows with the columns prompt_cut"):
        length_statistics(rows("a", "b"))
    with pytest.raises(ValueError, match="batch_groups: expected at least 1, got 0"):
        length_statistics(tokenize_groups(rows("a", "b"), LLAMA_STYLE), batch_groups=0)
