"""group_epilogue by itself: small vectors, so what counts is the number of launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_dpo import losses
from robust_dpo.bench.cases.base import Case, backends_for
from robust_dpo.bench.compare import Candidate, Opened, compare
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.solution import relative_error
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench
from robust_dpo.dispatch import GROUP_EPILOGUE, ROW_LOGPROB, backends, find_backend, get_group_epilogue
from robust_dpo.kernels.group_epilogue import EpilogueVectors, NativeLoss

_LIMIT = 1e-3


@dataclass(frozen=True)
class EpilogueCase(Case):
    """One chunk: token log-probs of policy and live reference to the coefficients of all rows, KL-robust DPO.

    Args:
        groups: G pairs.
        tokens: rows of a group, shared out equally.
        beta: of DPO.
    """

    groups: int = 64
    tokens: int = 1024
    beta: float = 0.1

    @property
    def name(self) -> str:
        return f"group_epilogue G={self.groups} T={self.tokens}"

    @property
    def group(self) -> str:
        return "epilogue"

    @property
    def traffic(self) -> int:
        """Bytes: both token log-probs are read, coefficients written, fp32."""
        return 12 * self.groups * self.tokens

    @property
    def cost(self) -> float:
        return self.traffic

    def candidates(self, bench: Workbench) -> list[Candidate]:
        """Plain PyTorch, and every backend that has it as a kernel."""
        vectors = self._vectors(bench)
        exact = self._plain(vectors, torch.float64)
        found = [self._plain_candidate(vectors, exact)]
        # The backend follows from the dtype of the tile, which for these vectors is the usual one.
        for name in backends_for(ROW_LOGPROB, bench.device, torch.bfloat16):
            if get_group_epilogue(name, bench.device, torch.bfloat16, losses.resolve("sigmoid", self.beta, {}), 2):
                found.append(self._candidate(name, vectors, exact, bench))
        return found

    def measure(self, bench: Workbench) -> Record:
        candidates = self.candidates(bench)
        names = [candidate.row.name for candidate in candidates]
        complete = compare(candidates, bench, self.name, rounds=5 * bench.rounds, warmups=3)
        title = f"group_epilogue, {self.groups} pairs of {self.tokens} tokens, live reference, KL-robust DPO"
        return Record(
            self.name,
            self.group,
            title,
            [candidate.row for candidate in candidates],
            "float32",
            {"groups": self.groups, "tokens": self.tokens},
            bytes=self.traffic,
            check="float64",
            details={"absent": {name: why for name, why in _reasons().items() if name not in names}},
            complete=complete,
        )

    def _vectors(self, bench: Workbench) -> EpilogueVectors:
        generator = torch.Generator(bench.device).manual_seed(bench.seed)
        rows, responses = self.groups * self.tokens, 2 * self.groups
        token_logps = -torch.rand(rows, generator=generator, device=bench.device).mul_(5)
        noise = torch.randn(rows, generator=generator, device=bench.device).mul_(0.1)

        def empty(count: int) -> Tensor:
            return torch.full((count,), float("nan"), device=bench.device)

        return EpilogueVectors(
            token_logps=token_logps,
            ref_token_logps=token_logps + noise,
            counted=None,
            seq_offsets=torch.arange(responses + 1, device=bench.device) * (self.tokens // 2),
            group_offsets=torch.arange(self.groups + 1, device=bench.device) * 2,
            lengths=torch.full((responses,), self.tokens / 2, device=bench.device),
            scores=None,
            calibration=torch.rand(self.groups, generator=generator, device=bench.device).add_(0.5),
            logps=empty(responses),
            ref_logps=empty(responses),
            losses=empty(self.groups),
            derivative=empty(responses),
            coefficients=empty(rows),
            state=torch.zeros(3, dtype=torch.float64, device=bench.device),
            widest=2,
        )

    def _plain(self, vectors: EpilogueVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Coefficients [N] in plain PyTorch, the derivative by autograd: what a trainer does."""
        assert vectors.ref_token_logps is not None and vectors.calibration is not None
        tokens = torch.stack([vectors.token_logps, vectors.ref_token_logps]).to(dtype)
        logps, ref_logps = tokens.view(2, self.groups, 2, -1).sum(3)
        t = self.beta * (logps.requires_grad_() - ref_logps)
        per_group = -F.logsigmoid(t[:, 0] - t[:, 1])
        (derivative,) = torch.autograd.grad(per_group.sum(), logps)
        scores = vectors.calibration * per_group.detach()
        weights = (scores - scores.max()).exp() * vectors.calibration
        found: Tensor = (-weights[:, None] * derivative).flatten()
        return found.repeat_interleave(self.tokens // 2)

    def _plain_candidate(self, vectors: EpilogueVectors, exact: Tensor) -> Candidate:
        call = partial(self._plain, vectors)

        def open_() -> Opened:
            return Opened(Run(call), {"gradient": relative_error(call(), exact)})

        return Candidate(Row("plain"), open_, {"gradient": _LIMIT}, takes_memory=False)

    def _candidate(self, backend: str, vectors: EpilogueVectors, exact: Tensor, bench: Workbench) -> Candidate:
        def open_() -> Opened:
            loss = losses.resolve("sigmoid", self.beta, {})
            launch = get_group_epilogue(backend, bench.device, torch.bfloat16, loss, 2)
            assert launch is not None and vectors.state is not None and vectors.coefficients is not None
            native = NativeLoss(loss.name, dict(loss.arguments))
            before = torch.tensor([float("-inf"), 0.0, 1.0], dtype=torch.float64, device=bench.device)

            def restore() -> None:
                assert vectors.state is not None
                vectors.state.copy_(before)

            def call() -> None:
                launch(vectors, native, 1.0, 0, self.groups)

            restore()
            call()
            return Opened(Run(call, restore), {"gradient": relative_error(vectors.coefficients, exact)})

        return Candidate(Row(backend, Role.OURS), open_, {"gradient": _LIMIT}, takes_memory=False)


def _reasons() -> dict[str, str]:
    """Why a backend would not be in the table, for each but plain PyTorch, which always is."""
    found = {}
    for status in backends().backends:
        if GROUP_EPILOGUE not in find_backend(status.name).launchers:
            found[status.name] = "it has no kernel for this"
        else:
            found[status.name] = f"{'not timed' if status.usable else 'cannot run here'}: {status.detail}"
    found.pop("torch", None)
    return found
