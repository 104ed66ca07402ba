"""The floor of the head: the matrix products that no implementation can avoid, each at the fastest route found here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_dpo.bench.problem import IGNORE, Problem
from robust_dpo.bench.timing import Run, Stopwatch

Product = Callable[[], object]
PRODUCTS = ("logits", "dhidden", "dweight")
CHUNKS = {"cpu": (512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}


@dataclass(frozen=True)
class Operands:
    """One chunk: rows [C, H], logits tile [C, V], head [V, H], and buffers for the results."""

    rows: Tensor
    tile: Tensor
    weight: Tensor
    rows_out: Tensor
    tile_out: Tensor
    weight_out: Tensor


def _mm(o: Operands) -> dict[str, Product]:
    return {
        "logits": lambda: torch.mm(o.rows, o.weight.t(), out=o.tile_out),
        "dhidden": lambda: torch.mm(o.tile, o.weight, out=o.rows_out),
        "dweight": lambda: torch.mm(o.tile.t(), o.rows, out=o.weight_out),
    }


def _mm_transposed(o: Operands) -> dict[str, Product]:
    columns, out = o.rows.t().contiguous(), o.weight_out.view(o.weight.shape[1], -1)
    return {"dweight": lambda: torch.mm(columns, o.tile, out=out)}


def _onednn(o: Operands) -> dict[str, Product]:
    """The inner product of oneDNN, x Wᵀ for any strides of W; dweight transposed, which needs no copy of the tile."""
    linear = torch.ops.mkldnn._linear_pointwise
    columns = o.rows.t().contiguous()
    return {
        "logits": lambda: linear(o.rows, o.weight, None, "none", [], ""),
        "dhidden": lambda: linear(o.tile, o.weight.t(), None, "none", [], ""),
        "dweight": lambda: linear(columns, o.tile.t(), None, "none", [], ""),
    }


def _onednn_packed(o: Operands) -> dict[str, Product]:
    """The same with the head in oneDNN's own layout; packing is left out of the time, for it is done once."""
    linear, pack = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    by_token, by_feature = pack(o.weight, len(o.rows)), pack(o.weight.t().contiguous(), len(o.rows))
    return {
        "logits": lambda: linear(o.rows, by_token, None, "none", [], ""),
        "dhidden": lambda: linear(o.tile, by_feature, None, "none", [], ""),
    }


_ROUTES: dict[str, Callable[[Operands], dict[str, Product]]] = {"mm": _mm, "mm transposed": _mm_transposed}
_ONEDNN_ROUTES = {"oneDNN linear": _onednn, "oneDNN linear, packed": _onednn_packed}


def routes(device: torch.device) -> dict[str, Callable[[Operands], dict[str, Product]]]:
    """Ways to compute the products on a device, by name."""
    return _ROUTES | (_ONEDNN_ROUTES if device.type == "cpu" and torch.backends.mkldnn.is_available() else {})


@dataclass(frozen=True)
class Choice:
    """The fastest way found for one product, and the GFLOP/s seen when it was chosen."""

    product: str
    route: str
    chunk: int
    gflops: float


class Floor:
    """The products on the problem's own head and response rows, with the tile as softmax values.

    The matrix rate depends on the data only through the power that it draws; zeros would flatter it.

    Args:
        problem: says what is needed: policy logits and dhidden always, reference logits where it is live, dweight
            where the head is trained.
        chunks: rows of a chunk to choose from, None for those of the device.
    """

    def __init__(self, problem: Problem, chunks: tuple[int, ...] | None = None) -> None:
        self.weight = problem.weight
        self.rows = problem.hidden[problem.targets != IGNORE]
        count, device = len(self.rows), self.weight.device
        wanted = CHUNKS[device.type] if chunks is None else chunks
        self.chunks = sorted({min(chunk, count) for chunk in wanted})
        self.times = {"logits": 2 if problem.live_reference else 1, "dhidden": 1, "dweight": int(problem.train_head)}
        self.tile = torch.softmax(self.rows[: max(self.chunks)] @ self.weight.t(), dim=1)
        self.tile_out, self.rows_out = torch.empty_like(self.tile), torch.empty_like(self.rows[: max(self.chunks)])
        self.weight_out = torch.empty_like(self.weight)
        self.choices: dict[str, Choice] = {}
        self._calls: list[tuple[Product, int]] = []

    @property
    def flops(self) -> int:
        """Of a step: 2·N·H·V for each product."""
        return 2 * len(self.rows) * self.weight.numel() * sum(self.times.values())

    def _operands(self, chunk: int) -> Operands:
        part = slice(0, chunk)
        return Operands(
            self.rows[part], self.tile[part], self.weight, self.rows_out[part], self.tile_out[part], self.weight_out
        )

    def search(self, stopwatch: Stopwatch, repeats: int = 4) -> list[Choice]:
        """Try every route and chunk; keep the fastest for each product. Returns everything that was tried."""
        tried = []
        for chunk in self.chunks:
            operands = self._operands(chunk)
            runs = {
                (product, route): Run(run)
                for route, make in routes(self.weight.device).items()
                for product, run in make(operands).items()
            }
            # Turn by turn, so that a disturbance does not fall on one route alone; the first turn warms up.
            turns = [{key: stopwatch.seconds(run) for key, run in runs.items()} for _ in range(repeats + 1)]
            flops = 2 * chunk * self.weight.numel()
            for product, route in runs:
                seconds = min(turn[product, route] for turn in turns[1:])
                tried.append(Choice(product, route, chunk, flops / seconds / 1e9))
        for product in PRODUCTS:
            self.choices[product] = max((c for c in tried if c.product == product), key=lambda choice: choice.gflops)
        self._calls = [call for product in PRODUCTS for call in self._plan(self.choices[product])]
        return tried

    def _plan(self, choice: Choice) -> list[tuple[Product, int]]:
        """(product, times) over all rows: whole chunks, and a smaller last one."""
        whole, rest = divmod(len(self.rows), choice.chunk)
        sizes = [(choice.chunk, whole), (rest, 1)]
        make = routes(self.weight.device)[choice.route]
        times = self.times[choice.product]
        return [(make(self._operands(size))[choice.product], times * count) for size, count in sizes if size and count]

    def step(self) -> None:
        """All products over all response rows, chunk by chunk, at the chosen routes."""
        for call, times in self._calls:
            for _ in range(times):
                call()
