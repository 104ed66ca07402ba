"""row_logprob in Triton by threads, programs and segments, around what it chooses by itself: to tune that choice."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from robust_dpo.bench.cases.row_kernel import RowCase
from robust_dpo.bench.record import Role, Row
from robust_dpo.bench.workbench import Workbench
from robust_dpo.kernels.row_logprob import RowLogprobLauncher

# Triton is no dependency: where it cannot be imported these cases are never measured.
if TYPE_CHECKING:
    from robust_dpo.kernels.row_launch import LaunchShape


def shapes_around(chosen: LaunchShape, multiprocessors: int) -> list[LaunchShape]:
    """The chosen launch shape first, then: every number of threads with a program for every row; half and twice as many
    programs that take rows in turns; half and twice as many segments.
    """
    from robust_dpo.kernels.row_launch import MAX_SEGMENTS, SPLIT_THREADS, THREADS

    whole = replace(chosen, segments=1, programs=None)
    programs = chosen.programs or multiprocessors
    # Where no row is split: by 2, 4 and 8.
    segments = chosen.segments if chosen.segments > 1 else 4
    found = [
        chosen,
        *(replace(whole, threads=threads) for threads in THREADS),
        *(replace(whole, threads=max(THREADS), programs=max(1, count)) for count in around(programs)),
        *(
            replace(whole, threads=SPLIT_THREADS, segments=count)
            for count in around(segments)
            if 1 < count <= MAX_SEGMENTS
        ),
    ]
    return list(dict.fromkeys(found))


def around(count: int) -> tuple[int, int, int]:
    """Half as many, so many, twice as many."""
    return count // 2, count, 2 * count


@dataclass(frozen=True)
class RowShapesCase(RowCase):
    """One tile under several launch shapes; fields as in `RowCase`."""

    @property
    def name(self) -> str:
        return f"launch shapes of {super().name}"

    @property
    def group(self) -> str:
        return "shapes"

    @property
    def title(self) -> str:
        return f"Launch shapes of {super().title}"

    def launchers(self, bench: Workbench) -> list[tuple[Row, RowLogprobLauncher]]:
        from robust_dpo.kernels.gpu import gpu_of
        from robust_dpo.kernels.row_launch import launch_shape
        from robust_dpo.kernels.row_logprob_triton import row_logprob

        multiprocessors = gpu_of(bench.device).multiprocessors
        chosen = launch_shape(self.rows, self.vocab, self.dtype.itemsize, multiprocessors, read_twice=self.gradient)
        return [
            (
                Row(label(shape, chosen), Role.OURS, parameters=asdict(shape)),
                functools.partial(row_logprob, shape=shape),
            )
            for shape in shapes_around(chosen, multiprocessors)
        ]


def label(shape: LaunchShape, chosen: LaunchShape) -> str:
    """For a table."""
    parts = [f"{shape.threads} threads"]
    if shape.segments > 1:
        parts.append(f"{shape.segments} segments")
    if shape.programs is not None:
        parts.append(f"{shape.programs} programs")
    return ", ".join(parts) + (" (chosen)" if shape == chosen else "")
