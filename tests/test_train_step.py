"""The comparison of whole training steps: data, loops that agree, measurement, verdict, command."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from robust_dpo.bench.machine import describe_machine
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.store import Store, run_key
from robust_dpo.bench.tables import replace_between
from robust_dpo.bench.train_step import main as command
from robust_dpo.bench.train_step.contestants import CONTESTANTS, Contestant, choose, ours_with
from robust_dpo.bench.train_step.data import Workload, make_workload
from robust_dpo.bench.train_step.plain import (
    Padded,
    calibrated_plackett_luce,
    cut_cross_entropy,
    dpo,
    eager,
    on_response_rows,
    whole_log_softmax,
)
from robust_dpo.bench.train_step.ratios import best_simple, times
from robust_dpo.bench.train_step.session import measure
from robust_dpo.bench.train_step.setting import IGNORE, LAM, MODELS, Setting
from robust_dpo.bench.train_step.tables import results_markdown
from robust_dpo.bench.train_step.targets import verdicts
from robust_dpo.bench.train_step.turnstile import Turnstile
from robust_dpo.bench.train_step.worker import weight_errors, weights_of
from robust_dpo.errors import DataError
from robust_dpo.groups import Groups
from robust_dpo.losses import resolve
from robust_dpo.robust import from_mode

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = Setting(
    model=MODELS["tiny"],
    dtype="fp32",
    reference="live",
    responses=2,
    groups=3,
    max_length=48,
    warmups=1,
    rounds=2,
    device="cpu",
    attention="sdpa",
    seed=3,
)
LISTS = replace(TINY, responses=4)


def write_preferences(path: Path, count: int) -> Path:
    rng = random.Random(count)

    def text(most: int) -> str:
        return " ".join(rng.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(rng.randint(1, most)))

    rows = [{"prompt": text(30), "chosen": text(20), "rejected": text(20)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Data


@pytest.mark.parametrize("setting", [TINY, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize("of_file", [False, True], ids=["random", "file"])
def test_a_workload_has_the_groups_of_every_step(tmp_path, setting, of_file) -> None:
    path = write_preferences(tmp_path / "pairs.jsonl", 30) if of_file else None
    workload = make_workload(setting, path)
    assert len(workload.rows) == setting.groups * setting.steps == 9
    assert len(workload.batches(setting.groups)) == len(workload.tokens(setting.groups)) == setting.steps
    for row in workload.rows:
        assert len(row["response_ids"]) == setting.responses and all(row["response_ids"])
        assert len(row["prompt_ids"]) + max(map(len, row["response_ids"])) <= setting.max_length
        assert max(row["prompt_ids"]) < setting.model.vocab
    assert make_workload(setting, path) == workload
    assert ("borrowed" in workload.source) == (of_file and not setting.pairs)


def test_shares_of_prompt_and_padding_by_hand() -> None:
    rows = [
        {"prompt_ids": [1] * 6, "response_ids": [[2] * 2, [2] * 4], "calibration": 1.0},
        {"prompt_ids": [1] * 1, "response_ids": [[2] * 1, [2] * 4], "calibration": 1.0},
    ]
    workload = Workload(rows, "")
    assert workload.tokens(2) == [8 + 10 + 2 + 5]
    assert workload.prompt_share == 14 / 25
    assert workload.padding_share(2) == 1 - 25 / 40
    assert workload.padding_share(1) == 1 - 25 / (20 + 10)


def test_a_file_with_too_few_groups_is_refused(tmp_path) -> None:
    path = write_preferences(tmp_path / "pairs.jsonl", 8)
    with pytest.raises(DataError, match=r"pairs\.jsonl: expected at least 9 usable groups, found 8"):
        make_workload(TINY, path)


# Plain loops


def test_targets_are_the_tokens_that_follow() -> None:
    batch = Padded.collate(
        [{"prompt_ids": [5, 6, 7], "response_ids": [[8, 9], [4]], "calibration": 0.5}],
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 4, 0]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 9, IGNORE], [IGNORE, IGNORE, 4, IGNORE, IGNORE]]
    assert batch.calibration.tolist() == [0.5]


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(whole_log_softmax, id="dora_authors"),
        pytest.param(
            lambda model, batch: on_response_rows(cut_cross_entropy, model, batch),
            id="plain_cce",
            marks=pytest.mark.slow,  # it compiles
        ),
    ],
)
def test_ways_to_the_log_probs_agree(head) -> None:
    if head is not whole_log_softmax:
        pytest.importorskip("cut_cross_entropy")
    setting = replace(TINY, dtype="fp64") if head is whole_log_softmax else TINY
    batch = Padded.collate(make_workload(TINY, None).rows[:3])
    model = setting.policy()
    expected = on_response_rows(eager, model, batch)
    torch.testing.assert_close(head(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (6,) and (expected < 0).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_plain_objectives_are_those_of_the_package(k) -> None:
    generator = torch.Generator().manual_seed(k)
    log_ratios = torch.randn(5, k, generator=generator, dtype=torch.float64) * 20
    calibration = torch.rand(5, generator=generator, dtype=torch.float64) * 2
    ones = torch.ones_like(log_ratios)
    groups = Groups(log_ratios, ones, ones.bool(), ref_logps=torch.zeros_like(log_ratios))
    of_list = from_mode("dora", LAM)[0].solve(resolve("plackett_luce")(groups), calibration).value
    torch.testing.assert_close(calibrated_plackett_luce(log_ratios, calibration), of_list)
    if k == 2:
        torch.testing.assert_close(dpo(log_ratios, calibration), resolve("sigmoid")(groups).mean())


# Every loop takes the same steps


def train(name: str, setting: Setting) -> tuple[list[float], Any]:
    """Losses of all steps, and the trained model, in this process."""
    losses: list[float] = []

    def turnstile(loss: Tensor) -> None:
        losses.append(float(loss))

    model = CONTESTANTS[name].loop.train(setting, make_workload(setting, None).rows, turnstile)  # type: ignore[arg-type]
    return losses, model


@pytest.mark.parametrize("reference", ["live", "precomputed"])
@pytest.mark.parametrize(
    "name, setting",
    [
        pytest.param("ours", TINY, id="ours-pairs"),
        pytest.param("ours", LISTS, id="ours-lists"),
        pytest.param("trl", TINY, id="trl-pairs"),
        pytest.param("dora_authors", LISTS, id="authors-lists"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_losses_and_weights_are_those_of_the_plain_loop(name, setting, reference) -> None:
    if not CONTESTANTS[name].available:
        pytest.skip(f"needs {CONTESTANTS[name].package}")
    setting = replace(setting, reference=reference)
    expected_losses, expected = train("plain", replace(setting, dtype="fp64"))
    losses, model = train(name, setting)
    assert len(set(expected_losses)) == len(expected_losses) == setting.steps
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0.0)
    errors = weight_errors(weights_of(model), weights_of(expected), weights_of(replace(setting, dtype="fp64").policy()))
    assert errors["update"] < 1e-2 and errors["weights"] < 1e-6


def test_weight_errors_by_hand() -> None:
    start = {"a": torch.zeros(2), "b": torch.zeros(1)}
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.5])}
    assert weight_errors(found, expected, start) == pytest.approx({"weights": 0.1, "update": 0.1})
    shifted = {name: value - 1.0 for name, value in expected.items()}
    errors = weight_errors(found, expected, shifted)
    assert errors["update"] == pytest.approx(0.5 / 3**0.5)


# Measuring


class Script:
    """One end of a connection: answers from a list, and everything that was sent."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers, self.sent = answers, []

    def send(self, value: Any) -> None:
        self.sent.append(value)

    def recv(self) -> bool:
        return self.answers.pop(0)


def test_the_turnstile_reports_and_stops() -> None:
    connection = Script([True, True, False])
    turnstile = Turnstile(connection, CPU, warmups=2)  # type: ignore[arg-type]
    turnstile(torch.tensor(0.5))
    assert turnstile.resident == 0
    turnstile(torch.tensor(0.25))
    assert turnstile.resident > 0
    with pytest.raises(SystemExit):
        turnstile(torch.tensor(0.125))
    assert [passage.loss for passage in connection.sent] == [0.5, 0.25, 0.125]
    assert all(passage.seconds > 0 and passage.cpu_seconds >= 0 for passage in connection.sent)


class Dies:
    """A loop that takes one step and fails."""

    def train(self, setting: Setting, rows: Any, turnstile: Turnstile) -> Any:
        turnstile(torch.tensor(1.0))
        raise SystemExit(3)


@pytest.mark.slow
def test_who_dies_is_reported_and_the_rest_goes_on(tmp_path) -> None:
    contestants = [Contestant("dies", Dies()), CONTESTANTS["plain_fp64"], CONTESTANTS["plain"]]
    workload = make_workload(TINY, None)
    record = measure(contestants, TINY, workload, threads=1, folder=tmp_path, console=Console(quiet=True))
    dead, exact, plain = record.rows
    assert dead.failure == "exit code 3" and not dead.seconds
    assert exact.failure is None and not exact.errors
    assert len(plain.seconds) == TINY.rounds and plain.errors["loss"] < 1e-5
    assert plain.extra_bytes is not None and 0 < record.details["step_bytes"]["plain"] < plain.extra_bytes
    assert not list(tmp_path.iterdir())


# Figures


def record_of(setting: Setting, rows: dict[str, tuple[list[float], int]]) -> Record:
    found = [
        Row(name, Role.OURS if name == "ours" else Role.PEER, seconds=seconds, extra_bytes=memory)
        for name, (seconds, memory) in rows.items()
    ]
    details = {"setting": setting.as_dict(), "tokens": [600] * setting.rounds, "step_bytes": {}, "source": "here"}
    details["cpu_seconds"] = {name: [3 * value for value in seconds] for name, (seconds, _) in rows.items()}
    details |= {"prompt_share": 0.7, "padding_share": 0.4}
    return Record(setting.name, "train_step", setting.name, found, dtype=setting.dtype, details=details)


SMALL = replace(TINY, model=MODELS["small"])


def test_ratios_pair_the_rounds() -> None:
    record = record_of(SMALL, {"slow": ([2.0, 30.0], 1), "fast": ([1.0, 10.0], 1)})
    spread = times(*record.rows)
    assert (spread.median, spread.low, spread.high) == (2.5, 2.0, 3.0)


def test_the_best_simple_baseline_is_the_faster_plain_loop() -> None:
    seconds = {"plain": ([2.0, 2.0], 1), "plain_cce": ([1.0, 1.5], 1), "trl": ([0.1, 0.1], 1), "ours": ([0.1, 0.1], 1)}
    found = best_simple(record_of(SMALL, seconds))
    assert found is not None and found.name == "plain_cce"
    assert best_simple(record_of(SMALL, {"ours": seconds["ours"]})) is None


def test_the_verdict_of_pairs() -> None:
    rows = {
        "plain": ([3.2, 3.2], 100),
        "plain_cce": ([4.0, 4.0], 90),
        "trl": ([11.0, 11.0], 500),
        "ours": ([2.0, 2.0], 70),
    }
    record = record_of(SMALL, rows)
    record.rows[-1].errors = {"loss": 1e-6, "weights": 1e-8, "update": 1e-5}
    found = {verdict.target: (verdict.found, verdict.met) for verdict in verdicts([record])}
    assert found == {
        "times as fast as the best simple baseline": (1.6, True),
        "times as fast as TRL": (5.5, False),
        "loss error": (1e-6, True),
        "peak memory, times the plain loop's": (0.7, False),
    }


def test_the_verdict_of_lists_and_of_bf16() -> None:
    rows = {"plain": ([4.5, 4.5], 100), "dora_authors": ([9.0, 9.0], 500), "ours": ([2.0, 2.0], 60)}
    lists, half = record_of(replace(SMALL, responses=4), rows), record_of(replace(SMALL, dtype="bf16"), rows)
    assert [(each.target, each.wanted, each.met) for each in verdicts([lists])] == [
        ("times as fast as the plain loop", 2.2, True),
        ("times as fast as the DoRA authors' way", 5.0, False),
        ("peak memory, times the plain loop's", 0.6, True),
    ]
    assert [each.target for each in verdicts([half])] == ["peak memory, times the plain loop's"]


def test_the_page_says_what_was_measured(tmp_path) -> None:
    rows = {"plain": ([4.0, 8.0], 2 << 30), "ours": ([2.0, 2.0], 1 << 30)}
    record = record_of(SMALL, rows)
    machine = describe_machine(1)
    store = Store(tmp_path, run_key(machine), machine)
    store.put(record_of(replace(SMALL, responses=4), rows))
    store.put(record)
    page = results_markdown(store)
    assert page.index("### small, pairs") < page.index("### small, lists")
    assert "### small, pairs, live reference, fp32" in page
    assert "| plain | 6000 [4000–8000] | 0.5625 | 112.5 | 3.00 [2.00–4.00] | 3.00 | 2.00 |" in page
    assert (
        "| small, pairs, live reference, fp32 | times as fast as the best simple baseline | ≥ 1.6 | 3 | yes |" in page
    )
    assert "Data: here; 70% of the tokens are prompt, 40% of a padded batch is padding." in page


# Command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "huge"], "expected names out of tiny, small, smollm2-135m, got huge"),
        (["--dtype", "fp8"], "expected names out of fp32, bf16, got fp8"),
        (["--reference", "none"], "expected names out of live, precomputed, got none"),
        (["--responses", "1"], "expected numbers of at least 2, got 1"),
        (["--rounds", "0"], "expected a number of at least 1, got 0"),
        (["--compare", "plain,nobody"], "names out of plain, plain_fp64"),
        (["--also-ours", "layout"], "expected fields of RobustDPOConfig as name=value, got 'layout'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.parse(["--out", "x", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_settings_are_the_product_of_the_choices() -> None:
    options = command.parse(
        ["--out", "x", "--models", "small", "--responses", "2,4", "--dtype", "fp32", "--device", "cpu"]
    )
    assert [setting.name for setting in command.settings(options)] == [
        "small, pairs, live reference, fp32",
        "small, pairs, precomputed reference, fp32",
        "small, lists of 4, live reference, fp32",
        "small, lists of 4, precomputed reference, fp32",
    ]


def test_contestants_of_a_setting() -> None:
    def names(setting: Setting) -> list[str]:
        return [each.name for each in CONTESTANTS.values() if each.takes_part(setting)]

    assert names(TINY) == ["plain", "plain_fp64", "plain_cce", "trl", "ours"]
    assert names(replace(LISTS, dtype="bf16")) == ["plain", "plain_fp32", "plain_cce", "dora_authors", "ours"]
    assert [each.name for each in choose(("ours", "plain"))] == ["plain", "ours"]


def test_another_row_of_ours_has_its_own_options() -> None:
    options = command.parse(["--out", "x", "--also-ours", "head_route=logits,beta=0.5"])
    extra = options.contestants[-1]
    assert extra == ours_with({"head_route": "logits", "beta": 0.5})
    assert (extra.name, extra.role) == ("ours, head_route=logits, beta=0.5", Role.OURS)


def test_a_file_that_cannot_be_used_ends_the_command(tmp_path, capsys) -> None:
    path = write_preferences(tmp_path / "pairs.jsonl", 2)
    assert command.main(["--out", str(tmp_path / "out"), "--data", str(path), "--quick", "--device", "cpu"]) == 2
    assert "expected at least" in capsys.readouterr().out


def test_the_command_measures_and_writes(tmp_path) -> None:
    docs = tmp_path / "page.md"
    docs.write_text("<!-- train_step:begin -->\n<!-- train_step:end -->\n")
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--compare", "ours", "--docs", str(docs)]
    choices = ["--reference", "live", "--dtype", "fp32", "--responses", "2"]
    assert command.main([*arguments, *choices, "--out", str(tmp_path / "out")]) == 0
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    (record,) = run["cases"].values()
    assert [row["name"] for row in record["rows"]] == ["ours"]
    assert len(record["details"]["losses"]["ours"]) == 3 and len(record["rows"][0]["seconds"]) == 2
    page = (tmp_path / "out" / "results.md").read_text()
    assert page.strip() in docs.read_text() and "| ours |" in page


def test_docs_page_has_the_markers(tmp_path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text())
    replace_between(page, command.MARKER, "table")
    assert "table" in page.read_text()
