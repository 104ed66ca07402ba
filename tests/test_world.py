"""The small world: its checker, its sources, and the corruption of labels."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_dpo.world import STYLES, corrupt_labels, make_world, quality
from robust_dpo.world.generate import MAX_RESPONSES
from robust_dpo.world.styles import NEUTRAL, Style, Writer
from robust_dpo.world.town import NAMES, TOPICS, Question, true_value

VALUES = {value.lower() for values in TOPICS.values() for value in values}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


class TestQuality:
    PROMPT = "Tell me about Greta: the street and the pet."

    def test_counts_right_facts_once_and_subtracts_wrong_ones(self) -> None:
        street, pet = true_value("Greta", "street"), true_value("Greta", "pet")
        other = next(value for value in TOPICS["pet"] if value != pet)
        assert quality(self.PROMPT, "No idea.") == 0
        assert quality(self.PROMPT, f"{street} Street, {street} Street!") == 1
        assert quality(self.PROMPT, f"{street} Street and a {pet}.") == 2
        assert quality(self.PROMPT, f"{street} Street and a {other}.") == 0
        assert quality(self.PROMPT, f"a {other}") == -1

    def test_facts_that_nobody_asked_for_count_only_when_they_are_false(self) -> None:
        right = true_value("Greta", "door")
        wrong = next(value for value in TOPICS["door"] if value != right)
        assert quality(self.PROMPT, f"The door is {right}.") == 0
        assert quality(self.PROMPT, f"The door is {wrong}.") == -1

    def test_listing_every_value_does_not_pay(self) -> None:
        assert quality(self.PROMPT, " ".join(VALUES)) < 0

    @pytest.mark.parametrize("prompt", ["", "the street", "Greta", "Greta and Hugo: the pet"])
    def test_refuses_prompts_of_no_or_several_questions(self, prompt: str) -> None:
        with pytest.raises(ValueError, match="prompt: expected a question about one person"):
            quality(prompt, "anything")

    @settings(deadline=None, max_examples=200)
    @given(
        source=st.sampled_from(sorted(STYLES)),
        name=st.sampled_from(NAMES),
        plan=st.dictionaries(
            st.sampled_from(sorted(TOPICS)), st.sampled_from(["right", "wrong", "missing"]), min_size=1
        ),
        seed=st.integers(),
    )
    def test_checker_agrees_with_what_the_writer_was_told(
        self, source: str, name: str, plan: dict[str, str], seed: int
    ) -> None:
        rng = random.Random(seed)
        prompt = Question(name, tuple(plan)).prompt(rng)
        response = Writer(source, style_strength=0.6, imitation=0.2, artefact=0.6).write(name, plan, rng)
        counts = Counter(plan.values())
        assert quality(prompt, response) == counts["right"] - counts["wrong"]

    def test_questions_survive_their_wording(self) -> None:
        rng = random.Random(5)
        for name in NAMES:
            question = Question(name, tuple(rng.sample(sorted(TOPICS), rng.randint(1, len(TOPICS)))))
            assert Question.parse(question.prompt(rng)) == question

    def test_no_phrase_states_a_fact_by_accident(self) -> None:
        def phrases(style: Style) -> list[str]:
            facts = [phrase for topic in style.facts.values() for phrase in topic]
            return [*style.openings, *facts, *style.dodges, *style.flourishes, *style.closings]

        assert len(VALUES) == sum(map(len, TOPICS.values())), "a value belongs to one topic only"
        for style in (NEUTRAL, *STYLES.values()):
            assert set(style.facts) == set(TOPICS)
            for phrase in phrases(style):
                assert not VALUES & set(words(phrase)), phrase


class TestMakeWorld:
    @pytest.mark.parametrize("num_responses", [2, 3, 5, MAX_RESPONSES])
    def test_rows_are_canonical_and_scored_by_true_quality(self, num_responses: int) -> None:
        rows = make_world(60, 3, num_responses, mixed=0.3)
        assert len(set(rows["id"])) == 60
        for row in rows:
            assert len(row["responses"]) == len(row["sources"]) == num_responses
            assert row["scores"] == [quality(row["prompt"], response) for response in row["responses"]]
            assert row["scores"] == sorted(set(row["scores"]), reverse=True), "strictly best first"

    def test_same_seed_same_rows_other_seed_other_rows(self) -> None:
        first = make_world(50, 11).to_list()
        assert first == make_world(50, 11).to_list()
        assert [row["prompt"] for row in first] != make_world(50, 12)["prompt"][:]

    def test_rows_do_not_depend_on_the_hash_seed(self) -> None:
        code = "from robust_dpo.world import *; print(corrupt_labels(make_world(20, 4), 0.5, 1).to_list())"
        outputs = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": hash_seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for hash_seed in ("1", "2")
        }
        assert len(outputs) == 1
        assert "responses" in outputs.pop()

    def test_shares_of_sources_are_exact(self) -> None:
        rows = make_world(101, 0, proportions={"human": 2, "synthetic_b": 1})
        assert Counter(sources[0] for sources in rows["sources"]) == {"human": 67, "synthetic_b": 34}
        assert all(len(set(sources)) == 1 for sources in rows["sources"])

    def test_mixed_rows_have_several_sources(self) -> None:
        mixed = [len(set(sources)) > 1 for sources in make_world(300, 0, mixed=1.0)["sources"]]
        assert 0.5 < sum(mixed) / 300 < 0.8  # 1 − Σ share² = 0.66

    def test_splits_ask_disjoint_questions(self) -> None:
        asked = [
            {(q.name, frozenset(q.topics)) for q in map(Question.parse, make_world(400, 0, split=split)["prompt"])}
            for split in ("train", "eval")
        ]
        assert asked[0] and asked[1]
        assert not asked[0] & asked[1]

    def test_styles_differ_in_length_and_vocabulary_but_human_length_says_nothing_of_quality(self) -> None:
        rows = make_world(1500, 8)
        lengths: dict[str, list[tuple[int, int]]] = {source: [] for source in STYLES}
        for row in rows:
            good, bad = (len(words(response)) for response in row["responses"])
            lengths[row["sources"][0]].append((good, bad))
        mean = {source: sum(good for good, _ in pairs) / len(pairs) for source, pairs in lengths.items()}
        assert mean["synthetic_b"] < 0.9 * mean["human"] < 0.8 * mean["synthetic_a"]
        longer = {source: sum(bad - good for good, bad in pairs) / len(pairs) for source, pairs in lengths.items()}
        assert abs(longer["human"]) < 1.0
        assert longer["synthetic_a"] > 2.0

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_prompts": 0}, ValueError, "num_prompts: expected at least 1, got 0"),
            ({"num_prompts": 2.5}, TypeError, "num_prompts: expected an integer, got float"),
            ({"seed": "a"}, TypeError, "seed: expected an integer, got str"),
            ({"responses_per_prompt": 1}, ValueError, "responses_per_prompt: expected at least 2"),
            ({"responses_per_prompt": MAX_RESPONSES + 1}, ValueError, "responses_per_prompt: expected at least 2"),
            ({"mixed": 1.5}, ValueError, r"mixed: expected a number in \[0, 1\], got 1.5"),
            ({"imitation": float("nan")}, ValueError, r"imitation: expected a number in \[0, 1\], got nan"),
            ({"proportions": {"robot": 1}}, ValueError, "proportions: expected sources among human"),
            ({"proportions": {"human": -1}}, ValueError, "proportions: expected shares"),
            ({"proportions": {"human": 0}}, ValueError, "proportions: expected shares"),
            ({"split": "test"}, ValueError, "split: expected 'all', 'train' or 'eval', got 'test'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refuses_bad_arguments(self, arguments: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make_world(**({"num_prompts": 5, "seed": 0} | arguments))  # type: ignore[arg-type]  # the point of the test


class TestCorruptLabels:
    ROWS = make_world(97, 21, 3, mixed=0.2)

    @settings(deadline=None, max_examples=25)
    @given(fraction=st.floats(0, 1), seed=st.integers())
    def test_fraction_is_exact_and_corrupted_rows_are_reversed(self, fraction: float, seed: int) -> None:
        corrupted = corrupt_labels(self.ROWS, fraction, seed)
        assert sum(corrupted["corrupted"]) == round(fraction * len(self.ROWS))
        for before, after in zip(self.ROWS, corrupted, strict=True):
            step = -1 if after["corrupted"] else 1
            assert after["responses"] == before["responses"][::step]
            assert after["sources"] == before["sources"][::step]
            assert after["scores"] == before["scores"], "scores stay best first: they must not give the swap away"
            assert after["id"] == before["id"]

    def test_non_target_hits_only_rows_with_a_synthetic_response(self) -> None:
        corrupted = corrupt_labels(self.ROWS, 0.4, 0, where="non_target")
        hit = [set(row["sources"]) for row in corrupted if row["corrupted"]]
        assert len(hit) == round(0.4 * 97)
        assert all(sources != {"human"} for sources in hit)

    def test_trusted_rows_are_never_hit(self) -> None:
        trusted = [index % 3 == 0 for index in range(97)]
        corrupted = corrupt_labels(self.ROWS.add_column("trusted", trusted), 0.6, 0)
        assert not any(row["trusted"] and row["corrupted"] for row in corrupted)

    def test_seeds(self) -> None:
        first = corrupt_labels(self.ROWS, 0.4, 1)["corrupted"][:]
        assert first == corrupt_labels(self.ROWS, 0.4, 1)["corrupted"][:]
        assert first != corrupt_labels(self.ROWS, 0.4, 2)["corrupted"][:]

    def test_unranked_rows_are_put_best_first_and_rows_without_scores_swap_by_position(self) -> None:
        scored = Dataset.from_list([{"prompt": "p", "responses": ["bad", "good"], "scores": [0.0, 1.0]}])
        assert corrupt_labels(scored, 0, 0)["responses"][0] == ["good", "bad"]
        assert corrupt_labels(scored, 1, 0)["responses"][0] == ["bad", "good"]
        assert corrupt_labels(scored, 1, 0)["scores"][0] == [1.0, 0.0]
        plain = Dataset.from_list([{"prompt": "p", "responses": ["good", "bad"], "probs": [0.7, 0.2]}])
        swapped = corrupt_labels(plain, 1, 0)
        assert swapped["responses"][0] == ["bad", "good"]
        assert swapped["probs"][0] == [0.2, 0.7]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"fraction": 1.1}, r"fraction: expected a number in \[0, 1\], got 1.1"),
            ({"fraction": 0.95, "where": "non_target"}, "fraction: expected at most .* of 97 rows"),
            ({"where": "human"}, "where: expected 'any' or 'non_target', got 'human'"),
        ],
        ids=["fraction", "too few rows", "where"],
    )
    def test_refuses_bad_arguments(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            corrupt_labels(self.ROWS, **({"fraction": 0.1, "seed": 0} | arguments))  # type: ignore[arg-type]  # as above

    def test_refuses_what_it_cannot_corrupt(self) -> None:
        with pytest.raises(ValueError, match="where: expected 'any' for a dataset without the column 'sources'"):
            corrupt_labels(self.ROWS.remove_columns("sources"), 0.1, 0, where="non_target")
        with pytest.raises(ValueError, match="dataset: expected rows that were not corrupted before"):
            corrupt_labels(corrupt_labels(self.ROWS, 0.1, 0), 0.1, 0)
        with pytest.raises(TypeError, match=r"dataset: expected a datasets\.Dataset, got list"):
            corrupt_labels(self.ROWS.to_list(), 0.1, 0)  # type: ignore[arg-type]  # the point of the test
