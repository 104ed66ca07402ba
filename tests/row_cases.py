"""Inputs of row_logprob with plain formulas of them, and the error that a launcher may make."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_dpo.kernels.row_logprob import RowLogprob, RowLogprobLauncher

TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.37},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"logit_scale": -1.3, "bias": True, "softcap": 30.0},
}


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@dataclass(frozen=True)
class Case:
    """Inputs, and plain formulas of them evaluated in a given precision."""

    logits: Tensor
    targets: Tensor
    row_scale: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, object]:
        return {
            "bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "row_scale": self.row_scale,
        }  # fmt: skip

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logp, lse, entropy, gradient."""
        z = self.logits.to(dtype, copy=True).requires_grad_()
        values = z if self.bias is None else z + self.bias.to(dtype)
        values = values * self.logit_scale
        if self.softcap is not None:
            values = self.softcap * torch.tanh(values / self.softcap)
        log_probs = values.log_softmax(1)
        logp = log_probs.gather(1, self.targets[:, None])[:, 0]
        # logp's gradient is onehot - softmax; the kernel writes that of -logp.
        (gradient,) = torch.autograd.grad(-(logp * self.row_scale.to(dtype)).sum(), z)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        return logp.detach(), values.logsumexp(1).detach(), entropy.detach(), gradient


def make_case(dtype: torch.dtype, rows: int, vocab: int, transform: str = "plain", spread: float = 3.0) -> Case:
    options = dict(TRANSFORMS[transform])
    return Case(
        (torch.randn(rows, vocab, dtype=torch.float64) * spread).to(dtype),
        torch.randint(0, vocab, (rows,)),
        torch.randn(rows),
        torch.randn(vocab) if options.pop("bias", False) else None,
        options.get("softcap"),  # type: ignore[arg-type]  # a table of mixed options
        options.get("logit_scale", 1.0),  # type: ignore[arg-type]
    )


@functools.lru_cache(maxsize=512)
def solved(dtype: torch.dtype, rows: int, vocab: int, transform: str) -> tuple[Case, tuple[Tensor, ...], list[float]]:
    """A case, its float64 solution and the errors of PyTorch in the kernel's precision; shared by the launchers."""
    case = make_case(dtype, rows, vocab, transform)
    truth = case.plain(torch.float64)
    plain = case.plain(torch.float64 if dtype == torch.float64 else torch.float32)
    plain = (*plain[:3], plain[3].to(dtype))
    return case, truth, [error(ours, exact) for ours, exact in zip(plain, truth, strict=True)]


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest absolute error; NaN counts as infinite."""
    if ours.numel() == 0:
        return 0.0
    return float((ours.double() - exact).abs().nan_to_num(nan=float("inf")).max())


def poisoned(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full_like(case.logits, float("nan"), dtype=dtype or case.logits.dtype)


def run(launcher: RowLogprobLauncher, case: Case, grad: Tensor | None, entropy: bool = True) -> RowLogprob:
    return launcher(case.logits, case.targets, grad_out=grad, entropy=entropy, **case.options())  # type: ignore[arg-type]


def check_errors(launcher: RowLogprobLauncher, dtype: torch.dtype, rows: int, vocab: int, transform: str) -> None:
    """Errors of results and gradient stay within twice those of PyTorch."""
    case, truth, budget = solved(dtype, rows, vocab, transform)
    grad = poisoned(case)
    assert_within_budget(run(launcher, case, grad), grad, truth, budget)


def assert_within_budget(result: RowLogprob, grad: Tensor, truth: tuple[Tensor, ...], budget: list[float]) -> None:
    assert result.entropy is not None
    precision = torch.float64 if grad.dtype == torch.float64 else torch.float32
    # Logits of this size are rounded before anything is made of them; PyTorch may have been lucky with the largest.
    magnitude = max(1.0, float(truth[1].abs().max()) if truth[1].numel() else 0.0)
    for name, ours, exact, allowed in zip(
        ("logp", "lse", "entropy", "grad"), (*result, grad), truth, budget, strict=True
    ):
        if name != "grad":
            assert ours.dtype == precision
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        # What PyTorch may lose in the last rounding, not what it happened to lose here (rounding to bf16 in Triton's
        # interpreter is off by up to a unit).
        allowed = max(allowed, torch.finfo(ours.dtype).eps / 2 * largest)
        # In float64 the truth has rounding errors of the same size, which grow with the vocabulary.
        units = 4096 if precision == torch.float64 else 4
        tiny = units * torch.finfo(precision).eps * max(magnitude, largest)
        assert error(ours, exact) <= 2 * allowed + tiny, name


def triton_launchers() -> dict[str, RowLogprobLauncher]:
    """Triton's launcher, with one program for a row and with five: on a GPU where there is one, else interpreted."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from robust_dpo.kernels.row_launch import LaunchShape
    from robust_dpo.kernels.row_logprob_triton import row_logprob

    shapes = {"triton-row": LaunchShape(256), "triton-split": LaunchShape(256, 5)}
    launchers: dict[str, RowLogprobLauncher] = {
        name: functools.partial(row_logprob, shape=shape) for name, shape in shapes.items()
    }
    if torch.cuda.is_available():
        return {name: functools.partial(through_gpu, launcher) for name, launcher in launchers.items()}
    return launchers


def through_gpu(launcher: RowLogprobLauncher, *arguments: Tensor, **options: Any) -> RowLogprob:
    """A call with CPU tensors, run on the GPU; views keep their memory layout there, also where they overlap."""
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def to_gpu(value: Any) -> Any:
        if isinstance(value, RowLogprob):
            return RowLogprob(*map(to_gpu, value))
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        _, copy = storages.setdefault(storage.data_ptr(), (storage, storage.cuda()))
        empty = torch.empty(0, dtype=value.dtype, device="cuda")
        return empty.set_(copy, value.storage_offset(), value.shape, value.stride())

    moved = {name: to_gpu(value) for name, value in options.items()}
    result = launcher(*map(to_gpu, arguments), **moved)
    for storage, copy in storages.values():
        storage.copy_(copy)
    if options.get("known") is not None:
        assert result is moved["known"]
        return options["known"]
    return RowLogprob(*(None if value is None else value.cpu() for value in result))
