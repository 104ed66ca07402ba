"""The floor: the four matrix products that no implementation can avoid, each at the fastest route found here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headbench.problem import IGNORE, Problem

Product = Callable[[], object]
CHUNKS = (512, 1024, 2048)
# Logits of the policy, logits of the reference, dhidden, dweight.
TIMES_NEEDED = {"logits": 2, "dhidden": 1, "dweight": 1}


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


ROUTES: dict[str, Callable[[Operands], dict[str, Product]]] = {"mm": _mm, "mm transposed": _mm_transposed}
if torch.backends.mkldnn.is_available():
    ROUTES |= {"oneDNN linear": _onednn, "oneDNN linear, packed": _onednn_packed}


@dataclass(frozen=True)
class Choice:
    """The fastest way found for one product, and the GFLOP/s seen when it was chosen."""

    product: str
    route: str
    chunk: int
    gflops: float


class Floor:
    """Times the products on the problem's own head and response rows, with the tile as softmax values.

    The matrix rate depends on the data only through the power that it draws; zeros would flatter it.
    """

    def __init__(self, problem: Problem) -> None:
        self.weight = problem.weight
        self.rows = problem.hidden[problem.targets != IGNORE]
        self.tile = torch.softmax((self.rows[: max(CHUNKS)] @ self.weight.t()), dim=1)
        self.tile_out, self.rows_out = torch.empty_like(self.tile), torch.empty_like(self.rows)
        self.weight_out = torch.empty_like(self.weight)
        self.choices: dict[str, Choice] = {}

    def _operands(self, chunk: int) -> Operands:
        part = slice(0, chunk)
        return Operands(
            self.rows[part], self.tile[part], self.weight, self.rows_out[part], self.tile_out[part], self.weight_out
        )

    def search(self, repeats: int = 4) -> list[Choice]:
        """Try every route and chunk; keep the fastest for each product. Returns everything that was tried."""
        tried = []
        for chunk in sorted({min(chunk, len(self.rows)) for chunk in CHUNKS}):
            operands = self._operands(chunk)
            runs = {
                (product, route): run
                for route, products in ROUTES.items()
                for product, run in products(operands).items()
            }
            # Turn by turn, so that a disturbance does not fall on one route alone; the first turn warms up.
            turns = [{key: _seconds(run) for key, run in runs.items()} for _ in range(repeats + 1)]
            flops = 2 * chunk * self.weight.numel()
            for product, route in runs:
                seconds = min(turn[product, route] for turn in turns[1:])
                tried.append(Choice(product, route, chunk, flops / seconds / 1e9))
        for product in TIMES_NEEDED:
            self.choices[product] = max((c for c in tried if c.product == product), key=lambda choice: choice.gflops)
        return tried

    def step(self) -> float:
        """Seconds of all four products over all response rows, chunk by chunk, at the chosen routes."""
        total = 0.0
        for product, times in TIMES_NEEDED.items():
            choice = self.choices[product]
            run = ROUTES[choice.route](self._operands(choice.chunk))[product]
            calls = times * len(self.rows) / choice.chunk
            whole = max(round(calls), 1)
            total += sum(_seconds(run) for _ in range(whole)) * calls / whole
        return total


def _seconds(run: Product) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
