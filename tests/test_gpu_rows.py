"""row_logprob on a GPU: every backend against float64, in place against apart, rows that nobody needs, huge tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import BACKENDS, DEVICE, DTYPES, needs_cuda, on_the_device
from problems import require_backend
from row_cases import assert_within_budget, dtype_id, solved
from torch import Tensor

from robust_dpo import reference
from robust_dpo.dispatch import get_row_logprob
from robust_dpo.kernels.gpu import gpu_of
from robust_dpo.kernels.row_logprob import IGNORE_INDEX, RowLogprob

pytestmark = on_the_device
# A race need not show the first time.
LAUNCHES = 5


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}


def more_rows_than_turns() -> int:
    """Two rows for every multiprocessor and one more, so that turns are uneven."""
    return 2 * gpu_of(torch.empty(0, device=DEVICE).device).multiprocessors + 1


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("padding", [0, 7], ids=["dense-rows", "odd-stride"])
@pytest.mark.parametrize("vocab", [1, 31, 1024, 50257, 129920])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_logprob(backend: str, dtype: torch.dtype, vocab: int, padding: int, transform: str) -> None:
    require_backend(backend)
    case, truth, budget = solved(dtype, 7, vocab, transform)
    tile = torch.full((7, vocab + padding), float("nan"), dtype=dtype, device=DEVICE)[:, :vocab]
    tile.copy_(case.logits)
    options = on_device(case.options())
    launcher = get_row_logprob(backend, DEVICE, dtype)
    result = launcher(tile, case.targets.to(DEVICE), grad_out=tile, entropy=True, **options)
    assert result.entropy is not None
    found = RowLogprob(result.logp.cpu(), result.lse.cpu(), result.entropy.cpu())
    assert_within_budget(found, tile.cpu(), truth, budget)


@pytest.mark.parametrize("vocab", [50257, 128256])
@pytest.mark.parametrize("odd", [True, False], ids=["odd-stride", "aligned"])
@pytest.mark.parametrize(
    ("tile_dtype", "grad_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=dtype_id,
)
@pytest.mark.parametrize("few", [True, False], ids=["split-rows", "many-rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_in_place_has_the_bits_of_one_apart(
    backend: str, few: bool, tile_dtype: torch.dtype, grad_dtype: torch.dtype, odd: bool, vocab: int
) -> None:
    """Over the front of the row it is made from, where nothing may be overwritten before it was read."""
    require_backend(backend)
    rows, stride = 5 if few else more_rows_than_turns(), vocab | 1 if odd else -(-vocab // 64) * 64
    logits = torch.full((rows, stride), float("nan"), dtype=tile_dtype, device=DEVICE)
    logits[:, :vocab] = 4 * torch.randn(rows, vocab, device=DEVICE)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    targets[1::7] = IGNORE_INDEX
    row_scale = torch.randn(rows, device=DEVICE)
    launcher = get_row_logprob(backend, DEVICE, tile_dtype)

    def front(storage: Tensor) -> Tensor:
        return storage.view(grad_dtype)[:, :vocab]

    def run(tile: Tensor, gradient: Tensor) -> RowLogprob:
        return launcher(tile[:, :vocab], targets, grad_out=front(gradient), row_scale=row_scale)

    apart = torch.full_like(logits, float("nan"))
    right = run(logits, apart)
    assert_rows_close(right, front(apart), logits[:, :vocab], targets, row_scale)
    for _ in range(LAUNCHES):
        tile = logits.clone()
        found = run(tile, tile)
        assert torch.equal(found.logp, right.logp)
        assert torch.equal(found.lse, right.lse)
        assert torch.equal(front(tile), front(apart))


def assert_rows_close(found: RowLogprob, gradient: Tensor, logits: Tensor, targets: Tensor, row_scale: Tensor) -> None:
    """Against float64, on the first and the last rows; zeros where the target is ignored."""
    some = torch.arange(len(targets)).roll(3)[:6].to(logits.device)
    logits, targets, kept = logits[some].double(), targets[some], targets[some] != IGNORE_INDEX
    assert bool(kept.any()) and not bool(kept.all())
    chosen = targets.where(kept, 0)
    exact = logits.log_softmax(1)
    logp = exact.gather(1, chosen[:, None])[:, 0] * kept
    torch.testing.assert_close(found.logp[some].double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse[some].double(), logits.logsumexp(1) * kept, rtol=1e-5, atol=1e-5)
    right = exact.exp().scatter_(1, chosen[:, None], torch.expm1(logp)[:, None])
    right *= (row_scale[some].double() * kept)[:, None]
    unit = torch.finfo(gradient.dtype).eps
    torch.testing.assert_close(gradient[some].double(), right, rtol=max(unit, 1e-4), atol=1e-7)


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "apart"])
@pytest.mark.parametrize("vocab", [31, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_results_and_rows_of_nobody(backend: str, dtype: torch.dtype, vocab: int, in_place: bool) -> None:
    """The gradient by itself, from an earlier call; ignored rows are not read, so what is in them does not matter."""
    require_backend(backend)
    case, truth, budget = solved(dtype, 7, vocab, "all")
    ignored = torch.tensor([0, 3, 6])
    kept = torch.tensor([1, 2, 4, 5])
    tile, targets = case.logits.clone(), case.targets.clone()
    tile[ignored], targets[ignored] = float("nan"), IGNORE_INDEX
    tile, targets, options = tile.to(DEVICE), targets.to(DEVICE), on_device(case.options())
    launcher = get_row_logprob(backend, DEVICE, dtype)
    first = launcher(tile, targets, entropy=True, **options)
    gradient = tile if in_place else torch.full_like(tile, float("nan"))
    second = launcher(tile, targets, grad_out=gradient, known=first, **options)
    assert torch.equal(second.logp, first.logp)
    assert torch.equal(second.lse, first.lse)
    assert first.entropy is not None
    found = RowLogprob(first.logp.cpu(), first.lse.cpu(), first.entropy.cpu())
    gradient = gradient.cpu()
    for values in (found.logp, found.lse, gradient):
        assert bool((values[ignored] == 0).all())
    of_kept = RowLogprob(*(each[kept] for each in found if each is not None))
    # The gradient comes from the rounded log-sum-exp: half a unit of it, as a part of each probability.
    lse_unit = torch.finfo(torch.float32).eps * float(truth[1].abs().max()) * float(truth[3].abs().max())
    allowed = [*budget[:3], budget[3] + lse_unit]
    assert_within_budget(of_kept, gradient[kept], tuple(each[kept] for each in truth), allowed)


@needs_cuda
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_more_than_two_to_the_31_logits(backend: str) -> None:
    require_backend(backend)
    rows, vocab = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("needs 13 GB of GPU memory")
    assert rows * vocab > 2**31
    tile = torch.randn(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    some = torch.tensor([0, 1, 2**31 // vocab, 2**31 // vocab + 1, rows - 1])
    logits = tile[some.to(DEVICE)].cpu().double()
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    result = get_row_logprob(backend, DEVICE, torch.bfloat16)(tile, targets, grad_out=tile)
    chosen = targets[some.to(DEVICE)].cpu()
    logp, lse, _ = reference.row_logprob(logits, chosen)
    torch.testing.assert_close(result.logp[some.to(DEVICE)].cpu().double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.lse[some.to(DEVICE)].cpu().double(), lse, rtol=1e-5, atol=1e-5)
    gradient = reference.row_gradient(logits, chosen)
    torch.testing.assert_close(tile[some.to(DEVICE)].cpu().double(), gradient, rtol=1e-2, atol=1e-6)
