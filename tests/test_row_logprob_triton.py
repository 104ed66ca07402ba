"""row_logprob in Triton: sizes, layouts, splitting, launch shapes. test_row_logprob.py has the hostile inputs."""

from __future__ import annotations

import functools
import importlib.util
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from row_cases import Case, assert_within_budget, check_errors, dtype_id, make_case, poisoned, run, solved, through_gpu

from robust_dpo.kernels.row_launch import (
    CACHE_BYTES,
    MAX_SEGMENTS,
    RESIDENT_PROGRAMS,
    THREADS,
    LaunchShape,
    RowForm,
    all_forms,
    form_of,
    has_form,
    launch_shape,
)
from robust_dpo.kernels.row_logprob import RowLogprobLauncher
from robust_dpo.kernels.row_logprob_triton import aot_variants, row_logprob

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"one program": LaunchShape(1024), "seven programs": LaunchShape(256, 7)}
BIG = 10_000  # the interpreter takes a second for a few rows of more


def launcher_of(shape: LaunchShape | None) -> RowLogprobLauncher:
    launcher = functools.partial(row_logprob, shape=shape)
    return functools.partial(through_gpu, launcher) if torch.cuda.is_available() else launcher


@pytest.fixture(params=SHAPES)
def launcher(request: pytest.FixtureRequest) -> RowLogprobLauncher:
    return launcher_of(SHAPES[request.param])


def sizes(fast: bool) -> list[tuple[int, int]]:
    """Pairs (rows, vocab)."""
    every = itertools.product([0, 1, 7], [1, 31, 1024, 50257, 129920])
    return [(rows, vocab) for rows, vocab in every if fast or vocab < BIG or rows < 7]


@pytest.mark.parametrize("transform", ["plain", "softcap", "all"])
@pytest.mark.parametrize(("rows", "vocab"), [size for size in sizes(torch.cuda.is_available()) if size[1] < BIG])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_errors_stay_within_twice_those_of_pytorch(
    launcher: RowLogprobLauncher, dtype: torch.dtype, rows: int, vocab: int, transform: str
) -> None:
    check_errors(launcher, dtype, rows, vocab, transform)


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize(("rows", "vocab"), [size for size in sizes(torch.cuda.is_available()) if size[1] >= BIG])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_errors_of_long_rows(
    launcher: RowLogprobLauncher, dtype: torch.dtype, rows: int, vocab: int, transform: str
) -> None:
    check_errors(launcher, dtype, rows, vocab, transform)


def placed(values: Tensor, stride: int, shift: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix with the shape of `values`, rows `stride` elements apart, the first `shift` behind an aligned address,
    and the memory it lies in, full of 123.
    """
    rows, vocab = values.shape
    memory = torch.full((shift + rows * stride + 16,), 123.0, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((rows, vocab), (stride, 1), shift), memory


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("gradient", ["apart", "in phase", "in place", "none"])
@pytest.mark.parametrize(("vocab", "padding", "shift"), [(640, 16, 8), (5, 0, 0), (613, 2, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_layout(dtype: torch.dtype, vocab: int, padding: int, shift: int, gradient: str, transform: str) -> None:
    # Odd strides give every row another distance to the next 16-byte boundary.
    case, truth, budget = solved(dtype, 9, vocab, transform)
    stride = vocab + padding
    tile, memory = placed(case.logits, stride, shift, dtype)
    tile.copy_(case.logits)
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(tile.shape, tile.stride(), shift).fill_(False)
    grad, grad_memory = {
        "apart": lambda: placed(tile, stride + 3, shift + 1, dtype),
        "in phase": lambda: placed(tile, stride + 16, shift + 16, dtype),
        "in place": lambda: (tile, memory),
        "none": lambda: (None, memory),
    }[gradient]()
    for shape in (LaunchShape(256), LaunchShape(256, 3)):
        tile.copy_(case.logits)
        result = run(launcher_of(shape), moved, grad)
        assert_within_budget(result, truth[3].to(dtype) if grad is None else grad, truth, budget)
        assert (memory[outside] == 123).all()
        if grad is not None:
            inside = torch.zeros_like(grad_memory, dtype=torch.bool)
            inside.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(True)
            assert (grad_memory[~inside] == 123).all()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize(("vocab", "padding"), [(9000, 0), (9001, 0), (9000, 24)])
def test_narrow_gradient_over_the_front_of_long_rows(narrow: torch.dtype, vocab: int, padding: int) -> None:
    # Five steps of the loop: a store that reached elements not read yet would spoil the rest of the row.
    case = make_case(torch.float32, 3, vocab, "scale")
    truth = case.plain(torch.float64)
    budget = [1e-5, 1e-5, 1e-4, float((truth[3] - truth[3].to(narrow)).abs().max())]
    tile = torch.full((3, vocab + padding), 7.0)[:, :vocab]
    tile.copy_(case.logits)
    over = torch.empty(0, dtype=narrow).set_(tile.untyped_storage(), 0, (3, vocab), (2 * tile.stride(0), 1))
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    result = run(launcher_of(LaunchShape(256)), moved, over)
    assert_within_budget(result, over, truth, budget)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_chosen_shape_gives_the_same(rows: int) -> None:
    # Interpreted, the chip counts as one multiprocessor: one row is split, three are not.
    case, truth, budget = solved(torch.bfloat16, rows, 20_000, "plain")
    grad = poisoned(case)
    assert_within_budget(run(launcher_of(None), case, grad), grad, truth, budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [LaunchShape(256), LaunchShape(256, 4)], ids=["row", "split"])
def test_same_bits_in_every_call(dtype: torch.dtype, shape: LaunchShape) -> None:
    case = make_case(dtype, 3, 20_001)
    results = []
    for _ in range(2):
        grad = poisoned(case)
        results.append((*run(launcher_of(shape), case, grad), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("target", [-101, -1, 5003, 2**40, -(2**62)])
@pytest.mark.parametrize("transform", ["plain", "all"])
def test_target_outside_of_long_rows(launcher: RowLogprobLauncher, target: int, transform: str) -> None:
    case = make_case(torch.bfloat16, 2, 5003, transform)
    case.targets.copy_(torch.tensor([17, 17]))
    expected_grad, grad = poisoned(case), poisoned(case)
    expected = run(launcher, case, expected_grad)
    case.targets[1] = target
    result = run(launcher, case, grad)
    assert result.logp.isnan().tolist() == [False, True]
    torch.testing.assert_close(result.lse, expected.lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-5, atol=1e-6)
    # Only the onehot is missing: there the gradient has the sign of a probability, not of a probability − 1.
    assert grad[1, 17] * expected_grad[1, 17] <= 0
    grad[1, 17] = expected_grad[1, 17]
    torch.testing.assert_close(grad, expected_grad, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@settings(max_examples=200)
@given(
    rows=st.integers(0, 20_000),
    vocab=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4]),
    multiprocessors=st.integers(1, 200),
    read_twice=st.booleans(),
)
def test_launch_shape(rows: int, vocab: int, itemsize: int, multiprocessors: int, read_twice: bool) -> None:
    shape = launch_shape(rows, vocab, itemsize, multiprocessors, read_twice=read_twice)
    assert shape.threads in THREADS
    assert 1 <= shape.segments <= MAX_SEGMENTS
    if shape.segments > 1:
        # Never for work that fills the chip anyway, nor in pieces that leave threads idle.
        assert rows < 2 * multiprocessors
        assert vocab * itemsize // shape.segments >= 256 * 16 * itemsize or itemsize == 2
        assert vocab * itemsize // shape.segments >= 16 << 10
    else:
        resident = multiprocessors * RESIDENT_PROGRAMS[shape.threads]
        in_flight = min(rows, resident if shape.programs is None else shape.programs)
        held = CACHE_BYTES // (vocab * itemsize)
        assert in_flight <= max(1, held) or (shape.threads == 1024 and not read_twice)
        if shape.programs is not None:
            # As many as the cache allows: no program takes two rows more than another.
            assert (shape.threads, read_twice) == (1024, True)
            assert shape.programs * -(-rows // max(1, held)) >= rows


@pytest.mark.parametrize(
    ("rows", "vocab", "itemsize", "shape"),
    [
        (4096, 15_887, 2, LaunchShape(256)),
        (4096, 15_888, 2, LaunchShape(512)),
        (4096, 32_000, 2, LaunchShape(512)),
        (4096, 50_257, 2, LaunchShape(1024)),
        (4096, 127_100, 2, LaunchShape(1024)),
        (4096, 127_200, 2, LaunchShape(1024, programs=128)),
        (4096, 256_000, 2, LaunchShape(1024, programs=64)),
        (4096, 1000, 4, LaunchShape(256)),
        (1, 128_256, 2, LaunchShape(256, 15)),
        (8, 256_000, 4, LaunchShape(256, 62)),
        # More than the cache holds, and then half the chip or more is busy with whole rows.
        (200, 128_256, 2, LaunchShape(1024, programs=100)),
        (50, 512_000, 2, LaunchShape(256, 11)),
        (1, 1000, 4, LaunchShape(256)),
    ],
)
def test_launch_shape_on_an_h100(rows: int, vocab: int, itemsize: int, shape: LaunchShape) -> None:
    assert launch_shape(rows, vocab, itemsize, 132, read_twice=True) == shape


def test_rows_that_are_read_once_are_split_where_they_are_few() -> None:
    assert launch_shape(200, 128_256, 2, 132, read_twice=False) == LaunchShape(256, 3)
    assert launch_shape(264, 128_256, 2, 132, read_twice=False) == LaunchShape(1024)


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("gradient", ["none", "in place", "apart"])
def test_programs_that_take_several_rows(programs: int, gradient: str) -> None:
    case, truth, budget = solved(torch.float32, 7, 613, "all")
    tile = case.logits.clone()
    grad = {"none": None, "in place": tile, "apart": poisoned(case)}[gradient]
    moved = Case(tile, case.targets, case.row_scale, case.bias, case.softcap, case.logit_scale)
    result = run(launcher_of(LaunchShape(1024, programs=programs)), moved, grad)
    assert_within_budget(result, truth[3].float() if grad is None else grad, truth, budget)


def test_every_call_has_a_form_that_is_compiled_ahead_of_time() -> None:
    seen = set()
    for tile_dtype, grad_dtype, vocab, padding, shift, transformed, entropy in itertools.product(
        DTYPES, [None, "in place", *DTYPES], [16, 13], [0, 3], [0, 1], [False, True], [False, True]
    ):
        tile, _ = placed(torch.zeros(2, vocab), vocab + padding, shift, tile_dtype)
        for grad_shift in (0, 1):
            grad = tile
            if isinstance(grad_dtype, torch.dtype):
                grad, _ = placed(tile, vocab + padding, grad_shift, grad_dtype)
            if grad_dtype is None or has_form(tile_dtype, grad.dtype):
                seen.add(form_of(tile, grad if grad_dtype else None, transformed, entropy))
    assert seen == set(all_forms())
    assert len(seen) == len(list(all_forms()))


def test_variants_cover_every_form_with_every_number_of_threads() -> None:
    names = [variant.name for variant in aot_variants()]
    assert len(set(names)) == len(names)
    assert set(names) == {f"row_logprob {form}, {threads} threads" for form in all_forms() for threads in THREADS}


@pytest.mark.parametrize("tile", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("grad", [None, *DTYPES], ids=dtype_id)
@pytest.mark.parametrize("aligned", [True, False])
def test_only_gradients_in_step_with_the_tile_are_split(
    tile: torch.dtype, grad: torch.dtype | None, aligned: bool
) -> None:
    form = RowForm(tile, grad, aligned, grad is not None and aligned, False, False)
    assert form.can_split == (grad is None or (grad == tile and aligned))


def test_float64_is_refused(launcher: RowLogprobLauncher) -> None:
    with pytest.raises(ValueError, match=r"logits: expected dtype float32, bfloat16 or float16 for Triton, got torch"):
        launcher(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))


def test_no_rows(launcher: RowLogprobLauncher) -> None:
    result = launcher(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), entropy=True, grad_out=torch.zeros(0, 5))
    assert [tuple(value.shape) for value in result if value is not None] == [(0,)] * 3
