"""row_logprob by itself, by every backend, against a copy of the same traffic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.bench.cases.base import GRADIENT_LIMIT, KERNEL_LIMIT, Case, backends_for, copy_floor, dtype_name
from robust_dpo.bench.compare import Candidate, Opened, compare
from robust_dpo.bench.problem import Shape, make_problem
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.solution import relative_error
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench
from robust_dpo.dispatch import ROW_LOGPROB, get_row_logprob
from robust_dpo.kernels.row_logprob import RowLogprobLauncher

# Width of the states that the tile is the product of; it changes nothing but how the logits look.
_WIDTH = 64
_CHECKED_ROWS = 64


def make_tile(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Peaked logits [n, V] as the head makes them, and targets [n]."""
    shape = Shape(vocab, _WIDTH, sequences=2, tokens=(rows + 1) // 2, prompt=0)
    problem = make_problem(shape, torch.float32, seed, device)
    tile = torch.empty(rows, vocab, dtype=dtype, device=device)
    states = problem.hidden.flatten(0, 1)[:rows]
    for part in range(0, rows, 512):
        tile[part : part + 512] = states[part : part + 512] @ problem.weight.t()
    return tile, problem.targets.flatten()[:rows].contiguous()


@dataclass(frozen=True)
class ExactRows:
    """Float64 results of some rows of a tile: rows [r], logp [r], and softmax − onehot [r, V]."""

    rows: Tensor
    logp: Tensor
    gradient: Tensor

    @staticmethod
    def of(tile: Tensor, targets: Tensor) -> ExactRows:
        rows = torch.linspace(0, len(tile) - 1, min(_CHECKED_ROWS, len(tile)), device=tile.device).long()
        log_probs = tile[rows].double().log_softmax(1)
        logp = log_probs.gather(1, targets[rows, None])
        gradient = log_probs.exp_().scatter_(1, targets[rows, None], torch.expm1(logp))
        return ExactRows(rows, logp[:, 0], gradient)


@dataclass(frozen=True)
class RowCase(Case):
    """One tile.

    Args:
        rows: n.
        vocab: V.
        dtype: of the tile.
        gradient: also softmax − onehot, in place.
    """

    rows: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    gradient: bool = False

    @property
    def name(self) -> str:
        what = "gradient in place" if self.gradient else "logp"
        return f"row_logprob n={self.rows} V={self.vocab} {dtype_name(self.dtype)} {what}"

    @property
    def group(self) -> str:
        return "rows"

    @property
    def title(self) -> str:
        what = "log-prob and gradient in place" if self.gradient else "log-prob"
        return f"row_logprob, n = {self.rows}, V = {self.vocab}, {dtype_name(self.dtype)}: {what}"

    @property
    def traffic(self) -> int:
        """Bytes: the tile is read once, and written once with the gradient."""
        return self.rows * self.vocab * self.dtype.itemsize * (2 if self.gradient else 1)

    @property
    def cost(self) -> float:
        return self.traffic

    def measure(self, bench: Workbench) -> Record:
        pristine, targets = make_tile(self.rows, self.vocab, self.dtype, bench.device, bench.seed)
        exact, tile = ExactRows.of(pristine, targets), torch.empty_like(pristine)
        candidates = [copy_floor(self.traffic, pristine, tile)]
        for row, launch in self.launchers(bench):
            candidates.append(self._candidate(row, launch, pristine, tile, targets, exact))
        complete = compare(candidates, bench, self.name, rounds=2 * bench.rounds, warmups=3)
        return Record(
            self.name,
            self.group,
            self.title,
            [candidate.row for candidate in candidates],
            dtype_name(self.dtype),
            {"rows": self.rows, "vocab": self.vocab},
            bytes=self.traffic,
            check=f"float64 of {len(exact.rows)} rows",
            complete=complete,
        )

    def launchers(self, bench: Workbench) -> list[tuple[Row, RowLogprobLauncher]]:
        """What is compared, each with the row that its measurements go into."""
        return [
            (Row(name, Role.PEER if name == "torch" else Role.OURS), get_row_logprob(name, bench.device, self.dtype))
            for name in backends_for(ROW_LOGPROB, bench.device, self.dtype)
        ]

    def _candidate(
        self,
        row: Row,
        launch: RowLogprobLauncher,
        pristine: Tensor,
        tile: Tensor,
        targets: Tensor,
        exact: ExactRows,
    ) -> Candidate:
        def open_() -> Opened:
            grad_out = tile if self.gradient else None

            def restore() -> None:
                tile.copy_(pristine)

            restore()
            result = launch(tile, targets, grad_out=grad_out)
            errors = {"logp": relative_error(result.logp[exact.rows], exact.logp)}
            if self.gradient:
                errors["gradient"] = relative_error(tile[exact.rows], exact.gradient)
            # The tile is overwritten by gradients only, and by the copy that is the floor.
            return Opened(Run(lambda: launch(tile, targets, grad_out=grad_out), restore), errors)

        limits = {"logp": KERNEL_LIMIT, "gradient": GRADIENT_LIMIT[self.dtype]}
        return Candidate(row, open_, limits)
