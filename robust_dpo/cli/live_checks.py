"""Does a backend compute the right numbers here? Each operator solves one tiny problem, beside float64.

Every backend is asked in a process of its own: one that crashes, hangs or cannot be imported is then a line of
`robust-dpo doctor`, and not its end.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from robust_dpo import linear_preference_loss, losses, reference
from robust_dpo.calibration.density_ratio import Form, density_ratio
from robust_dpo.dispatch import (
    CALIBRATION_WEIGHTS,
    ROW_LOGPROB,
    choose_backend,
    get_group_epilogue,
    get_row_logprob,
    has_fused_head,
)
from robust_dpo.groups import GroupLayout
from robust_dpo.kernels.group_epilogue import EpilogueVectors, NativeLoss
from robust_dpo.robust import KLRobust

# Every check sums at most a few hundred fp32 numbers of size 1 to 30; a wrong kernel is off by far more.
TOLERANCE = 1e-4
# Kernels that are compiled when first used take seconds; nothing here takes minutes.
_TIME_LIMIT = 300.0
_VOCAB, _HIDDEN, _LENGTHS = 131, 16, (3, 5, 4, 6)


@dataclass(frozen=True)
class Health:
    """What became of the checks of one backend.

    Args:
        backend: its name.
        device: where it ran.
        errors: operator -> largest error against float64, relative to the largest value. Operators that the backend
            has no code for are left out: there, plain PyTorch stands in.
        fused: whether the head is one kernel, not matrix products by torch around row_logprob.
        failure: why there are no errors to show, or None.
    """

    backend: str
    device: str
    errors: dict[str, float]
    fused: bool = False
    failure: str | None = None

    @property
    def sound(self) -> bool:
        """Whether everything ran, and to the right numbers."""
        return self.failure is None and all(error <= TOLERANCE for error in self.errors.values())


def ask(names: Iterable[str]) -> dict[str, Health]:
    """The health of each backend; they are asked at the same time."""
    # First on the path, before the current directory: a source tree there is not the package that this one reports on.
    package = str(Path(__file__).resolve().parents[2])
    setup = f"import sys; sys.path.insert(0, {package!r}); from robust_dpo.cli.live_checks import answer"
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"{setup}; answer({name!r})"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    return {name: _outcome(name, process) for name, process in running.items()}


def answer(name: str) -> None:
    """What the asked process prints."""
    print(json.dumps(asdict(check_backend(name))))


def check_backend(name: str) -> Health:
    """Run every check on a backend, on the best device that it takes.

    Raises:
        RuntimeError: the backend cannot run here.
    """
    device = _device_of(name)
    found = {operator: check(name, device) for operator, check in CHECKS.items()}
    errors = {operator: error for operator, error in found.items() if error is not None}
    return Health(name, str(device), errors, has_fused_head(name, device, torch.float32))


def _outcome(name: str, process: subprocess.Popen[str]) -> Health:
    try:
        output, complaint = process.communicate(timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Health(name, "", {}, failure=f"no answer within {_TIME_LIMIT:.0f} s")
    if process.returncode < 0:
        return Health(name, "", {}, failure=f"killed by {signal.Signals(-process.returncode).name}")
    if process.returncode:
        return Health(name, "", {}, failure=complaint.strip().splitlines()[-1])
    return Health(**json.loads(output.splitlines()[-1]))


def _device_of(name: str) -> torch.device:
    """The first of GPU and CPU that a backend takes."""
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    for device in devices:
        try:
            choose_backend(ROW_LOGPROB, name, device, torch.float32)
        except RuntimeError:
            continue
        return device
    choose_backend(ROW_LOGPROB, name, "cpu", torch.float32)
    return torch.device("cpu")


def _error(found: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest value; NaN counts as infinitely wrong."""
    difference = (found.detach().cpu().double() - exact.detach()).abs().nan_to_num(nan=torch.inf).max()
    return float(difference / exact.detach().abs().max())


def _random(*shape: int, seed: int) -> Tensor:
    """fp32, normal, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _targets(rows: int) -> Tensor:
    return torch.arange(rows) * 37 % _VOCAB


def _check_row_logprob(name: str, device: torch.device) -> float:
    targets = _targets(sum(_LENGTHS))
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = (8 * _random(len(targets), _VOCAB, seed=0)).to(dtype)
        tile = logits.to(device, copy=True)
        in_place = tile if dtype == torch.float32 else None  # in bf16 its rounding is all that there would be to see
        result = get_row_logprob(name, device, dtype)(tile, targets.to(device), grad_out=in_place)
        logp, lse, _ = reference.row_logprob(logits.double(), targets)
        errors += [_error(result.logp, logp), _error(result.lse, lse)]
        if in_place is not None:
            errors.append(_error(in_place, reference.row_gradient(logits.double(), targets)))
    return max(errors)


def _check_group_epilogue(name: str, device: torch.device) -> float | None:
    loss, responses = losses.resolve("sigmoid", 0.1, {}), len(_LENGTHS)
    launcher = get_group_epilogue(name, device, torch.float32, loss, 2)
    if launcher is None:
        return None
    lengths, calibration = torch.tensor(_LENGTHS), torch.tensor([0.5, 1.5])
    token_logps, ref_logps = _random(sum(_LENGTHS), seed=1), _random(responses, seed=2)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def empty(size: int) -> Tensor:
        return torch.full((size,), torch.nan, device=device)

    vectors = EpilogueVectors(
        token_logps=token_logps.to(device),
        ref_token_logps=None,
        counted=None,
        seq_offsets=offsets.to(device),
        group_offsets=torch.tensor([0, 2, 4], device=device),
        lengths=lengths.float().to(device),
        scores=None,
        calibration=calibration.to(device),
        logps=empty(responses),
        ref_logps=ref_logps.to(device),
        losses=empty(2),
        derivative=empty(responses),
        coefficients=empty(sum(_LENGTHS)),
        state=torch.tensor([-torch.inf, 0.0, 1.0], dtype=torch.float64, device=device),
        widest=2,
    )
    launcher(vectors, NativeLoss(loss.name, dict(loss.arguments)), 1.0, 0, 2)
    logps = torch.stack([part.sum() for part in token_logps.double().split(_LENGTHS)]).requires_grad_()
    layout = GroupLayout.build(responses, 2, None, torch.device("cpu"))
    values = reference.group_epilogue(logps, ref_logps.double(), lengths, layout, loss)
    (derivative,) = torch.autograd.grad(values.sum(), logps)
    scores = calibration * values
    weights = (scores - scores.max()).exp() * calibration
    coefficients = (-weights.repeat_interleave(2) * derivative).repeat_interleave(lengths)
    exact = {"logps": logps, "losses": values, "derivative": derivative, "coefficients": coefficients}
    return max(_error(getattr(vectors, field), value) for field, value in exact.items())


def _check_calibration_weights(name: str, device: torch.device) -> float | None:
    try:
        choose_backend(CALIBRATION_WEIGHTS, name, device, torch.float32)
    except RuntimeError:  # the backend has none
        return None
    probs = torch.linspace(0.02, 0.98, 8)
    errors = []
    for form in get_args(Form):
        # Two responses per group: the authors' shares for them are one half each.
        found = density_ratio(probs.to(device), form, group_size=2 if form == "official" else None, backend=name)
        errors.append(_error(found, reference.calibration_weights(probs.double(), form)))
    return max(errors)


def _check_head(name: str, device: torch.device) -> float:
    hidden, weight = _random(sum(_LENGTHS), _HIDDEN, seed=3), _random(_VOCAB, _HIDDEN, seed=4)
    targets, lengths = _targets(sum(_LENGTHS)), torch.tensor(_LENGTHS)
    ref_logps, calibration = -5 * lengths.float(), torch.tensor([0.5, 1.5])
    ours = [each.to(device, copy=True).requires_grad_() for each in (hidden, weight)]
    result = linear_preference_loss(
        ours[0],
        ours[1],
        targets.to(device),
        seq_lens=lengths,
        ref_logps=ref_logps.to(device),
        calibration=calibration.to(device),
        robust=KLRobust(lam=1.0),
        backend=name,
    )
    right = [each.double().requires_grad_() for each in (hidden, weight)]
    exact = reference.linear_preference_loss(
        right[0],
        right[1],
        targets,
        seq_lens=lengths,
        ref_logps=ref_logps.double(),
        calibration=calibration.double(),
        robust=KLRobust(lam=1.0),
    )
    gradients = zip(torch.autograd.grad(result.loss, ours), torch.autograd.grad(exact, right), strict=True)
    return max(_error(result.loss, exact), *(_error(found, gradient) for found, gradient in gradients))


HEAD = "LM head + loss"
CHECKS: dict[str, Callable[[str, torch.device], float | None]] = {
    "row_logprob": _check_row_logprob,
    "group_epilogue": _check_group_epilogue,
    "calibration_weights": _check_calibration_weights,
    HEAD: _check_head,
}
