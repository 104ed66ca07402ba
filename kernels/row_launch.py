"""How row_logprob is launched in Triton: the forms of its kernels, and how many threads and programs take a row."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_dpo.kernels.triton_aot import MAX_THREADS, Variant

# Of one load instruction; the widest on sm_80 and sm_90.
LOAD_BYTES = 16
# That a thread takes in one step of a loop: 16 registers in fp32, of the 64 that 1,024 threads leave to each. In bf16
# these are 32 bytes, 4.3 MB under way on 132 multiprocessors, where 3.4 TB/s × 0.7 µs of latency = 2.4 MB are needed.
ELEMENTS_PER_THREAD = 16
# Bias and softcap need registers of their own: with 64, 16 elements would spill (sm_90).
CROWDED_ELEMENTS_PER_THREAD = 8
# With up to 64 registers per thread the 65,536 of a multiprocessor hold that many threads.
THREADS_PER_MULTIPROCESSOR = 1024
# The caches have 40 MB (A100) and 50 MB (H100, H200); the rest is for the rows just done and those about to begin.
CACHE_BYTES = 32 << 20
SPLIT_THREADS = 256
# Two steps of the loop in bf16, one in fp32: shorter segments would leave threads idle.
SEGMENT_BYTES = 16 << 10
MAX_SEGMENTS = 64

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class LaunchShape:
    """Args:
    threads: of a program, a power of two from 128 to 1,024.
    segments: programs that share a row, at most 64.
    """

    threads: int
    segments: int = 1


def launch_shape(rows: int, vocab: int, itemsize: int, multiprocessors: int) -> LaunchShape:
    """What suits a tile [rows, vocab] with elements of `itemsize` bytes.

    Fewer rows than two per multiprocessor, and long ones, are split, so that every multiprocessor has work. Otherwise a
    program takes a row, with the fewest threads (several rows per multiprocessor hide each other's beginnings and
    ends) that keep the rows in flight within the cache, because each is read twice: bf16 rows of up to 31,775 logits
    take 256 threads on 132 multiprocessors, up to 63,550 take 512, longer ones 1,024.
    """
    row_bytes = vocab * itemsize
    if 0 < rows < 2 * multiprocessors:
        wanted = -(-multiprocessors * THREADS_PER_MULTIPROCESSOR // (SPLIT_THREADS * rows))
        segments = min(wanted, row_bytes // SEGMENT_BYTES, MAX_SEGMENTS)
        if segments > 1:
            return LaunchShape(SPLIT_THREADS, segments)
    threads = 128
    while threads < THREADS_PER_MULTIPROCESSOR:
        in_flight = min(rows, multiprocessors * (THREADS_PER_MULTIPROCESSOR // threads))
        if in_flight * row_bytes <= CACHE_BYTES:
            break
        threads *= 2
    return LaunchShape(threads)


@dataclass(frozen=True)
class RowForm:
    """What of a call is compiled into the kernels.

    Args:
        tile: dtype of the logits.
        grad: dtype of the gradient, or None.
        aligned: rows of the tile (and of the gradient) begin at multiples of 16 bytes, and so does the bias; whole
            vectors of 16 bytes make up a row.
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
        crowded = self.transformed and threads == THREADS_PER_MULTIPROCESSOR
        return threads * (CROWDED_ELEMENTS_PER_THREAD if crowded else ELEMENTS_PER_THREAD) // self.vector

    def constants(self, threads: int) -> dict[str, object]:
        """The constexpr parameters of all row kernels, by name, for programs of that many threads."""
        return {
            "VECTOR": self.vector,
            "LANES": self.lanes(threads),
            "SEGMENTS": MAX_SEGMENTS,
            "ALIGNED": self.aligned,
            "WIDE_STORE": self.wide_store,
            "TRANSFORMED": self.transformed,
            "ENTROPY": self.entropy,
        }

    def __str__(self) -> str:
        parts = [TYPE_NAMES[self.tile]]
        if self.grad is not None:
            parts.append(f"gradient {TYPE_NAMES[self.grad]}" + (" wide" if self.wide_store else ""))
        flags = {"aligned": self.aligned, "bias or softcap": self.transformed, "entropy": self.entropy}
        return ", ".join([*parts, *(name for name, is_on in flags.items() if is_on)])


def form_of(logits: Tensor, grad_out: Tensor | None, bias: Tensor | None, capped: bool, entropy: bool) -> RowForm:
    """The form of a call; `grad_out` as in `RowLogprobLauncher`, `bias` contiguous."""
    aligned = _rows_aligned(logits) and logits.shape[1] * logits.itemsize % LOAD_BYTES == 0
    aligned = aligned and (bias is None or bias.data_ptr() % LOAD_BYTES == 0)
    transformed = bias is not None or capped
    if grad_out is None:
        return RowForm(logits.dtype, None, aligned, False, transformed, entropy)
    aligned = aligned and _rows_aligned(grad_out) and _has_aligned_form(logits.dtype, grad_out.dtype)
    wide_store = aligned or (grad_out.dtype == logits.dtype and _same_phase(logits, grad_out))
    return RowForm(logits.dtype, grad_out.dtype, aligned, wide_store, transformed, entropy)


def _has_aligned_form(tile: torch.dtype, grad: torch.dtype) -> bool:
    # A 16-bit tile with a gradient of another dtype is nobody's hot path: one form less to compile.
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
            if not aligned or _has_aligned_form(tile, grad):
                yield RowForm(tile, grad, aligned, aligned, transformed, entropy)
        if not aligned:
            yield RowForm(tile, tile, False, True, transformed, entropy)


def argument_types(form: RowForm) -> dict[str, str]:
    """Triton types of the runtime parameters of all row kernels, by name."""
    pointers = {name: "*fp32" for name in ("p_bias", "p_row_scale", "p_partials", "p_logp", "p_lse", "p_entropy")}
    pointers |= {"p_logits": f"*{TYPE_NAMES[form.tile]}", "p_targets": "*i64"}
    if form.grad is not None:
        pointers["p_grad"] = f"*{TYPE_NAMES[form.grad]}"
    counts = ("vocab", "segments", "segment_vecs", "has_bias", "has_row_scale", "has_entropy")
    return (
        pointers
        | dict.fromkeys(("stride", "grad_stride"), "i64")
        | dict.fromkeys(counts, "i32")
        | dict.fromkeys(("logit_scale", "softcap"), "fp32")
    )


def variant(label: str, kernel: Any, form: RowForm, threads: int) -> Variant:
    """The kernel in one form, as `launch` runs it."""
    types = {name: value for name, value in argument_types(form).items() if name in kernel.arg_names}
    constants = {name: value for name, value in form.constants(threads).items() if name in kernel.arg_names}
    if "p_grad" in kernel.arg_names and form.grad is None:
        constants["p_grad"] = None
    pointers = frozenset(name for name in types if name.startswith("p_"))
    # A bias is fp32 and its rows begin where no row of the tile does: not 16 bytes at a time unless all is aligned.
    hot = form.aligned or not form.transformed
    name = f"{label} {form}, {threads} threads"
    return Variant(name, kernel, types, constants, pointers, {"num_warps": threads // 32}, hot)


def launch(kernel: Any, programs: int, form: RowForm, threads: int, values: Mapping[str, object]) -> None:
    """Run `programs` programs of a row kernel, with those of `values` (by parameter) that it has."""
    constants = form.constants(threads)
    arguments = {name: value for name, value in {**values, **constants}.items() if name in kernel.arg_names}
    # Fused multiply-add is the default; newer versions warn where it is not asked for.
    kernel[(programs,)](**arguments, num_warps=min(threads // 32, MAX_THREADS // warp_size()), enable_fp_fusion=True)


@functools.cache
def warp_size() -> int:
    """Threads that run in step: 64 on AMD's data centre GPUs, else 32."""
    return torch.cuda.get_device_properties(0).warp_size if torch.version.hip is not None else 32
