"""How row_logprob is launched in Triton: the forms of its kernels, and how many threads and programs take a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from robust_dpo.errors import argument_error
from robust_dpo.kernels.gpu import gpu_of
from robust_dpo.kernels.triton_aot import MAX_THREADS, Variant

# Of one load instruction; the widest on sm_80 and sm_90.
LOAD_BYTES = 16
# That a thread takes in one step of a loop: 16 registers in fp32, of the 64 that 1,024 threads leave to each. In bf16
# these are 32 bytes, 4.3 MB under way on 132 multiprocessors, where 3.4 TB/s × 0.7 µs of latency = 2.4 MB are needed.
ELEMENTS_PER_THREAD = 16
# Bias and softcap need registers of their own: with 64, 16 elements would spill (sm_90).
CROWDED_ELEMENTS_PER_THREAD = 8
# Programs that a multiprocessor has at a time, by their threads: what 2,048 threads and 65,536 registers allow (32, 40
# and 54 for each thread in bf16; more in fp32, so fewer programs).
RESIDENT_PROGRAMS = {256: 8, 512: 3, 1024: 1}
THREADS = tuple(RESIDENT_PROGRAMS)
# The caches have 40 MB (A100) and 50 MB (H100, H200); the rest is for the rows just done and those about to begin.
CACHE_BYTES = 32 << 20
SPLIT_THREADS = 256
# That share the rows of a multiprocessor where rows are split.
SPLIT_PROGRAMS = 4
# Two steps of the loop in bf16, one in fp32: shorter segments would leave threads idle.
SEGMENT_BYTES = 16 << 10
MAX_SEGMENTS = 64

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class LaunchShape:
    """Args:
    threads: of a program, one of `THREADS`.
    segments: programs that share a row, at most 64.
    programs: of 1,024 threads, that go over the rows, one row after the other; None: one for every row.
    """

    threads: int
    segments: int = 1
    programs: int | None = None

    def __post_init__(self) -> None:
        if self.threads not in THREADS:
            raise argument_error("threads", f"one of {', '.join(map(str, THREADS))}", self.threads)
        if not 1 <= self.segments <= MAX_SEGMENTS:
            raise argument_error("segments", f"from 1 to {MAX_SEGMENTS}", self.segments)
        if self.programs is not None and (self.threads != THREADS[-1] or self.programs < 1):
            raise argument_error("programs", f"None, or at least 1 of {THREADS[-1]} threads", self.programs)


def launch_shape(rows: int, vocab: int, itemsize: int, multiprocessors: int, *, read_twice: bool) -> LaunchShape:
    """What suits a tile [rows, vocab] with elements of `itemsize` bytes.

    Few rows are split, so that every multiprocessor has work: fewer than two per multiprocessor, or, where the tile
    does not fit into the cache but is read twice, fewer than half a one (splitting reads the whole tile before any of
    it again). Otherwise a program takes a row, with the fewest threads (several rows per multiprocessor hide each
    other's beginnings and ends) that keep the rows in flight within the cache.

    Where one row for each multiprocessor is more than the cache holds, fewer programs go over the rows that are read
    twice: 64 of them with 256,000 logits in bf16, which keep 64 · 1,024 · 32 bytes = 2.1 MB under way. All take the
    same number of rows, but for the last turn.
    """
    row_bytes = vocab * itemsize
    fits = not read_twice or rows * row_bytes <= CACHE_BYTES
    if 0 < rows < (2 * multiprocessors if fits else multiprocessors // 2):
        wanted = triton.cdiv(multiprocessors * SPLIT_PROGRAMS, rows)
        segments = min(wanted, row_bytes // SEGMENT_BYTES, MAX_SEGMENTS)
        if segments > 1:
            return LaunchShape(SPLIT_THREADS, segments)
    held = max(1, CACHE_BYTES // row_bytes)
    resident = {threads: multiprocessors * programs for threads, programs in RESIDENT_PROGRAMS.items()}
    threads = next((each for each in THREADS if min(rows, resident[each]) <= held), THREADS[-1])
    if not read_twice or min(rows, resident[threads]) <= held:
        return LaunchShape(threads)
    turns = triton.cdiv(rows, held)
    return LaunchShape(threads, programs=triton.cdiv(rows, turns))


@dataclass(frozen=True)
class RowForm:
    """What of a call is compiled into the kernels.

    Args:
        tile: dtype of the logits.
        grad: dtype of the gradient, or None.
        aligned: rows of the tile (and of the gradient) begin at multiples of 16 bytes and are whole such vectors.
        wide_store: the gradient is a multiple of 16 bytes away from its element of the tile, or `aligned`.
        transformed: there is a bias or a softcap.
        entropy: it is computed.
    """

    tile: torch.dtype
    grad: torch.dtype | None
    aligned: bool
    wide_store: bool
    transformed: bool
    entropy: bool

    @property
    def can_split(self) -> bool:
        """Whether several programs may share a row: none writes what another still reads."""
        return self.grad is None or (self.grad == self.tile and self.wide_store)

    @property
    def vector(self) -> int:
        """Elements of the tile in 16 bytes."""
        return LOAD_BYTES // self.tile.itemsize

    def lanes(self, threads: int) -> int:
        """Vectors of 16 bytes that a program of that many threads takes in one step of its loop."""
        crowded = (self.transformed or self.is_narrowed) and threads == THREADS[-1]
        return threads * (CROWDED_ELEMENTS_PER_THREAD if crowded else ELEMENTS_PER_THREAD) // self.vector

    @property
    def is_narrowed(self) -> bool:
        """Whether elements of the gradient are shorter than those of the tile."""
        return self.grad is not None and self.grad.itemsize < self.tile.itemsize

    @property
    def eviction(self) -> str:
        """What becomes of a row in the cache after its first touch."""
        return "evict_first" if self.grad is None else "evict_last"

    def options(self, threads: int) -> dict[str, int]:
        """Launch options of programs of that many threads.

        Told how many registers there are, the compiler uses them; left to itself, it spilled 8 bytes (sm_80).
        """
        limit = {}
        if threads == THREADS[-1]:
            limit = {"maxnreg": 64}
        elif (
            threads == THREADS[0] and self.tile == self.grad == torch.float32 and not (self.transformed or self.entropy)
        ):
            limit = {"maxnreg": 56}
        return {"num_warps": threads // 32, **limit}

    def constants(self, threads: int) -> dict[str, object]:
        """The constexpr parameters of all row kernels, by name, for programs of that many threads."""
        return {
            "VECTOR": self.vector,
            "LANES": self.lanes(threads),
            "TAKES_TURNS": threads == THREADS[-1],
            "SEGMENTS": MAX_SEGMENTS,
            "ALIGNED": self.aligned,
            "WIDE_STORE": self.wide_store,
            "TRANSFORMED": self.transformed,
            "ENTROPY": self.entropy,
            "EVICTION": self.eviction,
        }

    def __str__(self) -> str:
        parts = [TYPE_NAMES[self.tile]]
        if self.grad is not None:
            parts.append(f"gradient {TYPE_NAMES[self.grad]}" + (" wide" if self.wide_store else ""))
        flags = {"aligned": self.aligned, "bias or softcap": self.transformed, "entropy": self.entropy}
        return ", ".join([*parts, *(name for name, is_on in flags.items() if is_on)])


def form_of(logits: Tensor, grad_out: Tensor | None, transformed: bool, entropy: bool) -> RowForm:
    """The form of a call; `grad_out` as in `RowLogprobLauncher`, `transformed`: there is a bias or a softcap."""
    aligned = _rows_aligned(logits) and logits.shape[1] * logits.itemsize % LOAD_BYTES == 0
    if grad_out is None:
        return RowForm(logits.dtype, None, aligned, False, transformed, entropy)
    aligned = aligned and _rows_aligned(grad_out)
    wide_store = aligned or (grad_out.dtype == logits.dtype and _same_phase(logits, grad_out))
    return RowForm(logits.dtype, grad_out.dtype, aligned, wide_store, transformed, entropy)


def aligned_bias(bias: Tensor | None) -> Tensor | None:
    """A bias as kernels want it: fp32, contiguous, from a multiple of 16 bytes on, so that there is one form of it."""
    if bias is None:
        return None
    bias = bias.detach().to(torch.float32).contiguous()
    return bias if bias.data_ptr() % LOAD_BYTES == 0 else bias.clone()


def segments_of(vocab: int, wanted: int, form: RowForm, threads: int) -> tuple[int, int]:
    """Into how many segments a row is cut, `wanted` at most, and how many vectors each has: whole steps of the loop, so
    that only the last segment has an incomplete one.
    """
    vectors, lanes = triton.cdiv(vocab, form.vector), form.lanes(threads)
    segment_vecs = triton.cdiv(triton.cdiv(vectors, lanes), wanted) * lanes
    return triton.cdiv(vectors, segment_vecs), segment_vecs


def has_form(tile: torch.dtype, grad: torch.dtype) -> bool:
    """Whether a gradient of this dtype is compiled for such tiles: of others nobody's hot path is made."""
    return grad == tile or tile == torch.float32


def _rows_aligned(matrix: Tensor) -> bool:
    stride = matrix.stride(0) * matrix.itemsize if len(matrix) > 1 else 0
    return matrix.data_ptr() % LOAD_BYTES == 0 and stride % LOAD_BYTES == 0


def _same_phase(logits: Tensor, grad_out: Tensor) -> bool:
    strides = (grad_out.stride(0) - logits.stride(0)) * logits.itemsize if len(logits) > 1 else 0
    return (grad_out.data_ptr() - logits.data_ptr()) % LOAD_BYTES == 0 and strides % LOAD_BYTES == 0


def all_forms() -> Iterator[RowForm]:
    """Every form that `form_of` can give."""
    flags = (False, True)
    for tile, transformed, entropy, aligned in itertools.product(TYPE_NAMES, flags, flags, flags):
        yield RowForm(tile, None, aligned, False, transformed, entropy)
        for grad in TYPE_NAMES:
            if has_form(tile, grad):
                yield RowForm(tile, grad, aligned, aligned, transformed, entropy)
        if not aligned:
            yield RowForm(tile, tile, False, True, transformed, entropy)


def argument_types(form: RowForm) -> dict[str, str]:
    """Triton types of the runtime parameters of all row kernels, by name."""
    pointers = {name: "*fp32" for name in ("p_bias", "p_row_scale", "p_partials", "p_logp", "p_lse", "p_entropy")}
    tile = f"*{TYPE_NAMES[form.tile]}"
    pointers |= {"p_logits": tile, "p_target_logits": tile, "p_targets": "*i64"}
    if form.grad is not None:
        pointers["p_grad"] = f"*{TYPE_NAMES[form.grad]}"
    counts = ("rows", "vocab", "segments", "segment_vecs", "has_bias", "has_row_scale", "has_entropy")
    return (
        pointers
        | dict.fromkeys(("stride", "grad_stride"), "i64")
        | dict.fromkeys(counts, "i32")
        | dict.fromkeys(("logit_scale", "softcap"), "fp32")
    )


# Rows, targets and results begin anywhere, and numbers differ from call to call: to compile for some of them would stop
# a training in the middle. What is aligned, the form says; a bias always is (`aligned_bias`).
RUNTIME_NUMBERS = (
    *("stride", "grad_stride", "rows", "vocab", "segments", "segment_vecs", "logit_scale", "softcap"),
    *("has_bias", "has_row_scale", "has_entropy"),
)
RUNTIME_POINTERS = (
    *(
        "p_logits",
        "p_targets",
        "p_target_logits",
        "p_row_scale",
        "p_partials",
        "p_logp",
        "p_lse",
        "p_entropy",
        "p_grad",
    ),
)
row_jit = triton.jit(do_not_specialize=[*RUNTIME_NUMBERS], do_not_specialize_on_alignment=[*RUNTIME_POINTERS])


def variant(label: str, kernel: Any, form: RowForm, threads: int) -> Variant:
    """The kernel in one form, as `launch` runs it."""
    types = {name: value for name, value in argument_types(form).items() if name in kernel.arg_names}
    constants = {name: value for name, value in form.constants(threads).items() if name in kernel.arg_names}
    if "p_grad" in kernel.arg_names and form.grad is None:
        constants["p_grad"] = None
    # A bias is fp32 and its rows begin where no row of the tile does: not 16 bytes at a time unless all is aligned. And
    # the entropy together with a gradient is what no operator asks for.
    hot = (form.aligned or not form.transformed) and not (form.entropy and form.grad is not None)
    name = f"{label} {form}, {threads} threads"
    return Variant(name, kernel, types, constants, frozenset({"p_bias"}), form.options(threads), hot)


def launch(
    kernel: Any, programs: int, form: RowForm, threads: int, device: torch.device, values: Mapping[str, object]
) -> None:
    """Run `programs` programs of a row kernel, with those of `values` (by parameter) that it has."""
    constants, options = form.constants(threads), form.options(threads)
    arguments = {name: value for name, value in {**values, **constants}.items() if name in kernel.arg_names}
    options["num_warps"] = min(options["num_warps"], MAX_THREADS // gpu_of(device).warp_size)
    if torch.version.hip is not None:
        options.pop("maxnreg", None)
    # Fused multiply-add is the default; newer versions warn where it is not asked for.
    kernel[(programs,)](**arguments, **options, enable_fp_fusion=True)
