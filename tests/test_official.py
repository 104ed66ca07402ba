"""The DoRA authors' losses against their own published functions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust_dpo import official

METHODS = ("rrhf", "lire", "dpo_bt", "dpo_pl")
CASES = [f"{m}-{v}-K{k}" for m in METHODS for v in ("plain", "dora") for k in (2, 4)]


@pytest.fixture(scope="module")
def oracles(shared_dir: Path) -> dict[str, dict[str, Any]]:
    cases = json.loads((shared_dir / "oracles" / "dora_cases.json").read_text())["cases"]
    return {case["id"]: case for case in cases}


def test_every_oracle_is_tested(oracles: dict[str, dict[str, Any]]):
    assert sorted(oracles) == sorted(CASES)


@pytest.mark.parametrize("case_id", CASES)
def test_oracle(oracles: dict[str, dict[str, Any]], case_id: str):
    case = oracles[case_id]
    inputs = {name: torch.tensor(values, dtype=torch.float64) for name, values in case["inputs"].items()}
    inputs["token_logps"].requires_grad_()
    loss = official.loss(case["method"], case["variant"], **inputs, **case["hyper"])
    expected = torch.tensor(case["outputs"]["loss"], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(loss, inputs["token_logps"])
    expected = torch.tensor(case["outputs"]["grad_token_logps"], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def make_inputs(prompts: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rows, padded = prompts * width, 9
    lengths = torch.randint(1, padded + 1, (rows,))
    mask = torch.arange(padded) < lengths[:, None]
    return {
        "token_logps": -torch.rand(rows, padded, dtype=dtype) * mask,
        "ref_token_logps": -torch.rand(rows, padded, dtype=dtype) * mask,
        "mask": mask,
        "scores": torch.randn(prompts, width, dtype=dtype),
        "probs": torch.rand(prompts, width, dtype=dtype),
    }


def literal(method: str, x: dict[str, Tensor], betas: list[float], lam: float) -> float:
    """The `dora` value, written out with Python floats for α = 1/K."""
    prompts, width = x["scores"].shape
    mask = x["mask"].double()
    S = (x["token_logps"] * mask).sum(1).view(prompts, width).tolist()
    R = (x["ref_token_logps"] * mask).sum(1).view(prompts, width).tolist()
    n = mask.sum(1).view(prompts, width).tolist()
    scores, probs = x["scores"].tolist(), x["probs"].tolist()
    w = [[p / (p / width + b * (1 - p)) for p, b in zip(row, betas, strict=True)] for row in probs]
    mean_w = [sum(row) / width for row in w]
    per_prompt = []
    for b in range(prompts):
        K = range(width)
        t = [0.1 * (S[b][k] - R[b][k]) for k in K]
        if method == "rrhf":
            s = [S[b][k] / n[b][k] for k in K]
            terms = [max(0.0, s[i] - s[j]) for i in K for j in K if scores[b][j] > scores[b][i]]
            per_prompt.append(sum(terms) / width)
        elif method == "lire":
            p, q = [math.exp(S[b][k] / 2) for k in K], [math.exp(scores[b][k]) for k in K]
            per_prompt.append(-sum(p[k] / sum(p) * q[k] / sum(q) for k in K) / width)
        elif method == "dpo_bt":
            per_prompt.append(math.log(1 + math.exp(-(t[0] - t[1]))))
        else:
            e = [math.exp(t[k]) for k in sorted(K, key=lambda k: -scores[b][k])]
            per_prompt.append(-sum(math.log(e[k] / sum(e[k:])) for k in K) / width)

    def log_mean_exp(values: list[float]) -> float:
        return lam * math.log(sum(math.exp(v / lam) for v in values) / len(values))

    if method == "rrhf":
        sft = -float((x["token_logps"] * mask).view(prompts, width, -1)[:, -2].mean())
        scalar = sum(per_prompt) / prompts + sft
        return log_mean_exp([scalar * weight for row in w for weight in row])
    if method == "lire":
        return sum(mean_w) / prompts * log_mean_exp(per_prompt)
    return log_mean_exp([h * value for h, value in zip(mean_w, per_prompt, strict=True)])


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_candidates(method: str, width: int):
    x = make_inputs(5, width)
    betas = [1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 3, 1 / 6] if width == 6 else [1 / width] * width
    loss = official.loss(method, "dora", **x, lambda_=0.7)
    assert float(loss) == pytest.approx(literal(method, x, betas, 0.7), abs=1e-12)


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str, variant: str):
    x = make_inputs(3, 3)
    tokens = x.pop("token_logps").requires_grad_()
    assert torch.autograd.gradcheck(lambda t: official.loss(method, variant, t, **x, lambda_=0.5), (tokens,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_log_ratio_of_890_stays_finite(method: str, dtype: torch.dtype):
    x = make_inputs(2, 2, dtype)
    x["mask"] = torch.ones_like(x["mask"])
    x["token_logps"] = torch.zeros_like(x["token_logps"])
    x["token_logps"][0::2] = -900.0
    x["token_logps"].requires_grad_()
    loss = official.loss(method, "dora", **x, beta_dpo=1.0, lambda_=1e-3)
    loss.backward()
    assert loss.isfinite() and x["token_logps"].grad.isfinite().all()


def test_rrhf_and_lire_need_no_reference():
    x = make_inputs(2, 3)
    for method in ("rrhf", "lire"):
        with_reference = official.loss(method, "dora", **x)
        torch.testing.assert_close(official.loss(method, "dora", **{**x, "ref_token_logps": None}), with_reference)


REFUSED = {
    "method": ({"method": "dpo"}, ValueError, r"method: expected one of rrhf, .*, got 'dpo'"),
    "variant": ({"variant": "robust"}, ValueError, r"variant: expected one of plain, dora, got 'robust'"),
    "no-reference": ({"ref_token_logps": None}, ValueError, r"ref_token_logps: expected a tensor .*'dpo_bt', got None"),
    "list": ({"token_logps": [[0.0]]}, TypeError, r"token_logps: expected a floating tensor, got list"),
    "rows": ({"token_logps": torch.zeros(3, 9)}, ValueError, r"token_logps: expected shape \[4, L\].*, got \[3, 9\]"),
    "flat-scores": ({"scores": torch.zeros(4)}, ValueError, r"scores: expected shape \[B, K\].*, got \[4\]"),
    "probs-shape": ({"probs": torch.full((4, 1), 0.5)}, ValueError, r"probs: expected shape \[2, 2\], got \[4, 1\]"),
    "probs-range": (
        {"probs": torch.full((2, 2), 1.5)},
        ValueError,
        r"probs: expected .* at position \[0, 0\], got 1.5",
    ),
    "mask-shape": ({"mask": torch.ones(4, 8)}, ValueError, r"mask: expected shape \[4, 9\], got \[4, 8\]"),
    "empty-row": ({"mask": torch.zeros(4, 9)}, ValueError, r"mask: expected at least one token .*, got none in row 0"),
    "nan": ({"scores": torch.full((2, 2), math.nan)}, ValueError, r"scores: expected finite .* \[0, 0\], got nan"),
    "lambda": ({"lambda_": 0.0}, ValueError, r"lambda_: expected a number in \(0, inf\), got 0.0"),
    "T": ({"T": -1.0}, ValueError, r"T: expected a number in \(0, inf\), got -1.0"),
    "sft-index": ({"method": "rrhf", "sft_index": 2}, ValueError, r"sft_index: expected a candidate .*, got 2"),
    "beta-vec": ({"beta_vec": [0.5] * 3}, ValueError, r"beta_vec: expected 2 shares.*, got 3"),
    "unknown-hyper": ({"gamma": 1.0}, TypeError, r"gamma"),
    "one-candidate": (
        {k: v for k, v in make_inputs(2, 1).items()},
        ValueError,
        r"scores: expected at least 2 candidates for 'dpo_bt', got 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(case: str):
    changes, error, message = REFUSED[case]
    arguments = {"method": "dpo_bt", "variant": "dora", **make_inputs(2, 2), **changes}
    with pytest.raises(error, match=message):
        official.loss(**arguments)
