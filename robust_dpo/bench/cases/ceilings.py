"""What the device can do: copies and matrix products, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robust_dpo.bench.cases.base import Case, dtype_name
from robust_dpo.bench.compare import Candidate, Opened, compare
from robust_dpo.bench.record import Record, Role, Row
from robust_dpo.bench.timing import Run
from robust_dpo.bench.workbench import Workbench
from robust_dpo.ops.gemm import widens


def part(name: str, call: Callable[[], object], *, flops: int | None = None, traffic: int | None = None) -> Candidate:
    """A row that is timed for itself, with the operations or bytes of a call."""

    def open_() -> Opened:
        call()
        return Opened(Run(call), {})

    return Candidate(Row(name, Role.PART, flops=flops, bytes=traffic), open_, {}, takes_memory=False)


@dataclass(frozen=True)
class CeilingCase(Case):
    """A large copy and a large square product.

    Args:
        copy_bytes: of the source; twice that is moved.
        size: of the matrices.
        dtype: of the matrices.
    """

    copy_bytes: int
    size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"ceilings copy={self.copy_bytes} mm={self.size} {dtype_name(self.dtype)}"

    @property
    def group(self) -> str:
        return "ceilings"

    @property
    def cost(self) -> float:
        return 2.0 * self.size**3

    def measure(self, bench: Workbench) -> Record:
        generator = torch.Generator(bench.device).manual_seed(bench.seed)
        source = torch.randn(self.copy_bytes // 4, generator=generator, device=bench.device)
        target = torch.empty_like(source)

        def matrix() -> Tensor:
            values = torch.randn(self.size, self.size, generator=generator, device=bench.device)
            return values.to(self.dtype)

        a, b = matrix(), matrix()
        out = torch.empty_like(a)
        candidates = [
            part(
                f"copy of {self.copy_bytes >> 20} MiB, read and written",
                lambda: target.copy_(source),
                traffic=2 * source.nbytes,
            ),
            part(
                f"{dtype_name(self.dtype)} product of {self.size} x {self.size}",
                lambda: torch.mm(a, b, out=out),
                flops=2 * self.size**3,
            ),
        ]
        complete = compare(candidates, bench, self.name, rounds=2 * bench.rounds, warmups=3)
        rows = [candidate.row for candidate in candidates]
        return Record(self.name, self.group, "Ceilings", rows, dtype_name(self.dtype), complete=complete)


@dataclass(frozen=True)
class ProductCase(Case):
    """The three products of the head by chunk size, and what fp32 accumulation of dW costs.

    Args:
        width: H.
        vocab: V.
        chunks: rows of a chunk.
        dtype: of the operands.
    """

    width: int
    vocab: int
    chunks: tuple[int, ...] = (1024, 2048, 4096, 8192)
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        chunks = ",".join(map(str, self.chunks))
        return f"products H={self.width} V={self.vocab} C={chunks} {dtype_name(self.dtype)}"

    @property
    def group(self) -> str:
        return "products"

    @property
    def cost(self) -> float:
        return 10.0 * sum(self.chunks) * self.width * self.vocab

    def measure(self, bench: Workbench) -> Record:
        generator = torch.Generator(bench.device).manual_seed(bench.seed)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=bench.device).to(self.dtype)

        weight, rows = matrix(self.vocab, self.width), matrix(max(self.chunks), self.width)
        # As softmax − onehot is: mostly small.
        tile = matrix(max(self.chunks), self.vocab).mul_(1 / self.vocab)
        narrow, wide = torch.empty_like(weight), torch.zeros_like(weight, dtype=torch.float32)
        logits, states = torch.empty_like(tile), torch.empty_like(rows)
        candidates = []
        for chunk in self.chunks:
            x, z, z_out, x_out = rows[:chunk], tile[:chunk], logits[:chunk], states[:chunk]
            calls: dict[str, Callable[[], object]] = {
                "logits": partial(torch.mm, x, weight.t(), out=z_out),
                "dhidden": partial(torch.mm, z, weight, out=x_out),
                f"dweight in {dtype_name(self.dtype)}": partial(torch.mm, z.t(), x, out=narrow),
            }
            if widens(x):
                to_wide = {"out_dtype": torch.float32}
                calls["logits in float32"] = partial(torch.mm, x, weight.t(), **to_wide)
                calls["dweight in float32"] = partial(torch.mm, z.t(), x, **to_wide, out=wide)
                calls["dweight added in float32"] = partial(torch.addmm, wide, z.t(), x, **to_wide, out=wide)
            flops = 2 * chunk * self.width * self.vocab
            for product, call in calls.items():
                candidate = part(f"{product}, C={chunk}", call, flops=flops)
                candidate.row.parameters = {"product": product, "chunk": chunk}
                candidates.append(candidate)
        complete = compare(candidates, bench, self.name, rounds=bench.rounds)
        title = f"Products of the head by chunk size, H = {self.width}, V = {self.vocab}, {dtype_name(self.dtype)}"
        rows_ = [candidate.row for candidate in candidates]
        return Record(self.name, self.group, title, rows_, dtype_name(self.dtype), complete=complete)
