"""What the operators say to calls that cannot work: the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robust_dpo import (
    DrDPO,
    KLRobust,
    linear_preference_loss,
    official,
    preference_loss,
    sequence_logps,
    sequence_logps_from_logits,
)
from robust_dpo.calibration import density_ratio
from robust_dpo.robust import from_mode

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan


def head(**changes: Any) -> Any:
    """linear_preference_loss on a good call, but for the changes: 4 responses, 6 tokens, V = 7, H = 5."""
    arguments: dict[str, Any] = {
        "hidden": torch.randn(4, 6, 5),
        "weight": torch.randn(7, 5),
        "targets": torch.zeros(4, 6, dtype=torch.int64),
        "ref_logps": torch.zeros(4),
    } | changes
    return linear_preference_loss(**arguments)


def packed(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(9, 5),
        "targets": torch.zeros(9, dtype=torch.int64),
        "seq_lens": torch.tensor([2, 3, 0, 4]),
    } | changes
    return head(**arguments)


def live(**changes: Any) -> Any:
    arguments = {"ref_logps": None, "ref_hidden": torch.randn(4, 6, 3), "ref_weight": torch.randn(7, 3)} | changes
    return head(**arguments)


def logps(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"hidden": torch.randn(2, 3, 5), "weight": torch.randn(7, 5), "targets": targets(2, 3)}
    return sequence_logps(**(arguments | changes))


def logits(**changes: Any) -> Any:
    return sequence_logps_from_logits(**({"logits": torch.randn(2, 3, 7), "targets": targets(2, 3)} | changes))


def vectors(**changes: Any) -> Any:
    return preference_loss(**({"logps": torch.zeros(4), "ref_logps": torch.zeros(4)} | changes))


def dora(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "method": "dpo_bt",
        "variant": "dora",
        "token_logps": torch.zeros(4, 3),
        "ref_token_logps": torch.zeros(4, 3),
        "mask": torch.ones(4, 3),
        "scores": torch.zeros(2, 2),
        "probs": torch.full((2, 2), 0.5),
    }
    return official.loss(**(arguments | changes))


def targets(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.full(shape, value, dtype=dtype)


GOOD: list[Callable[..., Any]] = [head, packed, live, logps, logits, vectors, dora]

# (call, changes, kind of error, what the message must say)
BAD: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    # tensors of the wrong type, shape or place
    (head, {"hidden": [[1.0]]}, TypeError, r"^hidden: expected a floating tensor, got list"),
    (
        head,
        {"hidden": torch.zeros(4, 6, 5, dtype=torch.int64)},
        ValueError,
        r"^hidden: expected dtype float32.*int64",
    ),
    (head, {"hidden": torch.zeros(5)}, ValueError, r"^hidden: expected shape \[B, T, H\] or \[N, H\], got \[5\]"),
    (head, {"weight": None}, TypeError, r"^weight: expected a floating tensor, got NoneType"),
    (head, {"weight": torch.zeros(7, 4)}, ValueError, r"^weight: expected shape \[V, 5\], got \[7, 4\]"),
    (head, {"weight": torch.zeros(0, 5)}, ValueError, r"^weight: expected shape \[V, 5\], got \[0, 5\]"),
    (head, {"weight": torch.zeros(7, 5).bfloat16()}, ValueError, r"^weight: expected dtype torch.float32, .*bfloat16"),
    (head, {"weight": torch.zeros(7, 5, device="meta")}, ValueError, r"^weight: expected a tensor on cpu, .*got meta"),
    (head, {"bias": torch.zeros(6)}, ValueError, r"^bias: expected shape \[7\], one value per token, got \[6\]"),
    (head, {"bias": targets(7)}, ValueError, r"^bias: expected dtype float32, .*got torch.int64"),
    (head, {"bias": torch.zeros(7, device="meta")}, ValueError, r"^bias: expected a tensor on cpu, got meta"),
    (head, {"targets": torch.zeros(4, 6)}, ValueError, r"^targets: expected dtype int64 or int32, got torch.float32"),
    (head, {"targets": targets(4, 5)}, ValueError, r"^targets: expected shape \[4, 6\], the leading.*got \[4, 5\]"),
    (head, {"targets": targets(4, 6, value=7)}, ValueError, r"^targets: expected -100 or a token in \[0, 7\), got 7"),
    (head, {"targets": targets(4, 6, value=-1)}, ValueError, r"^targets: expected -100 or a token.*got -1"),
    (head, {"targets": targets(4, 6).to("meta")}, ValueError, r"^targets: expected a tensor on cpu, got meta"),
    (head, {"targets": None}, TypeError, r"^targets: expected an integer tensor, got NoneType"),
    # packed responses
    (packed, {"seq_lens": None}, ValueError, r"^seq_lens: expected the lengths \[S\] .*got None"),
    (packed, {"seq_lens": torch.tensor([2, 3, 0, 5])}, ValueError, r"^seq_lens: expected a sum of 9.*got 10"),
    (
        packed,
        {"seq_lens": torch.tensor([5, 5, -1, 0])},
        ValueError,
        r"^seq_lens: expected lengths of at.*got -1",
    ),
    (packed, {"seq_lens": torch.tensor([2, 3, 1])}, ValueError, r"^seq_lens: expected a sum of 9.*got 6"),
    (packed, {"targets": targets(3, 3)}, ValueError, r"^targets: expected shape \[9\], .*or \[N\] packed\), got"),
    (packed, {"seq_lens": torch.tensor([[9]])}, ValueError, r"^seq_lens: expected shape \[S\], got \[1, 1\]"),
    (packed, {"seq_lens": torch.tensor([9.0])}, ValueError, r"^seq_lens: expected dtype int64 or int32, got"),
    (packed, {"seq_lens": targets(4).to("meta")}, ValueError, r"^seq_lens: expected a tensor on cpu, got meta"),
    (packed, {"seq_lens": [2, 3, 0, 4]}, TypeError, r"^seq_lens: expected an integer tensor, got list"),
    (head, {"seq_lens": torch.tensor([6, 6, 6, 6])}, ValueError, r"^seq_lens: expected None beside hidden with a row"),
    # groups
    (head, {"group_size": 3}, ValueError, r"^group_size: expected a divisor of the 4 responses, got 3"),
    (head, {"group_size": 0}, ValueError, r"^group_size: expected a divisor of the 4 responses, got 0"),
    (head, {"group_size": 2.0}, TypeError, r"^group_size: expected a whole number, got float"),
    (head, {"group_size": True}, TypeError, r"^group_size: expected a whole number, got bool"),
    (head, {"group_sizes": torch.tensor([2, 3])}, ValueError, r"^group_sizes: expected a sum of 4.*got 5"),
    (
        head,
        {"group_sizes": torch.tensor([4, 0])},
        ValueError,
        r"^group_sizes: expected at least one.*\[4, 0\]",
    ),
    (head, {"group_sizes": torch.tensor([2.0, 2.0])}, ValueError, r"^group_sizes: expected dtype int64 or int32, got"),
    (head, {"group_sizes": [2, 2]}, TypeError, r"^group_sizes: expected an integer tensor, got list"),
    (head, {"group_sizes": targets(2).to("meta")}, ValueError, r"^group_sizes: expected a tensor on cpu, got meta"),
    (head, {"group_sizes": targets(0)}, ValueError, r"^group_sizes: expected shape \[G\] with at least one group"),
    (
        head,
        {"hidden": torch.zeros(0, 6, 5), "targets": targets(0, 6), "ref_logps": None},
        ValueError,
        r"^group_size: expected at least one group, got no responses",
    ),
    # the reference
    (head, {"ref_logps": None}, ValueError, r"^ref_logps: expected a reference, which the loss 'sigmoid' needs"),
    (
        head,
        {"ref_logps": torch.zeros(3)},
        ValueError,
        r"^ref_logps: expected shape \[4\], one.*\[3\]",
    ),
    (head, {"ref_logps": torch.tensor([0, NAN, 0, 0])}, ValueError, r"^ref_logps: expected finite values, got"),
    (head, {"ref_logps": [0.0] * 4}, TypeError, r"^ref_logps: expected a floating tensor, got list"),
    (head, {"ref_hidden": torch.zeros(4, 6, 3)}, ValueError, r"^ref_logps: expected None beside ref_hidden"),
    (head, {"ref_bias": torch.zeros(7)}, ValueError, r"^ref_bias: expected None without ref_hidden"),
    (live, {"ref_hidden": None}, ValueError, r"^ref_hidden: expected a tensor beside ref_weight, got None"),
    (live, {"ref_weight": None}, ValueError, r"^ref_weight: expected a tensor beside ref_hidden, got None"),
    (live, {"ref_weight": torch.zeros(8, 3)}, ValueError, r"^ref_weight: expected a vocabulary of 7, got 8"),
    (live, {"ref_weight": torch.zeros(7, 2)}, ValueError, r"^ref_weight: expected shape \[V, 3\], got \[7, 2\]"),
    (live, {"ref_hidden": torch.zeros(4, 5, 3)}, ValueError, r"^ref_hidden: expected the leading dimensions \[4, 6\]"),
    (live, {"ref_bias": torch.zeros(3)}, ValueError, r"^ref_bias: expected shape \[7\], .*got \[3\]"),
    # the loss and its options
    (head, {"loss": "dpo"}, ValueError, r"^loss: expected one of .*sigmoid.*got 'dpo'"),
    (head, {"loss": 3}, TypeError, r"^loss: expected a name or a function Groups -> \[G\], got int"),
    (head, {"loss": "lire"}, ValueError, r"^scores: expected scores of the responses, which the loss 'lire' needs"),
    (
        head,
        {"smoothing": 0.1},
        TypeError,
        r"options of loss 'sigmoid': expected none, got smoothing \(.*argument either\)",
    ),
    (head, {"logit_softcap": 30.0}, TypeError, r"linear_preference_loss has no such .*; did you mean .*softcap\?"),
    (head, {"chunk_rows": 0}, TypeError, r"got chunk_rows .*; did you mean chunk_bytes\?"),
    (head, {"loss": "cdpo", "smoothing": 0.1}, TypeError, r"expected one of label_.*did you mean label_smoothing\?"),
    (vectors, {"backend": "torch"}, TypeError, r"got backend \(preference_loss has no such argument either\)$"),
    (head, {"loss": "cdpo", "label_smoothing": 0.6}, ValueError, r"^label_smoothing: expected a number in .*got 0.6"),
    (head, {"loss": "ipo", "length_normalize": 1}, TypeError, r"^length_normalize: expected True or False, got int"),
    (
        head,
        {"loss": "aot", "label_smoothing": 0.6},
        ValueError,
        r"^label_smoothing: expected a number in \[0, 0.5\], got",
    ),
    (vectors, {"loss": "aot", "ref_logps": None}, ValueError, r"^ref_logps: expected a reference, .*'aot' needs"),
    (head, {"beta": 0.0}, ValueError, r"^beta: expected a number in \(0, inf\), got 0.0"),
    (head, {"beta": NAN}, ValueError, r"^beta: expected a number in \(0, inf\), got nan"),
    (head, {"beta": "0.1"}, TypeError, r"^beta: expected a number in \(0, inf\), got str"),
    (head, {"scores": torch.tensor([0, 1, NAN, 2])}, ValueError, r"^scores: expected finite values, got"),
    (head, {"scores": torch.zeros(2)}, ValueError, r"^scores: expected shape \[4\], one value per response, got \[2\]"),
    # aggregation and calibration
    (head, {"robust": "worst"}, ValueError, r"^robust: expected one of .*kl_radius.*got 'worst'"),
    (head, {"robust": 1.0}, TypeError, r"^robust: expected a name or a RobustObjective, got float"),
    (head, {"calibration": torch.tensor([1, -0.5])}, ValueError, r"^calibration: expected finite values of at least 0"),
    (head, {"calibration": torch.tensor([1, NAN])}, ValueError, r"^calibration: expected finite.*got \[1.0, nan\]"),
    (
        head,
        {"calibration": torch.ones(3)},
        ValueError,
        r"^calibration: expected shape \[2\] or \[4\], per",
    ),
    (head, {"calibration": 1.0}, TypeError, r"^calibration: expected a floating tensor, got float"),
    (head, {"log_normalizer": torch.zeros(2)}, ValueError, r"^log_normalizer: expected a scalar tensor, got"),
    (head, {"log_normalizer": 1}, TypeError, r"^log_normalizer: expected a floating tensor, got int"),
    (
        head,
        {"log_normalizer": torch.tensor(0.0), "robust": "kl_radius"},
        ValueError,
        r"^log_normalizer: expected None: KLRobust\(.*couples the groups by more than one",
    ),
    (
        head,
        {"log_normalizer": torch.tensor(0.0), "loss": "aot"},
        ValueError,
        r"^log_normalizer: .*'aot' couples the gr",
    ),
    (vectors, {"log_normalizer": torch.tensor(0.0), "loss": "aot_unpaired"}, ValueError, r"^log_norm.*'aot_unpaired'"),
    # the head
    (head, {"softcap": 0.0}, ValueError, r"^softcap: expected a number in \(0, inf\), got 0.0"),
    (head, {"softcap": "30"}, TypeError, r"^softcap: expected a number in \(0, inf\), got str"),
    (head, {"logit_scale": math.inf}, ValueError, r"^logit_scale: expected a number in .*got inf"),
    (head, {"backend": "cudnn"}, ValueError, r"^backend: expected one of auto, .*torch.*got 'cudnn'"),
    (head, {"backend": None}, TypeError, r"^backend: expected the name of a backend, or 'auto', got NoneType"),
    (head, {"backend": "cuda"}, RuntimeError, r"backend 'cuda' cannot run row_logprob .*it is not (built|usable) here"),
    (head, {"tile_dtype": torch.bfloat16}, ValueError, r"^tile_dtype: expected None or torch.float32 for .*bfloat16"),
    (head, {"tile_dtype": "float32"}, TypeError, r"^tile_dtype: expected a torch.dtype such as .*or None, got str"),
    (head, {"chunk_bytes": 0}, ValueError, r"^chunk_bytes: expected a number in \[1, inf\), got 0"),
    (head, {"chunk_bytes": "1G"}, TypeError, r"^chunk_bytes: expected a number in \[1, inf\), got str"),
    # the other operators
    (logps, {"targets": targets(2, 3, value=7)}, ValueError, r"^targets: expected -100 or a token in \[0, 7\), got 7"),
    (logps, {"weight": torch.zeros(7, 5).double()}, ValueError, r"^weight: expected dtype torch.float32, as hidden"),
    (logps, {"softcap": -1.0}, ValueError, r"^softcap: expected a number in \(0, inf\), got -1.0"),
    (logps, {"backend": 1}, TypeError, r"^backend: expected the name of a backend, or 'auto', got int"),
    (logps, {"tile_dtype": torch.float64}, ValueError, r"^tile_dtype: expected None or .*got torch.float64"),
    (
        logps,
        {
            "tile_dtype": torch.float16,
            "hidden": torch.randn(2, 3, 5).bfloat16(),
            "weight": torch.randn(7, 5).bfloat16(),
        },
        ValueError,
        r"^tile_dtype: expected None or torch.bfloat16 or torch.float32 for .*, got torch.float16",
    ),
    (logits, {"logits": targets(2, 3, 7)}, ValueError, r"^logits: expected dtype float32, .*got torch.int64"),
    (logits, {"logits": torch.zeros(7)}, ValueError, r"^logits: expected shape \[B, T, V\] or \[N, V\] .*got \[7\]"),
    (logits, {"logits": torch.zeros(2, 3, 0)}, ValueError, r"^logits: expected shape .*V > 0, got \[2, 3, 0\]"),
    (logits, {"targets": targets(3, 2)}, ValueError, r"^targets: expected shape \[2, 3\], .*of logits, got \[3, 2\]"),
    (logits, {"logit_scale": NAN}, ValueError, r"^logit_scale: expected a number in .*got nan"),
    (vectors, {"logps": [0.0] * 4}, TypeError, r"^logps: expected a floating tensor, got list"),
    (vectors, {"logps": torch.zeros(2, 2)}, ValueError, r"^logps: expected shape \[S\], got \[2, 2\]"),
    (vectors, {"ref_logps": torch.zeros(2)}, ValueError, r"^ref_logps: expected shape \[4\], .*got \[2\]"),
    (vectors, {"lengths": torch.ones(3)}, ValueError, r"^lengths: expected shape \[4\], one value per .*got \[3\]"),
    (vectors, {"lengths": [1] * 4}, TypeError, r"^lengths: expected a tensor of integers or floats, got list"),
    (vectors, {"lengths": torch.ones(4, device="meta")}, ValueError, r"^lengths: expected a tensor on cpu, got meta"),
    (vectors, {"calibration": torch.tensor([-1.0, 1.0])}, ValueError, r"^calibration: expected finite values of at"),
    (vectors, {"logps": torch.zeros(0), "ref_logps": None}, ValueError, r"^group_size: expected at least one group"),
    # objectives, calibration and the authors' values
    (KLRobust, {"lam": 1.0, "radius": 0.1}, ValueError, r"^radius: expected no radius beside lam"),
    (KLRobust, {"lam": 0.0}, ValueError, r"^lam: expected a number in \(0, inf\), got 0.0"),
    (KLRobust, {"radius": -0.1}, ValueError, r"^radius: expected a number in \[0, inf\), got -0.1"),
    (KLRobust, {"calibration": "both"}, ValueError, r"^calibration: expected 'inside' or 'outside', got 'both'"),
    (DrDPO, {"beta": NAN}, ValueError, r"^beta: expected a number in \(0, inf\), got nan"),
    (from_mode, {"mode": "dro2"}, ValueError, r"^mode: expected one of erm, reweight, dro, .*got 'dro2'"),
    (density_ratio, {"probs": [0.5]}, TypeError, r"^probs: expected a floating tensor of probabilities, got list"),
    (density_ratio, {"probs": targets(2)}, TypeError, r"^probs: expected a floating tensor .*got torch.int64"),
    (density_ratio, {"probs": torch.rand(2), "backend": 1}, TypeError, r"^backend: expected the name .*got int"),
    (density_ratio, {"probs": torch.tensor([1.5])}, ValueError, r"^probs: expected probabilities in \[0, 1\] at .*1.5"),
    (density_ratio, {"probs": torch.rand(2), "form": "exact"}, ValueError, r"^form: expected one of paper.*'exact'"),
    (density_ratio, {"probs": torch.rand(2), "form": "official"}, ValueError, r"^probs: expected shape \[..., K\], or"),
    (dora, {"method": "dpo"}, ValueError, r"^method: expected one of rrhf, .*got 'dpo'"),
    (dora, {"variant": "erm"}, ValueError, r"^variant: expected one of plain, dora, got 'erm'"),
    (dora, {"ref_token_logps": None}, ValueError, r"^ref_token_logps: expected a tensor for the method 'dpo_bt'"),
    (dora, {"token_logps": torch.zeros(3, 3)}, ValueError, r"^token_logps: expected shape \[4, L\], .*got \[3, 3\]"),
    (
        dora,
        {"mask": torch.zeros(4, 3)},
        ValueError,
        r"^mask: expected at least one token.*none in row 0",
    ),
    (dora, {"scores": torch.tensor([[0, NAN], [0, 0]])}, ValueError, r"^scores: expected finite values at .*nan"),
    (dora, {"lambda_": 0.0}, ValueError, r"^lambda_: expected a number in \(0, inf\), got 0.0"),
]


@pytest.mark.parametrize("call", GOOD)
def test_the_unchanged_calls_work(call: Callable[..., Any]) -> None:
    call()


@pytest.mark.parametrize(
    ("call", "changes", "kind", "message"),
    BAD,
    ids=[f"{call.__name__}-{'-'.join(changes)}-{i}" for i, (call, changes, _, _) in enumerate(BAD)],
)
def test_bad_calls(call: Callable[..., Any], changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(**changes)


def test_the_count_of_bad_calls() -> None:
    assert len({message for *_, message in BAD}) >= 80


def test_mixed_dtypes_are_for_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert head(weight=torch.randn(7, 5).bfloat16()).loss.dtype == torch.float32
