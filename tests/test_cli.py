"""The command line: help, config files, exit codes, and one small pipeline from end to end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from robust_dpo.cli import app
from robust_dpo.cli.exit_codes import MEANING, ExitCode

COMMANDS = ("calibrate", "train", "evaluate", "report", "doctor", "demo", "bench")


def run(*arguments: object) -> Any:
    """Run a command in this process; `.output` holds stdout and stderr."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    """Without the line breaks and frames of a terminal."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="session")
def start_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its own tokenizer, saved to disk."""
    from robust_dpo.demo.settings import Budget
    from robust_dpo.demo.start import build_model, build_tokenizer, texts_of
    from robust_dpo.world import make_world

    budget = Budget(40, 20, 300, 16, 1, 2, 160, 1, 1e-3, 1, 4, 1e-3)
    path = tmp_path_factory.mktemp("start") / "model"
    tokenizer = build_tokenizer(texts_of(make_world(40, 5)), budget.vocab_size, budget.max_length)
    build_model(tokenizer, budget, seed=3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def world_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs with sources."""
    from robust_dpo.data import save_preferences
    from robust_dpo.world import make_world

    return save_preferences(make_world(40, 7), tmp_path_factory.mktemp("world") / "world.jsonl")


def test_root_help_names_commands_and_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == ExitCode.OK
    assert all(command in result.output for command in COMMANDS)
    for code, meaning in MEANING.items():
        assert f"{int(code)}: {meaning}" in flat(result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_teaches(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == ExitCode.OK
    assert f"Example: robust-dpo {command}" in flat(result.output)
    assert "--debug" in result.output
    if command not in ("doctor", "report"):
        assert "--config" in result.output


def test_import_and_help_load_neither_torch_nor_transformers() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom robust_dpo.cli import app\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_and_doctor() -> None:
    done = subprocess.run([sys.executable, "-m", "robust_dpo", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    for expected in ("What runs", "row_logprob", "torch", "transformers", "memory", "gpu"):
        assert expected in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "learning-rat: 1\n", "c.yaml:1: unknown key 'learning-rat'; did you mean 'learning_rate'?", id="misspelt"
        ),
        pytest.param("seed: 1\nlamda: 2\n", "c.yaml:2: unknown key 'lamda'; did you mean 'lam'?", id="line-number"),
        pytest.param("zzz: 1\n", "unknown key 'zzz'; valid names:", id="nothing-near"),
        pytest.param("seed: 1\nseed: 2\n", "c.yaml:2: key 'seed' is given twice", id="twice"),
        pytest.param("- a\n- b\n", "c.yaml:1: expected 'option: value' lines", id="list"),
        pytest.param("a: [1\n", "not valid YAML", id="not-yaml"),
        pytest.param("train:\n  lamda: 2\n", "c.yaml:2: unknown key 'lamda'", id="in-section"),
        pytest.param("lam: much\n", "--lam", id="wrong-type"),
        pytest.param("mode: best\n", "--mode", id="wrong-choice"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    result = run("train", "--config", tmp_path / "c.yaml", "--model", "m", "--data", "d", "--out", tmp_path / "o")
    assert result.exit_code == ExitCode.USAGE
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("sectioned", [False, True], ids=["flat", "sections"])
def test_config_gives_options_and_the_command_line_overrides(
    tmp_path: Path, world_file: Path, start_model: Path, sectioned: bool
) -> None:
    options = {"data": str(world_file), "model": str(start_model), "max-steps": 1, "beta": 0.3, "mode": "dro"}
    options |= {"learning_rate": "1e-5", "batch_size": 2, "save_steps": 0, "trainer_arg": ["weight_decay=0.25"]}
    config = {"train": options, "calibrate": {"folds": 3}} if sectioned else options
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    result = run("train", "--config", tmp_path / "c.yaml", "--beta", "0.7", "--out", tmp_path / "run")
    assert result.exit_code == ExitCode.OK, result.output
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["beta"] == 0.7
    assert resolved["mode"] == "dro"
    assert resolved["max_steps"] == 1
    assert float(resolved["learning_rate"]) == 1e-5
    assert resolved["trainer_arg"] == ["weight_decay=0.25"]
    # what was resolved is a config file again
    again = run("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again")
    assert again.exit_code == ExitCode.OK, again.output
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model" / "model.safetensors"
    ).read_bytes()


def test_calibrate_train_evaluate_report(tmp_path: Path, world_file: Path, start_model: Path) -> None:
    data, run_dir = tmp_path / "calibrated.jsonl", tmp_path / "runs" / "robust"
    calibrated = run("calibrate", "--data", world_file, "--out", data, "--folds", 2)
    assert calibrated.exit_code == ExitCode.OK, calibrated.output
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 40
    assert all(0 < prob < 1 for row in rows for prob in row["probs"])
    report = tmp_path / "calibrated.jsonl.calibration"
    assert {path.name for path in report.iterdir()} == {"calibration.json", "calibration.png"}

    common = ["--model", start_model, "--data", data, "--batch-size", 4, "--logging-steps", 1, "--max-length", 160]
    trained = run(
        "train",
        *common,
        *("--calibration", report / "calibration.json", "--form", "mixture", "--learning-rate", 1e-3),
        *("--eval-data", world_file, "--eval-steps", 5, "--save-steps", 5, "--out", run_dir),
    )
    assert trained.exit_code == ExitCode.OK, trained.output
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 11))
    assert sum("eval_loss" in record for record in records) >= 2
    assert all(record["robust/ess"] < 4 for record in records if "loss" in record)
    weights = json.loads((run_dir / "weights.json").read_text())["weights"]
    assert len(weights) == 40
    assert sum(weights) == pytest.approx(40, abs=1e-3)
    plots = {path.name for path in (run_dir / "plots").iterdir()}
    assert plots == {"loss.png", "margins.png", "accuracy.png", "ess.png", "weights.png"}

    evaluated = run(
        *("evaluate", "--model", run_dir / "model", "--ref-model", start_model, "--data", world_file),
        *("--out", tmp_path / "evaluation.json"),
    )
    assert evaluated.exit_code == ExitCode.OK, evaluated.output
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(evaluation["by_source"]) == {"human", "synthetic_a", "synthetic_b"}
    assert sum(source["groups"] for source in evaluation["by_source"].values()) == evaluation["overall"]["groups"] == 40
    assert 0 <= evaluation["overall"]["accuracy"] <= 1
    # the same without a reference: the reward is gone, the ranking by log-prob is the same
    bare = run("evaluate", "--model", run_dir / "model", "--data", world_file, "--out", tmp_path / "bare.json")
    assert bare.exit_code == ExitCode.OK, bare.output
    overall = json.loads((tmp_path / "bare.json").read_text())["overall"]
    assert overall["accuracy"] is None
    for name in ("logp_accuracy", "token_logp_accuracy", "chosen_logp"):
        assert overall[name] == pytest.approx(evaluation["overall"][name], rel=1e-5)

    (run_dir / "plots" / "loss.png").unlink()
    reported = run("report", run_dir)
    assert reported.exit_code == ExitCode.OK, reported.output
    assert (run_dir / "plots" / "loss.png").is_file()
    compared = run("report", run_dir, run_dir, "--out", tmp_path / "comparison")
    assert compared.exit_code == ExitCode.OK, compared.output
    assert (tmp_path / "comparison" / "ess.png").is_file()

    # nothing is overwritten unasked
    for again in (
        run("train", *common, "--out", run_dir),
        run("calibrate", "--data", world_file, "--out", data),
        run("evaluate", "--model", start_model, "--data", world_file, "--out", tmp_path / "evaluation.json"),
    ):
        assert again.exit_code == ExitCode.EXISTS
        assert "already" in again.output


def test_train_keeps_what_the_next_run_can_use(tmp_path: Path, world_file: Path, start_model: Path) -> None:
    cache = tmp_path / "cache"
    common = ["train", "--model", start_model, "--data", world_file, "--mode", "erm", "--precompute-ref"]
    common += ["--cache-dir", cache, "--num-proc", 1, "--max-steps", 1, "--save-steps", 0, "--max-length", 160]
    before: dict[str, int] = {}
    for name in ("first", "second"):
        trained = run(*common, "--out", tmp_path / name)
        assert trained.exit_code == ExitCode.OK, trained.output
        files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
        assert sorted(file.partition("-")[0] for file in files) == ["ref_logps", "tokens"]
        assert before in ({}, files), "the second run writes nothing"
        before = files


def test_train_weighs_domains(tmp_path: Path, world_file: Path, start_model: Path) -> None:
    """By a column of the data, or by the `domain` that an earlier command has made of it."""
    rows = [json.loads(line) for line in world_file.read_text().splitlines()]
    (tmp_path / "topics.jsonl").write_text(
        "".join(json.dumps({**row, "topic": "ab"[index % 2]}) + "\n" for index, row in enumerate(rows))
    )
    calibrated = tmp_path / "calibrated.jsonl"
    done = run("calibrate", "--data", tmp_path / "topics.jsonl", "--domain-column", "topic", "--out", calibrated)
    assert done.exit_code == ExitCode.OK, done.output
    common = ["train", "--model", start_model, "--mode", "erm", "--robust", "group_dro", "--max-steps", 2]
    common += ["--logging-steps", 1, "--save-steps", 0, "--max-length", 160, "--eval-steps", 2]
    for data, options in (
        (tmp_path / "topics.jsonl", ["--domain-column", "topic"]),
        (calibrated, ["--trainer-arg", "robust_options={step_size: 0.5}"]),
    ):
        out = tmp_path / data.stem
        trained = run(*common, "--data", data, "--eval-data", data, *options, "--out", out)
        assert trained.exit_code == ExitCode.OK, trained.output
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        weights = [[record[f"robust/domain_weight/{name}"] for name in "ab"] for record in records if "loss" in record]
        assert len(weights) == 2 and all(sum(step) == pytest.approx(1) for step in weights)
        assert any("eval_loss" in record for record in records)


@pytest.mark.parametrize("place", ["", ".incomplete"], ids=["checkpoint", "lacks-its-rename"])
def test_resume_ends_with_the_same_weights(place: str, tmp_path: Path, world_file: Path, start_model: Path) -> None:
    common = ["--model", start_model, "--data", world_file, "--mode", "dro", "--batch-size", 8, "--learning-rate", 1e-3]
    common += ["--logging-steps", 1, "--save-steps", 2, "--trainer-arg", "save_total_limit=9", "--lam", 1]
    whole = run("train", *common, "--out", tmp_path / "whole")
    assert whole.exit_code == ExitCode.OK, whole.output
    # a run that was killed after its third step: a whole checkpoint, a damaged one, and a log that is ahead
    killed = tmp_path / "killed"
    (killed / "checkpoints" / place).mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(killed / "checkpoints" / place / "checkpoint-2")
    if not place:
        damaged = shutil.copytree(
            tmp_path / "whole" / "checkpoints" / "checkpoint-4", killed / "checkpoints" / "checkpoint-4"
        )
        (damaged / "optimizer.pt").write_bytes(b"")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (killed / "config.yaml").write_bytes((tmp_path / "whole" / "config.yaml").read_bytes())
    changed = run("train", *common, "--lam", 3, "--out", killed, "--resume")
    assert changed.exit_code == ExitCode.USAGE
    assert "--lam: expected 1.0 as when the run began" in " ".join(changed.output.split())
    resumed = run("train", *common, "--out", killed, "--resume")
    assert resumed.exit_code == ExitCode.OK, resumed.output
    model = Path("model") / "model.safetensors"
    assert (killed / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 5]  # the last record is the summary of the training


BAD_CALLS = [
    pytest.param(["train"], ExitCode.USAGE, "Missing option", id="nothing-given"),
    pytest.param(["trian"], ExitCode.USAGE, "No such command", id="unknown-command"),
    pytest.param(["train", "--lamda", "1"], ExitCode.USAGE, "No such option", id="unknown-option"),
    pytest.param(["report", "{tmp}"], ExitCode.DATA, "not a run directory", id="report-of-nothing"),
    pytest.param(
        ["calibrate", "--data", "{tmp}/no.jsonl", "--out", "{tmp}/o.jsonl"],
        ExitCode.DATA,
        "no.jsonl",
        id="missing-data",
    ),
    pytest.param(
        ["calibrate", "--data", "{tmp}/bad.jsonl", "--out", "{tmp}/o.jsonl"],
        ExitCode.DATA,
        "bad.jsonl:2:",
        id="bad-row",
    ),
    pytest.param(
        ["calibrate", "--data", "{data}", "--out", "{tmp}/o.jsonl", "--target", "angels"],
        ExitCode.USAGE,
        "target: expected one of the sources human, synthetic_a, synthetic_b",
        id="unknown-target",
    ),
    pytest.param(
        ["calibrate", "--data", "{data}", "--out", "{tmp}/o.txt"], ExitCode.USAGE, "path: expected", id="unknown-ending"
    ),
    pytest.param(
        ["train", "--model", "{tmp}/none", "--data", "{data}", "--mode", "erm", "--out", "{tmp}/r"],
        ExitCode.MODEL,
        "none",
        id="no-model",
    ),
    pytest.param(
        ["train", "--model", "none.safetensors", "--data", "{data}", "--mode", "erm", "--out", "{tmp}/r"],
        ExitCode.MODEL,
        "tokenizer none.safetensors: no such directory, and no name that the Hub could know",
        id="no-model-file",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--mode", "dora", "--out", "{tmp}/r"],
        ExitCode.DATA,
        "robust-dpo calibrate",
        id="dora-without-probs",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--loss", "sigmiod", "--out", "{tmp}/r"],
        ExitCode.USAGE,
        "sigmiod",
        id="unknown-loss",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--lam", "-1", "--out", "{tmp}/r"],
        ExitCode.USAGE,
        "lam",
        id="negative-lambda",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--trainer-arg", "weight_deacy=1", "--out", "{tmp}/r"],
        ExitCode.USAGE,
        "did you mean 'weight_decay'?",
        id="unknown-trainer-arg",
    ),
    pytest.param(
        [
            "train",
            "--model",
            "{model}",
            "--data",
            "{data}",
            "--trainer-arg",
            "model-init-kwargs={{}}",
            "--out",
            "{tmp}/r",
        ],
        ExitCode.USAGE,
        "the command loads the models itself",
        id="arguments-of-from-pretrained",
    ),
    pytest.param(
        [
            "train",
            "--model",
            "{model}",
            "--data",
            "{tmp}/probs.jsonl",
            "--eval-data",
            "{tmp}/mixed.jsonl",
            "--out",
            "{tmp}/r",
        ],
        ExitCode.DATA,
        "--eval-data: expected probs in all rows or in none, got them in 1 of 2",
        id="eval-data-with-probs-in-some-rows",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--robust", "group_dro", "--out", "{tmp}/r"],
        ExitCode.DATA,
        "missing field: 'domain', which is to name the row's domain; domain_column (--domain-column) is one of",
        id="domains-of-no-column",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--trainer-arg", "domain_column=x", "--out", "{tmp}/r"],
        ExitCode.USAGE,
        "the command loads the models itself, and the data; give the column to --domain-column",
        id="domain-column-of-the-trainer",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--robust", "groupdro", "--out", "{tmp}/r"],
        ExitCode.USAGE,
        "robust: expected one of chi2, chi2_radius, cvar, dr_dpo, group_dro, kl",
        id="unknown-aggregation",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--mode", "erm", "--resume", "--out", "{tmp}/r"],
        ExitCode.USAGE,
        "--resume: expected a checkpoint to go on from, got none in",
        id="nothing-to-resume",
    ),
    pytest.param(
        ["train", "--model", "{model}", "--data", "{data}", "--calibration", "{tmp}/bad.jsonl", "--out", "{tmp}/r"],
        ExitCode.DATA,
        "calibration.json",
        id="not-a-calibration-report",
    ),
    pytest.param(
        ["demo", "--data", "{data}", "--quick", "--out", "{tmp}/demo"],
        ExitCode.DATA,
        "too few",
        id="demo-data-too-small",
    ),
    pytest.param(["demo", "--quick", "--out", "{tmp}"], ExitCode.EXISTS, "already holds files", id="demo-into-files"),
    pytest.param(["demo", "--corruption", "1.5"], ExitCode.USAGE, "--corruption", id="demo-corruption-above-1"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD_CALLS)
def test_bad_call(
    tmp_path: Path, world_file: Path, start_model: Path, arguments: list[str], code: ExitCode, message: str
) -> None:
    good = world_file.read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text(good + '\n{"prompt": "p", "chosen": "a", "rejected": ""}\n')
    calibrated = json.dumps(json.loads(good) | {"probs": [0.5, 0.5]})
    (tmp_path / "probs.jsonl").write_text(f"{calibrated}\n" * 2)
    (tmp_path / "mixed.jsonl").write_text(f"{calibrated}\n{good}\n")
    filled = [each.format(tmp=tmp_path, data=world_file, model=start_model) for each in arguments]
    result = run(*filled)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.output.splitlines()[-1].startswith("robust-dpo: error: ")


def test_nothing_to_resume_is_found_before_anything_is_read_or_made(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", "--model", tmp_path / "none", "--data", tmp_path / "none.jsonl", "--out", out, "--resume")
    assert result.exit_code == ExitCode.USAGE
    assert f"--resume: expected a checkpoint to go on from, got none in {out / 'checkpoints'}" in result.output
    assert not out.exists()


def test_overwrite_replaces_runs_only(tmp_path: Path) -> None:
    from robust_dpo.reporting import RunDirectory

    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no config\.yaml"):
        RunDirectory.create(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "config.yaml").write_text("{}\n")
    RunDirectory.create(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_and_an_internal_error_is_one_line(tmp_path: Path) -> None:
    broken = "import robust_dpo.cli.doctor as d\nd.memory_gib = lambda: 1 / 0\nfrom robust_dpo.cli import main\nmain()"
    for flags, traceback in (([], False), (["--debug"], True)):
        command = [sys.executable, "-c", broken, "doctor", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == ExitCode.FAILED
        assert ("Traceback" in done.stderr) == traceback
        assert "ZeroDivisionError" in done.stderr
        if not traceback:
            assert len(done.stderr.strip().splitlines()) == 2


def test_documentation_has_the_commands_and_the_exit_codes() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"| `{command}` |" in page
    for code, meaning in MEANING.items():
        assert f"| {int(code)} | {meaning} |" in page


def test_bench_measures_prints_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    asked = ("bench", "--out", out, "--device", "cpu", "--quick", "--only", "rows,calibration", "--compare", "plain")
    result = run(*asked)
    assert result.exit_code == ExitCode.OK, result.output
    for expected in ("row_logprob, n = 17", "× floor", "Calibration weights of 1000 probabilities", "results.md"):
        assert expected in result.output
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "bandwidth.png"}
    assert run(*asked).output.count("measured before") == 3


@pytest.mark.parametrize(
    ("arguments", "content", "code", "message"),
    [
        (("--only", "heads"), None, ExitCode.USAGE, "only: expected groups out of"),
        (("--compare", "nobody"), None, ExitCode.USAGE, "implementations: expected names out of"),
        (("--minutes", "0"), None, ExitCode.USAGE, "minutes: expected"),
        (("--device", "tpu"), None, ExitCode.USAGE, "'--device': 'tpu' is not one of"),
        (("--out", "/dev/null"), None, ExitCode.USAGE, "out: expected a folder, or a path where one can be made"),
        ((), "{", ExitCode.DATA, "results.json:1: not valid JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bench_explains_what_is_wrong(tmp_path: Path, arguments, content, code, message) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    result = run("bench", "--out", tmp_path, "--quick", *arguments)
    assert result.exit_code == code
    assert message in flat(result.output)
    assert len(result.output.splitlines()) == 1
