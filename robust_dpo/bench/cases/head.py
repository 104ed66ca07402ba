"""Forward and backward of a preference loss over an LM head: every implementation against the bare products."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from robust_dpo.bench.cases.base import Case, dtype_name
from robust_dpo.bench.compare import Candidate, Opened, compare
from robust_dpo.bench.floor import Floor
from robust_dpo.bench.implementation import Bound, Implementation
from robust_dpo.bench.ours import ours_with
from robust_dpo.bench.problem import Problem, Shape, shape_dict
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.rounding import Rounding, head_limits, rounding_of_logits
from robust_dpo.bench.solution import Objective, Solution, TokenLogps, describe, solve
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench
from robust_dpo.ops.chunking import chunk_rows

FLOOR = "gemms"
# Gradients are checked on so many rows of each where the whole would take longer than what is measured: 10 GFLOP a
# product are a tenth of a second in float64 on a CPU.
CHECKED_ROWS, CHECKED_TOKENS = 256, 1024
_CHECKED_WHOLE_FLOPS = 10**10


@dataclass(frozen=True)
class HeadCase(Case):
    """One problem.

    Args:
        shape: sizes.
        dtype: of hidden states and heads.
        live: reference from its own hidden states and head; otherwise cached log-probs.
        train_head: with the gradient of the head.
        compiled: also those that go through torch.compile, each of which compiles for every case anew.
        chunks: instead of the implementations that were asked for, ours with chunks of so many rows, and a floor with
            the same chunks for each.
    """

    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    live: bool = False
    train_head: bool = True
    compiled: bool = False
    chunks: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        s = self.shape
        sizes = f"N={s.response_rows} H={s.width} V={s.vocab} S={s.sequences} T={s.tokens}"
        trained = "trained" if self.train_head else "frozen"
        parts = [self.group, sizes, dtype_name(self.dtype), self.kind, self.reference, trained]
        return " ".join([*parts, *(["compiled"] if self.compiled else []), *(f"C={chunk}" for chunk in self.chunks)])

    @property
    def kind(self) -> str:
        return "pairs" if self.shape.group_size == 2 else f"lists of {self.shape.group_size}"

    @property
    def reference(self) -> str:
        return "live reference" if self.live else "cached reference"

    @property
    def training(self) -> str:
        return "head trained" if self.train_head else "head frozen"

    @property
    def group(self) -> str:
        return "chunks" if self.chunks else "head"

    @property
    def title(self) -> str:
        s = self.shape
        sweep = ", chunk sizes" if self.chunks else ""
        padded = f", {s.prompt_tokens} of {s.tokens} tokens are prompt" if s.prompt_tokens else ""
        return (
            f"Head, N = {s.response_rows}, H = {s.width}, V = {s.vocab}, {dtype_name(self.dtype)}: {self.kind}, "
            f"{self.reference}, {self.training}{padded}{sweep}"
        )

    @property
    def cost(self) -> float:
        return self.flops * (len(self.chunks) or 8) * (3 if self.compiled else 1)

    @property
    def flops(self) -> int:
        return self.shape.product_flops * (2 + self.live + self.train_head)

    def wants(self, bench: Workbench) -> list[str]:
        return [] if self.chunks else [each.name for each in self._wanted(bench)]

    def _wanted(self, bench: Workbench) -> list[Implementation]:
        return [each for each in bench.implementations if self.compiled or bench.device.type not in each.compiles_on]

    def measure(self, bench: Workbench) -> Record:
        base, tokens = bench.problem(dataclasses.replace(self.shape, group_size=2), self.dtype)
        problem = dataclasses.replace(base, group_size=self.shape.group_size, train_head=self.train_head)
        if not self.live:
            problem = problem.with_cached_reference(tokens.per_sequence(tokens.ref_logp))
        exact = _Exact(problem, tokens)
        details: dict[str, Any] = {
            "data": describe(problem, exact.of("preference")),
            "rounding": exact.rounding._asdict(),
        }
        if self.chunks:
            candidates = self._sweep(problem, exact, bench)
        else:
            wanted = self._wanted(bench)
            details["left_out"] = {each.name: why for each in wanted if (why := each.obstacle(problem))}
            candidates = [_floor(problem, bench, details), *self._implementations(problem, exact, bench)]
        # Two calls came before: the one that was checked, and the one whose memory was taken.
        complete = compare(candidates, bench, self.name, rounds=bench.rounds, warmups=0)
        return Record(
            name=self.name,
            group=self.group,
            title=self.title,
            rows=[candidate.row for candidate in candidates],
            dtype=dtype_name(self.dtype),
            sizes=shape_dict(self.shape),
            flops=self.flops,
            input_bytes=problem.input_bytes,
            bound_bytes=problem.input_bytes + result_bytes(problem, bench.device),
            check=exact.sentence,
            details=details,
            complete=complete,
        )

    def _implementations(self, problem: Problem, exact: _Exact, bench: Workbench) -> list[Candidate]:
        return [_candidate(each, problem, exact) for each in self._wanted(bench) if each.obstacle(problem) is None]

    def _sweep(self, problem: Problem, exact: _Exact, bench: Workbench) -> list[Candidate]:
        """Ours at each chunk size, after the floor at the same."""
        found = []
        for chunk in sorted({min(chunk, self.shape.response_rows) for chunk in self.chunks}):
            ours = ours_with(f"ours, C={chunk}", chunk_bytes=chunk * self.shape.vocab * self.dtype.itemsize)
            pair = [_floor(problem, bench, {}, (chunk,)), _candidate(ours, problem, exact)]
            for candidate in pair:
                candidate.row.parameters = {"chunk": chunk}
            pair[0].row.name = f"{FLOOR}, C={chunk}"
            found += pair
        return found


class _Exact:
    """Exact solutions of one problem, each computed when first asked for."""

    def __init__(self, problem: Problem, tokens: TokenLogps) -> None:
        self._problem, self._tokens = problem, tokens
        self._found: dict[Objective, Solution] = {}
        self._partly = 2 * len(tokens.logp) * problem.weight.numel() > _CHECKED_WHOLE_FLOPS

    def of(self, objective: Objective) -> Solution:
        if objective not in self._found:
            limits = {"max_rows": CHECKED_ROWS, "max_tokens": CHECKED_TOKENS} if self._partly else {}
            self._found[objective] = solve(self._problem, self._tokens, objective=objective, **limits)
        return self._found[objective]

    @functools.cached_property
    def rounding(self) -> Rounding:
        """What a narrow tile does to the results."""
        return rounding_of_logits(self._problem, self._tokens, self._problem.dtype)

    def limits(self, implementation: Implementation) -> dict[str, float]:
        """The largest error of each result that is right."""
        return head_limits(implementation, self._problem.dtype, self.rounding)

    @property
    def sentence(self) -> str:
        solution = self.of("preference")
        dtype = dtype_name(solution.loss.dtype)
        if not self._partly:
            return f"{dtype} on the same inputs: loss and all gradients"
        return (
            f"{dtype} on the same inputs at full size: the loss, the gradient of {len(solution.rows)} random rows of "
            f"the hidden states and of {len(solution.tokens)} rows of the head"
        )


def result_bytes(problem: Problem, device: torch.device) -> int:
    """Bytes that a single pass needs above its inputs: both gradients, one chunk of logits, and the fp32 sum of dW."""
    count, weight = problem.targets.numel(), problem.weight
    chunk = chunk_rows(len(weight), problem.dtype, device, None, count).usual * len(weight) * problem.dtype.itemsize
    accumulator = weight.numel() * 4 if problem.dtype != torch.float32 else 0
    return problem.hidden.nbytes + chunk + (weight.nbytes + accumulator if problem.train_head else 0)


def _candidate(implementation: Implementation, problem: Problem, exact: _Exact) -> Candidate:
    def open_() -> Opened:
        bound = Bound.to(implementation, problem)
        loss = bound.step()
        errors = exact.of(implementation.objective).errors(loss, *bound.gradients())
        bound.clear()
        return Opened(Run(bound.step, bound.clear, bound.clear), errors)

    row = Row(implementation.name, Role.OURS if implementation.ours else Role.PEER, version=implementation.version)
    if implementation.objective == "cross_entropy":
        row.note = "cross-entropy instead"
    return Candidate(row, open_, exact.limits(implementation))


def _floor(
    problem: Problem, bench: Workbench, details: dict[str, Any], chunks: tuple[int, ...] | None = None
) -> Candidate:
    def open_() -> Opened:
        floor = Floor(problem, chunks)
        tried = floor.search(bench.stopwatch)
        details["floor_tried"] = [asdict(choice) for choice in tried]
        details["floor_choices"] = [asdict(choice) for choice in floor.choices.values()]
        return Opened(Run(floor.step), {})

    return Candidate(Row(FLOOR, Role.FLOOR), open_, {}, takes_memory=False)
