"""Loss, gradient norm, robust weights and trained weights on 2 and 4 ranks are those of one process."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_engines import zero
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer.rank_runs import run_case

DORA = {"mode": "dora", "lam": 0.05, "max_steps": 3}
SOURCES = ("law", "tax", "law", "art")
DOMAINS = {"robust": "group_dro", "domain_column": "sources", "robust_options": {"step_size": 2.0}}
# name: (groups of a step, case); the layouts below cut the groups of a step.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dora": (12, {"rows": "pairs", "options": DORA}),
    "dora-mixed-sizes": (12, {"rows": "mixed", "options": {**DORA, "loss_type": "plackett_luce"}}),
    "dora-lora": (12, {"rows": "pairs", "options": DORA, "lora": True}),
    "dora-tied": (12, {"rows": "pairs", "options": DORA, "model": "tied"}),
    "dora-head-only": (12, {"rows": "pairs", "options": DORA, "head_only": True}),
    "own-reference": (12, {"rows": "pairs", "options": DORA, "own_reference": True}),
    "precomputed-tied": (
        12,
        {
            "rows": "pairs",
            "options": {**DORA, "precompute_ref_log_probs": True},
            "own_reference": True,
            "model": "tied",
        },
    ),
    "two-pass": (12, {"rows": "pairs", "options": {**DORA, "robust_route": "two_pass"}}),
    # FSDP takes padded rows, everything else shares prompts: the tokens that count are the same.
    "experts": (12, {"rows": "pairs", "options": {**DORA, "router_aux_loss_coef": 0.3}, "model": "experts"}),
    "uneven-experts": (
        4,
        {
            "rows": "uneven",
            "options": {"mode": "dro", "lam": 0.05, "num_train_epochs": 2, "router_aux_loss_coef": 0.3},
            "model": "experts",
        },
    ),
    "aot-and-sft": (
        12,
        {
            "rows": "mixed",
            "options": {"mode": "dora", "lam": 0.05, "loss_type": "aot", "sft_weight": 0.3, "max_steps": 3},
        },
    ),
    "radius": (12, {"rows": "pairs", "options": {"mode": "dora", "radius": 0.1, "max_steps": 3}}),
    "domains": (12, {"rows": "pairs", "options": {"mode": "dora", **DOMAINS, "max_steps": 3}}),
    # Two epochs of 13 groups, whose last step has but 1 or 5 of them: a rank has nothing that counts.
    "uneven": (4, {"rows": "uneven", "options": {"mode": "dro", "lam": 0.05, "num_train_epochs": 2}}),
    "uneven-two-pass": (8, {"rows": "uneven", "options": {"mode": "dro", "radius": 0.1, "num_train_epochs": 2}}),
    # With steps that lack a domain.
    "uneven-domains": (4, {"rows": "uneven", "options": {"mode": "dro", **DOMAINS, "num_train_epochs": 2}}),
}


def _engine_options(engine: str, model: str) -> dict[str, Any]:
    """What an engine is asked for; FSDP2 wraps each decoder layer, and the rest of the model around them."""
    if engine.startswith("zero"):
        return zero(int(engine.removeprefix("zero-")))
    if engine not in ("fsdp", "fsdp-loaded-once"):
        return {}
    layer = "MixtralDecoderLayer" if model == "experts" else "LlamaDecoderLayer"
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [layer]}
    # As `accelerate config` proposes: what is loaded has its weights on one rank alone, until the engine shares them.
    once = {"cpu_ram_efficient_loading": engine == "fsdp-loaded-once"}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrap, **once}}


# engine and ranks: name of a case, and the groups of its micro-batches.
LAYOUTS = {
    ("ddp", 2): [
        ("dora", 6),
        ("dora", 2),
        ("dora", 1),
        ("dora-mixed-sizes", 2),
        ("dora-lora", 3),
        ("dora-tied", 2),
        ("dora-head-only", 3),
        ("two-pass", 2),
        ("experts", 2),
        ("radius", 3),
        ("aot-and-sft", 3),
        ("uneven", 1),
        ("uneven", 2),
        ("uneven-experts", 1),
        ("uneven-two-pass", 2),
        ("uneven-two-pass", 4),
        ("domains", 6),
        ("domains", 2),
        ("uneven-domains", 1),
        ("uneven-domains", 2),
    ],
    ("fsdp", 2): [
        ("dora", 6),
        ("dora", 2),
        ("dora-tied", 3),
        ("dora-lora", 6),
        ("dora-head-only", 3),
        ("dora-mixed-sizes", 2),
        ("radius", 3),
        ("uneven", 1),
        ("experts", 3),
        ("domains", 2),
        ("own-reference", 3),
        ("precomputed-tied", 3),
    ],
    ("fsdp-loaded-once", 2): [
        ("dora", 3),
        ("dora-tied", 6),
        ("dora-lora", 3),
        ("own-reference", 3),
        ("precomputed-tied", 3),
    ],
    ("fsdp-at-load", 2): [("dora", 6), ("dora", 2), ("dora-tied", 3), ("dora-head-only", 3), ("uneven", 1)],
    ("zero-1", 1): [("dora", 12), ("dora", 3)],
    ("zero-1", 2): [("dora", 6), ("dora", 3), ("dora-lora", 3), ("dora-tied", 2), ("radius", 3), ("uneven", 1)],
    ("zero-2", 2): [("dora", 6), ("dora", 3), ("dora-tied", 2), ("radius", 3), ("uneven-two-pass", 2)],
    ("zero-3", 2): [
        ("dora", 6),
        ("dora", 3),
        ("radius", 3),
        ("dora-tied", 3),
        ("dora-lora", 3),
        ("dora-head-only", 3),
        ("dora-mixed-sizes", 2),
    ],
    ("ddp", 4): [
        ("dora", 3),
        ("dora", 1),
        ("radius", 1),
        ("uneven", 1),
        ("uneven-two-pass", 2),
        ("uneven-two-pass", 1),
        ("domains", 1),
        ("uneven-domains", 1),
    ],
}


def with_layout(name: str, ranks: int, size: int, engine: str = "ddp") -> dict[str, Any]:
    """The case with micro-batches of `size` groups on each of `ranks`."""
    total, case = CASES[name]
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": total // (size * ranks)}
    options = {**case["options"], **layout, **_engine_options(engine, case.get("model", ""))}
    return {
        **case,
        "options": options,
        "sharded_at_load": engine == "fsdp-at-load",
        "loaded_before": engine == "zero-3",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, module_models: Any) -> Path:
    """Models, a tokenizer and tokenised data sets on disk."""
    from robust_dpo.trainer import RobustDPOConfig
    from robust_dpo.trainer.data import RowPreparation

    build_model, build_rows = module_models
    folder = tmp_path_factory.mktemp("ranks")
    build_model().save_pretrained(folder / "model")
    build_model("llama-tied").save_pretrained(folder / "tied")
    build_model("mixtral-experts").save_pretrained(folder / "experts")
    build_model(seed=1).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "model")

    def draw(rng: random.Random) -> float:
        return rng.random()

    rows = {
        "pairs": build_rows(36, probs=draw),
        "mixed": [row for size in (2, 3, 4) for row in build_rows(12, size=size, seed=size, probs=draw, scores=draw)],
        "uneven": build_rows(13, probs=draw),
    }
    prepare = RowPreparation(RobustDPOConfig(output_dir=str(folder), use_cpu=True, mode="dora"), tokenizer)
    for name, made in rows.items():
        numbered: Dataset = prepare(
            [{**row, "id": f"group-{index}", "source": SOURCES[index % 4]} for index, row in enumerate(made)], name
        )
        numbered.save_to_disk(str(folder / name))
    return folder


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def launched(folder: Path) -> Callable[[str, int], None]:
    """Run all cases of an engine and a number of ranks, once."""
    runs: dict[tuple[str, int], subprocess.CompletedProcess[str]] = {}

    def launch(engine: str, ranks: int) -> None:
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed")
        if (engine, ranks) not in runs:
            layouts = LAYOUTS[engine, ranks]
            cases = {
                f"{name}-{engine}-{ranks}x{size}": with_layout(name, ranks, size, engine) for name, size in layouts
            }
            (folder / "cases.json").write_text(json.dumps(cases))
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
            command += [f"--master-port={_free_port()}", str(Path(__file__).with_name("rank_runs.py"))]
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
            }
            runs[engine, ranks] = subprocess.run(
                [*command, str(folder), engine],
                capture_output=True,
                text=True,
                env=environment,
                timeout=500,
                check=False,
            )
        done = runs[engine, ranks]
        assert done.returncode == 0, done.stderr[-4000:]

    return launch


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The same case in this process, with one micro-batch for each step."""
    known: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}

    def run(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if name not in known:
            case = with_layout(name, 1, CASES[name][0])
            case["options"].pop("robust_route", None)
            known[name] = run_case(folder, name, case)[:2]
        return known[name]

    return run


@pytest.mark.parametrize(
    ("engine", "ranks", "name", "size"),
    [
        pytest.param(
            engine,
            ranks,
            name,
            size,
            id=f"{name}-{engine}-{ranks}x{size}",
            marks=[] if (engine, ranks) == ("ddp", 2) else [pytest.mark.slow],
        )
        for (engine, ranks), layouts in LAYOUTS.items()
        for name, size in layouts
    ],
)
def test_ranks_train_the_same_weights(
    engine: str,
    ranks: int,
    name: str,
    size: int,
    folder: Path,
    launched: Callable[..., Any],
    alone: Callable[..., Any],
) -> None:
    launched(engine, ranks)
    expected, told = alone(name)
    run = f"{name}-{engine}-{ranks}x{size}"
    ends = load_file(folder / f"{run}.safetensors")
    mine = [json.loads((folder / f"{run}-{rank}.json").read_text()) for rank in range(ranks)]
    assert {each["ranks"] for each in mine} == {ranks}
    if engine != "ddp":
        one_micro_batch = CASES[name][0] == size * ranks and name != "radius"
        route = "OnePass" if one_micro_batch else "TwoPass"
        assert mine[0]["plan"] == {"layout": "padded", "head": "fused", "route": route}
        assert mine[0]["counts"]["fused"] >= 3 and mine[0]["counts"]["logits"] == 0
    if engine.startswith("fsdp"):
        assert 0 < mine[0]["counts"]["gathered"] <= mine[0]["counts"]["passes"], "no more than once for each pass"
    assert ends.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ends[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    for ours, theirs in zip(mine[0]["log"], told["log"], strict=True):
        for metric in ("loss", "grad_norm", "robust/ess", "robust/max_weight", "rewards/margins", "logps/chosen"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-5), metric
        weights = {metric for metric in theirs if metric.startswith("robust/domain_weight/")}
        assert len(weights) == (3 if "domains" in name else 0)
        assert all(ours[metric] == pytest.approx(theirs[metric], rel=1e-5) for metric in weights)
    for step, whole in enumerate(told["steps"]):
        together = sorted(pair for each in mine for pair in each["steps"][step])
        assert [key for key, _ in together] == sorted(key for key, _ in whole), "every group counts once"
        assert [weight for _, weight in together] == pytest.approx([weight for _, weight in sorted(whole)], rel=1e-3)
        assert sum(weight for _, weight in together) == pytest.approx(1.0, abs=1e-5)


def test_no_group_is_lost_or_repeated_in_an_epoch(alone: Callable[..., Any]) -> None:
    """What `test_ranks_train_the_same_weights` compares with: each epoch has each group once."""
    for name, steps in (("uneven", 4), ("uneven-two-pass", 2)):
        _, told = alone(name)
        seen = [[key for key, _ in step] for step in told["steps"]]
        assert len(seen) == 2 * steps
        for epoch in (seen[:steps], seen[steps:]):
            assert sorted(key for step in epoch for key in step) == sorted(f"group-{index}" for index in range(13))
