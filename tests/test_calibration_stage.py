"""The calibration stage: cross-fitting, probabilities, reductions to groups, report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from robust_dpo.calibration import calibrate_dataset, calibrate_rows, density_ratio, group_calibration
from robust_dpo.calibration.classifier import assign_folds, fit_classifier
from robust_dpo.calibration.encoder import EncoderClassifier
from robust_dpo.calibration.probability import (
    CALIBRATORS,
    expected_calibration_error,
    fit_platt,
    reliability_bins,
)
from robust_dpo.calibration.reduce import REDUCTIONS
from robust_dpo.calibration.samples import build_samples
from robust_dpo.world import corrupt_labels, make_world

WORLD = corrupt_labels(make_world(240, 17), 0.4, 0, where="non_target")


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return Dataset.from_list([{"id": f"row-{index}", **row} for index, row in enumerate(rows)])


class Spy:
    """A classifier that remembers what every fit saw and refuses to score a text of a prompt that it learnt from."""

    def __init__(self, inner_folds: int, prompt_of: dict[str, str], scored: list[str]) -> None:
        self.inner_folds, self._prompt_of, self._scored = inner_folds, prompt_of, scored
        self._seen: set[str] = set()

    def fit(self, texts: Sequence[str], labels: NDArray[np.int64]) -> None:
        assert len(set(labels.tolist())) == 2
        self._seen = {self._prompt_of[text] for text in texts}

    def decide(self, texts: Sequence[str]) -> NDArray[np.float64]:
        assert not self._seen & {self._prompt_of[text] for text in texts}, "scored a prompt that it was fitted to"
        self._scored += texts
        return np.array([len(text) % 7 - 3.0 for text in texts])


class TestCrossFitting:
    @pytest.mark.parametrize("inner_folds", [1, 3])
    def test_nothing_is_scored_by_a_model_that_saw_its_prompt(self, inner_folds: int) -> None:
        rng = random.Random(3)
        rows = [
            {
                "prompt": f"prompt {rng.randrange(30)}",  # most prompts stand in several rows
                "responses": [f"text {index}a", f"text {index}bb"],
                "sources": rng.sample(["human", "machine"], 2),
            }
            for index in range(120)
        ]
        prompt_of = {response: row["prompt"] for row in rows for response in row["responses"]}
        scored: list[str] = []
        calibrate_dataset(rows_of(*rows), classifier=lambda seed: Spy(inner_folds, prompt_of, scored), folds=4)
        assert set(scored) == set(prompt_of)

    def test_a_classifier_that_memorises_gains_nothing(self) -> None:
        """Every response carries a token of its own and labels are random: in-sample AUC is 1, honest AUC is 1/2."""
        rng = random.Random(7)
        rows = [
            {
                "prompt": f"p{index}",
                "responses": [f"common words {rng.getrandbits(64):x}" for _ in range(4)],
                "sources": [rng.choice(["human", "machine"]) for _ in range(4)],
            }
            for index in range(300)
        ]
        result = calibrate_dataset(rows_of(*rows))
        assert abs(result.report.auc - 0.5) < 0.05  # standard error of AUC at 600 + 600 samples: 0.017
        assert result.report.expected_calibration_error < 0.08, "probabilities must say that nothing was learnt"

    def test_golden_rows_with_the_prompt_to_score_are_left_out(self) -> None:
        rows = [{"prompt": f"p{i}", "responses": [f"good {i}", f"bad {i}"]} for i in range(40)]
        golden = [{"prompt": f"p{i}", "responses": [f"gold {i}", f"lead {i}"]} for i in range(20, 60)]
        prompt_of = {text: row["prompt"] for row in rows + golden for text in row["responses"]}
        scored: list[str] = []
        result = calibrate_dataset(
            rows_of(*rows), target="chosen", golden=rows_of(*golden), classifier=lambda seed: Spy(2, prompt_of, scored)
        )
        assert result.report.settings["golden_rows"] == 40

    @given(seed=st.integers(0, 2**31), folds=st.integers(2, 6))
    def test_folds_keep_prompts_whole_and_use_every_fold(self, seed: int, folds: int) -> None:
        rng = np.random.default_rng(seed)
        prompts = [f"p{number}" for number in rng.integers(0, 25, size=200)]
        fold_of = assign_folds(rng.integers(0, 2, size=200), prompts, folds, seed)
        assert set(fold_of.tolist()) == set(range(folds))
        for prompt in set(prompts):
            assert len({fold for fold, own in zip(fold_of.tolist(), prompts, strict=True) if own == prompt}) == 1

    def test_deterministic_by_seed_and_independent_of_global_generators(self) -> None:
        first = calibrate_dataset(WORLD, seed=5, folds=3).dataset["probs"][:]
        np.random.seed(99)
        random.seed(99)
        assert first == calibrate_dataset(WORLD, seed=5, folds=3).dataset["probs"][:]
        assert first != calibrate_dataset(WORLD, seed=6, folds=3).dataset["probs"][:]


class TestQuality:
    @pytest.mark.parametrize("one_vs_source", [False, True], ids=["pooled", "one-vs-source"])
    @pytest.mark.parametrize("probability", sorted(CALIBRATORS))
    def test_tells_the_world_apart_but_not_perfectly(self, probability: str, one_vs_source: bool) -> None:
        rows = make_world(600, 2)
        report = calibrate_dataset(rows, probability=probability, one_vs_source=one_vs_source, form="mixture").report
        assert 0.85 < report.auc < 0.97
        assert report.expected_calibration_error < 0.08
        mean = {kind: spread.mean for kind, spread in report.h_by_kind.items()}
        assert mean["human"] > 1.5
        assert max(mean["synthetic_a"], mean["synthetic_b"]) < 0.6
        # the density ratio target / mixture has mean 1 under the mixture
        shares = {"human": 0.4, "synthetic_a": 0.3, "synthetic_b": 0.3}
        assert sum(share * mean[kind] for kind, share in shares.items()) == pytest.approx(1, abs=0.1)

    def test_groups_with_wrong_labels_get_less_calibration_where_machines_made_them(self) -> None:
        corruption = calibrate_dataset(WORLD).report.corruption
        assert corruption is not None
        assert corruption["share"] == pytest.approx(0.4)
        assert corruption["mean_h_clean"] > 2 * corruption["mean_h_corrupted"]
        assert corruption["auc"] > 0.7

    def test_chosen_target_finds_swapped_pairs_from_a_trusted_subset(self) -> None:
        rng = random.Random(1)
        kind, rude = ["thanks", "gladly", "of course", "happy"], ["whatever", "nope", "go away", "boring"]
        rows = [
            {
                "prompt": f"question {index}",
                "responses": [" ".join(rng.choices(kind, k=4)), " ".join(rng.choices(rude, k=4))],
                "trusted": index < 60,
            }
            for index in range(200)
        ]
        dataset = corrupt_labels(rows_of(*rows), 0.3, 0)
        report = calibrate_dataset(dataset, target="chosen", reduce="share").report
        assert report.corruption is not None
        assert report.corruption["auc"] > 0.99
        assert report.counts == {"chosen": 60, "rejected": 60}
        # the mean of a pair is the same before and after a swap, so it cannot tell
        blind = calibrate_dataset(dataset, target="chosen", reduce="mean").report.corruption
        assert blind is not None
        assert blind["auc"] < 0.7

    def test_include_prompt_lets_the_classifier_read_it(self) -> None:
        rows = [
            {"prompt": f"{word} {i}", "responses": ["same", "same too"], "sources": [source] * 2}
            for i in range(60)
            for word, source in (("red", "human"), ("blue", "machine"))
        ]
        assert calibrate_dataset(rows_of(*rows), include_prompt=True).report.auc > 0.95
        assert calibrate_dataset(rows_of(*rows)).report.auc < 0.7

    def test_conversational_prompts_are_read_turn_by_turn(self) -> None:
        prompt = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        rows = rows_of({"prompt": prompt, "responses": ["a", "b"], "sources": ["human", "machine"]})
        samples = build_samples(rows, target="human", include_prompt=True)
        assert samples.texts == ["user: hello\n\nassistant: hi\n\na", "user: hello\n\nassistant: hi\n\nb"]
        assert len(set(samples.prompts)) == 1

    def test_probabilities_are_inside_the_clip_and_ragged_rows_keep_their_shape(self) -> None:
        ragged = Dataset.from_list([*make_world(80, 1, 2).to_list(), *make_world(80, 2, 4).to_list()])
        result = calibrate_dataset(ragged, clip=0.05, folds=3)
        for row, h in zip(result.dataset, result.h, strict=True):
            assert len(row["probs"]) == len(row["responses"]) == len(h)
            assert all(0.05 <= prob <= 0.95 for prob in row["probs"])
        assert len(result.group_h) == 160
        kept = result.dataset.remove_columns("probs")
        assert kept.to_list() == ragged.to_list(), "nothing but probs changes"


class TestEncoder:
    @pytest.fixture(autouse=True)
    @staticmethod
    def one_thread() -> Iterator[None]:
        """Threads that wait for each other cost a model this small nine tenths of its time on a busy machine."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture(scope="class")
    @staticmethod
    def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A random BERT of one small layer with a word tokenizer, saved to disk."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

        texts = [response for row in WORLD for response in row["responses"]]
        split = pre_tokenizers.BertPreTokenizer()
        words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
        vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = split
        folder = tmp_path_factory.mktemp("encoder")
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
        ).save_pretrained(folder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertForSequenceClassification(config).save_pretrained(folder)
        return folder

    def test_learns_and_repeats_itself(self, encoder: Path) -> None:
        samples = build_samples(WORLD, target="human")
        train, test = slice(0, 240), slice(240, None)

        def decisions() -> NDArray[np.float64]:
            classifier = EncoderClassifier(encoder, 3, epochs=4, learning_rate=5e-3)
            classifier.fit(samples.texts[train], samples.labels[train])
            return classifier.decide(samples.texts[test])

        state = torch.get_rng_state()
        first = decisions()
        assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left as it was"
        assert roc_auc_score(samples.labels[test], first) > 0.75
        assert np.array_equal(first, decisions())

    def test_is_chosen_by_its_directory(self, encoder: Path) -> None:
        result = calibrate_dataset(WORLD.select(range(40)), classifier=str(encoder), folds=2)
        assert result.report.settings["classifier"] == str(encoder)
        assert all(0 < prob < 1 for row in result.dataset["probs"] for prob in row)

    def test_refuses_to_score_before_it_is_fitted(self, encoder: Path) -> None:
        with pytest.raises(RuntimeError, match="call fit first"):
            EncoderClassifier(encoder, 0).decide(["text"])


class TestProbability:
    def test_expected_calibration_error_by_hand(self) -> None:
        # bins of width 1/2: {0.1, 0.3} with one of two positive, {0.6, 0.8, 0.7} with three of three
        labels, probs = [0, 1, 1, 1, 1], [0.1, 0.3, 0.6, 0.8, 0.7]
        expected = 2 / 5 * abs(0.2 - 0.5) + 3 / 5 * abs(0.7 - 1.0)
        assert expected_calibration_error(labels, probs, bins=2) == pytest.approx(expected)
        assert expected_calibration_error([0, 1], [0.0, 1.0]) == 0
        assert expected_calibration_error([1, 0], [0.0, 1.0]) == 1
        assert expected_calibration_error([1, 0, 1, 0], [0.5] * 4) == 0

    def test_edges_belong_to_the_upper_bin_and_one_to_the_last(self) -> None:
        bins = reliability_bins([0, 1, 1], [0.5, 0.0, 1.0], bins=2)
        assert [b.count for b in bins] == [1, 2]
        assert bins[1].mean_probability == 0.75
        assert reliability_bins([1], [0.1], bins=2)[1].frequency is None

    @given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=60), st.integers(1, 20))
    def test_error_is_between_0_and_1_and_bins_hold_every_sample(
        self, samples: list[tuple[bool, float]], bins: int
    ) -> None:
        labels, probs = [int(label) for label, _ in samples], [prob for _, prob in samples]
        assert 0 <= expected_calibration_error(labels, probs, bins) <= 1
        assert sum(b.count for b in reliability_bins(labels, probs, bins)) == len(samples)
        whole = abs(np.mean(probs) - np.mean(labels))
        assert expected_calibration_error(labels, probs, 1) == pytest.approx(whole)

    def test_platt_recovers_a_logistic_curve_and_stays_finite_when_separable(self) -> None:
        rng = np.random.default_rng(0)
        decisions = rng.normal(size=20_000)
        labels = (rng.random(20_000) < 1 / (1 + np.exp(-(2 * decisions - 1)))).astype(np.int64)
        grid = np.linspace(-2, 2, 9)
        assert np.abs(fit_platt(decisions, labels)(grid) - 1 / (1 + np.exp(-(2 * grid - 1)))).max() < 0.02
        separable = fit_platt(np.array([-1.0, -2.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))(np.array([-50.0, 50.0]))
        assert np.isfinite(separable).all()

    @pytest.mark.parametrize("probability", sorted(CALIBRATORS))
    @pytest.mark.parametrize("seed", [0, 1])
    def test_calibrators_are_monotone_probabilities(self, probability: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, size=300)
        values = CALIBRATORS[probability](labels + rng.normal(size=300), labels)(np.linspace(-5, 5, 101))
        assert (np.diff(values) >= 0).all()
        assert values.min() >= 0
        assert values.max() <= 1

    @pytest.mark.parametrize(
        ("labels", "probs", "message"),
        [
            ([0, 2], [0.1, 0.2], "labels: expected zeros and ones"),
            ([0, 1], [0.1, 1.2], r"probs: expected values in \[0, 1\]"),
            ([0, 1], [0.1, math.nan], r"probs: expected values in \[0, 1\]"),
            ([0, 1], [0.1], "probs: expected as many values as labels"),
            ([], [], "at least one"),
        ],
        ids=["label", "above 1", "nan", "lengths", "empty"],
    )
    def test_refuses_bad_input(self, labels: list[int], probs: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(labels, probs)


class TestGroupCalibration:
    def test_values_by_hand(self) -> None:
        h = torch.tensor([[2.0, 0.5, 3.5], [1.0, 4.0, 9.0]], dtype=torch.float64)
        mask = torch.tensor([[True, True, True], [True, True, False]])
        expected = {
            "mean": [2.0, 2.5],
            "chosen": [2.0, 1.0],
            "product": [3.5, 4.0],
            "min": [0.5, 1.0],
            "share": [1.0, 0.4],
        }
        assert set(expected) == set(REDUCTIONS)
        for reduce, values in expected.items():
            assert group_calibration(h, reduce, mask=mask).tolist() == pytest.approx(values), reduce

    @pytest.mark.parametrize("reduce", sorted(REDUCTIONS))
    def test_padding_changes_nothing_whatever_it_holds(self, reduce: str) -> None:
        h = torch.rand(9, 3, dtype=torch.float64)
        padded = torch.cat([h, torch.full((9, 2), torch.nan, dtype=torch.float64)], dim=1)
        mask = torch.tensor([True, True, True, False, False]).expand(9, 5)
        assert torch.equal(group_calibration(padded, reduce, mask=mask), group_calibration(h, reduce))

    @pytest.mark.parametrize("reduce", sorted(REDUCTIONS))
    def test_equal_responses_and_zeros(self, reduce: str) -> None:
        assert group_calibration(torch.ones(2, 4), reduce).tolist() == [1, 1]
        assert torch.isfinite(group_calibration(torch.zeros(2, 4), reduce)).all()

    def test_share_is_the_posterior_of_a_right_label(self) -> None:
        """With h ∝ odds, share / 2 = p_w (1 − p_l) / (p_w (1 − p_l) + p_l (1 − p_w))."""
        p = torch.rand(50, 2, dtype=torch.float64)
        chosen, rejected = p.unbind(1)
        right, wrong = chosen * (1 - rejected), rejected * (1 - chosen)
        posterior = right / (right + wrong)
        assert torch.allclose(group_calibration(p / (1 - p), "share") / 2, posterior)

    @pytest.mark.parametrize(
        ("h", "reduce", "message"),
        [
            (torch.ones(3), "mean", r"h: expected shape \[G, K\]"),
            (torch.ones(3, 2), "median", "reduce: expected one of mean, chosen, product, min, share, got 'median'"),
            (-torch.ones(3, 2), "mean", "h: expected finite values, at least 0"),
            (torch.full((3, 2), math.nan), "mean", "h: expected finite values, at least 0"),
        ],
        ids=["shape", "name", "negative", "nan"],
    )
    def test_refuses_bad_input(self, h: torch.Tensor, reduce: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            group_calibration(h, reduce)

    def test_ragged_rows_match_one_row_at_a_time_and_rank_by_score(self) -> None:
        probs = [[0.2, 0.9], [0.5, 0.4, 0.7], [0.8, 0.1]]
        scores = [[0.0, 1.0], None, [3.0, 2.0]]
        h, groups = calibrate_rows(probs, scores, form="mixture", reduce="chosen", alpha=0.3)
        for row, row_h in zip(probs, h, strict=True):
            assert row_h == pytest.approx(density_ratio(torch.tensor(row), "mixture", alpha=0.3).tolist())
        assert groups == [h[0][1], h[1][0], h[2][0]]


class TestReport:
    def test_saves_strict_json_and_a_figure(self, tmp_path: Path) -> None:
        result = calibrate_dataset(WORLD, folds=3)
        report = result.report
        numbers, figure = report.save(tmp_path / "new" / "folder")

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        stored = json.loads(numbers.read_text(encoding="utf-8"), parse_constant=refuse)
        assert stored["auc"] == report.auc
        assert stored["ess_fraction"] == pytest.approx(report.ess / 240)
        assert stored["counts"] == {"human": 192, "synthetic_a": 144, "synthetic_b": 144}
        assert stored["mixture"]["gammas"]["synthetic_a"] == 0.75
        assert sum(stored["h_by_kind"]["human"]["histogram"]) == 192
        assert figure.read_bytes().startswith(b"\x89PNG")

    def test_effective_sample_size_and_brier_by_definition(self) -> None:
        result = calibrate_dataset(WORLD, folds=3, form="mixture")
        weights = np.asarray(result.group_h) / sum(result.group_h)
        assert result.report.ess == pytest.approx(1 / (weights**2).sum())
        probs = np.concatenate(result.dataset["probs"][:])
        labels = np.array([source == "human" for row in WORLD["sources"] for source in row])
        assert result.report.brier == pytest.approx(((probs - labels) ** 2).mean())

    def test_mixture_form_is_the_probability_over_the_target_share(self) -> None:
        """The classifier is fitted at the data's own proportions, where h = p / α."""
        result = calibrate_dataset(WORLD, folds=3, form="mixture")
        for h, probs in zip(result.h, result.dataset["probs"], strict=True):
            assert h == pytest.approx([prob / 0.4 for prob in probs])


SOURCED = {"prompt": "p", "responses": ["a", "b"], "sources": ["human", "machine"]}
PLAIN = {"prompt": "p", "responses": ["a", "b"]}


class TestRefusals:
    @pytest.mark.parametrize(
        ("dataset", "arguments", "message"),
        [
            (rows_of(SOURCED), {"target": "alien"}, "target: expected one of the sources human, machine, got 'alien'"),
            (rows_of(PLAIN), {}, "dataset: expected a source for every response of row 'row-0'"),
            (rows_of(PLAIN | {"sources": ["human"] * 2}), {}, "dataset: expected responses of other sources than"),
            (rows_of(SOURCED), {}, "folds: expected at most 1, the number of prompts"),
            (rows_of(SOURCED), {"folds": 1}, "folds: expected at least 2, got 1"),
            (WORLD, {"clip": 0.0}, r"clip: expected a number in \(0, 0.5\), got 0.0"),
            (WORLD, {"probability": "softmax"}, "probability: expected one of platt, isotonic, got 'softmax'"),
            (WORLD, {"reduce": "median"}, "reduce: expected one of mean"),
            (rows_of(PLAIN), {"target": "chosen"}, "target: expected a column 'trusted'"),
            (rows_of(SOURCED | {"probs": [0.1, 0.2]}), {}, "overwrite: expected True to replace the probs"),
            (rows_of({"prompt": "p"}), {}, "dataset: expected at least one row with the columns prompt and responses"),
        ],
        ids=[
            "unknown source", "no sources", "one class", "fewer prompts than folds", "one fold", "clip", "probability",
            "reduce", "nothing trusted", "probs there", "no responses",
        ],
    )  # fmt: skip
    def test_message(self, dataset: Dataset, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            calibrate_dataset(dataset, **arguments)

    def test_types(self) -> None:
        with pytest.raises(TypeError, match=r"dataset: expected a datasets\.Dataset, got list"):
            calibrate_dataset([SOURCED])  # type: ignore[arg-type]  # the point of the test
        with pytest.raises(TypeError, match="classifier: expected 'tfidf', the name or directory"):
            calibrate_dataset(WORLD, classifier=3)  # type: ignore[arg-type]  # the point of the test

    def test_overwrites_probs_on_request(self) -> None:
        once = calibrate_dataset(WORLD, folds=2).dataset
        again = calibrate_dataset(once, folds=2, seed=1, overwrite=True).dataset
        assert again.column_names == once.column_names
        assert again["probs"][:] != once["probs"][:]

    def test_one_classifier_needs_two_prompts_of_each_class(self) -> None:
        with pytest.raises(ValueError, match="at least 2 prompts of each class"):
            fit_classifier(["a", "b", "c"], np.array([1, 0, 0]), ["p", "q", "r"])
