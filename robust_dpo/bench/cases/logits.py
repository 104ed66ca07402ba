"""Sequence log-probs from logits that are already there: bound by memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.bench.cases.base import GRADIENT_LIMIT, KERNEL_LIMIT, Case, copy_floor, dtype_name
from robust_dpo.bench.cases.row_kernel import ExactRows, make_tile
from robust_dpo.bench.compare import Candidate, Opened, compare
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.solution import relative_error
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench

# (logits [S, T, V], targets [S, T]) -> logps [S], differentiable in the logits.
LogpsFromLogits = Callable[[Tensor, Tensor], Tensor]


def ours() -> LogpsFromLogits:
    """robust_dpo.sequence_logps_from_logits."""
    from robust_dpo import sequence_logps_from_logits

    def logps(logits: Tensor, targets: Tensor) -> Tensor:
        found = sequence_logps_from_logits(logits, targets)
        assert isinstance(found, Tensor)
        return found

    return logps


def _eager(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(1)


def plain() -> LogpsFromLogits:
    """fp32 log-softmax, gather, sum."""
    return _eager


def plain_compiled() -> LogpsFromLogits:
    """The same under torch.compile."""
    return torch.compile(_eager)


def trl() -> LogpsFromLogits:
    """TRL's selective_log_softmax, a Triton kernel on a GPU."""
    from trl.trainer.utils import selective_log_softmax

    def logps(logits: Tensor, targets: Tensor) -> Tensor:
        token_logps: Tensor = selective_log_softmax(logits, targets)
        return token_logps.sum(1)

    return logps


def liger() -> LogpsFromLogits:
    """Liger's cross-entropy kernel per token; it leaves the gradient in the logits."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    nll = LigerCrossEntropyLoss(reduction="none")

    def logps(logits: Tensor, targets: Tensor) -> Tensor:
        values: Tensor = nll(logits.flatten(0, 1), targets.flatten())
        return -values.view(targets.shape).sum(1)

    return logps


@dataclass(frozen=True)
class LogitsPeer:
    """One way to do it: its module, whether it needs a GPU, and whether the logits are other numbers afterwards."""

    make: Callable[[], LogpsFromLogits]
    package: str = "torch"
    gpu_only: bool = False
    compiles: bool = False
    overwrites: bool = False
    role: Role = Role.PEER


PEERS: dict[str, LogitsPeer] = {
    "ours": LogitsPeer(ours, "robust_dpo", role=Role.OURS),
    "plain": LogitsPeer(plain),
    "plain_compiled": LogitsPeer(plain_compiled, compiles=True),
    "trl": LogitsPeer(trl, "trl"),
    "liger": LogitsPeer(liger, "liger_kernel", gpu_only=True, overwrites=True),
}


@dataclass(frozen=True)
class LogitsCase(Case):
    """Logits of some sequences.

    Args:
        rows: of logits, in sequences of `tokens`.
        vocab: V.
        tokens: of a sequence.
        dtype: of the logits.
        backward: with the gradient of the logits.
        compiled: also under torch.compile.
    """

    rows: int
    vocab: int
    tokens: int = 512
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        what = "backward" if self.backward else "forward"
        compiled = " compiled" if self.compiled else ""
        return f"logits {self.rows}x{self.vocab} T={self.tokens} {dtype_name(self.dtype)} {what}{compiled}"

    @property
    def group(self) -> str:
        return "logits"

    @property
    def title(self) -> str:
        what = "forward and backward" if self.backward else "forward"
        return f"Logits route, {self.rows} x {self.vocab}, {dtype_name(self.dtype)}: {what}"

    @property
    def traffic(self) -> int:
        """Bytes: forward reads the logits; backward reads them again and writes the gradient."""
        return self.rows * self.vocab * self.dtype.itemsize * (3 if self.backward else 1)

    @property
    def cost(self) -> float:
        return self.traffic * (3 if self.compiled else 1)

    def wants(self, bench: Workbench) -> list[str]:
        return list(self._wanted(bench))

    def _wanted(self, bench: Workbench) -> dict[str, LogitsPeer]:
        """Peers of the packages that were asked for."""
        packages = {each.package for each in bench.implementations} | {"robust_dpo"}
        return {
            name: peer
            for name, peer in PEERS.items()
            if peer.package in packages
            and (bench.device.type == "cuda" or not peer.gpu_only)
            and (self.compiled or not peer.compiles)
        }

    def measure(self, bench: Workbench) -> Record:
        tile, targets = make_tile(self.rows, self.vocab, self.dtype, bench.device, bench.seed)
        exact = ExactRows.of(tile, targets)
        sequences = self.rows // self.tokens
        logits = tile.view(sequences, self.tokens, self.vocab)
        targets = targets.view(sequences, self.tokens)
        floor = copy_floor(self.traffic, tile, torch.empty_like(tile))
        rows = [self._candidate(name, peer, logits, targets, exact) for name, peer in self._wanted(bench).items()]
        candidates = [floor, *rows]
        complete = compare(candidates, bench, self.name, rounds=2 * bench.rounds, warmups=3)
        return Record(
            self.name,
            self.group,
            self.title,
            [candidate.row for candidate in candidates],
            dtype_name(self.dtype),
            {"rows": self.rows, "vocab": self.vocab, "tokens": self.tokens},
            bytes=self.traffic,
            input_bytes=tile.nbytes,
            check=f"float64: every log-prob of a sequence, and the gradient of {len(exact.rows)} rows",
            complete=complete,
        )

    def _candidate(self, name: str, peer: LogitsPeer, tile: Tensor, targets: Tensor, exact: ExactRows) -> Candidate:
        def open_() -> Opened:
            logps = peer.make()
            spare = tile.clone() if peer.overwrites else tile
            logits = spare.detach().requires_grad_(self.backward)
            upstream = torch.linspace(0.5, 1.5, len(tile), device=tile.device)

            def step() -> Tensor:
                with torch.set_grad_enabled(self.backward):
                    found = logps(logits, targets)
                if self.backward:
                    found.backward(upstream.to(found.dtype))
                return found.detach()

            def clear() -> None:
                logits.grad = None

            def prepare() -> None:
                clear()
                if peer.overwrites:
                    spare.copy_(tile)

            errors = {"logp": relative_error(step(), self._exact_logps(tile, targets))}
            if logits.grad is not None:
                got = logits.grad.flatten(0, 1)[exact.rows]
                scale = upstream.double()[exact.rows // self.tokens, None]
                errors["gradient"] = relative_error(got, -exact.gradient * scale)
            clear()
            return Opened(Run(step, prepare, clear), errors)

        # A log-prob of a sequence is a sum: what is lost in bf16 token log-probs shows.
        limits = {"logp": KERNEL_LIMIT if peer.role is Role.OURS else 1e-2, "gradient": GRADIENT_LIMIT[self.dtype]}
        return Candidate(Row(name, peer.role), open_, limits)

    def _exact_logps(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[S] in float64, a few rows at a time."""
        parts = [
            rows.double().log_softmax(1).gather(1, index[:, None])[:, 0]
            for rows, index in zip(logits.flatten(0, 1).split(64), targets.flatten().split(64), strict=True)
        ]
        return torch.cat(parts).view(targets.shape).sum(1)
