"""Every Triton kernel, compiled for chips that need not be here, and the reader of what the compiler makes of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed: there is nothing to compile")

from aot_samples import aot_variants, copy_kernel

from robust_dpo.kernels.triton_aot import (
    TARGETS,
    CompileReport,
    compile_variant,
    kernel_modules,
    variants_of,
)
from robust_dpo.kernels.triton_assembly import AMDGCN, PTX, Access, Dialect, global_accesses

ROOT = Path(__file__).resolve().parents[1]
# All variants for the chip that most run on; of the others, so many of each kernel.
FULL_TARGET, OTHER_TARGETS, SAMPLE = "sm_90", ("sm_80", "sm_100", "gfx942"), 4
KERNELS = sorted({variant.kernel.__name__ for module in kernel_modules() for variant in variants_of(module)})
Row = dict[str, Any]


def kernel_report(folder: Path, *arguments: str) -> tuple[list[Row], subprocess.CompletedProcess[str]]:
    """Rows of benchmarks/kernel_report.py, run where kernels are not interpreted, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    path = folder / "report.json"
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "kernel_report.py"), "--jobs", "2"]
    command += ["--json", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert path.exists(), done.stderr
    rows: list[Row] = json.loads(path.read_text())["variants"]
    return rows, done


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Reports of the package's kernels."""
    every, _ = kernel_report(tmp_path_factory.mktemp("full"), "--targets", FULL_TARGET)
    some, _ = kernel_report(
        tmp_path_factory.mktemp("sample"), "--targets", ",".join(OTHER_TARGETS), "--sample", str(SAMPLE)
    )
    return every + some


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    """Reports of the kernels in aot_samples.py, by (variant, target)."""
    found, done = kernel_report(tmp_path_factory.mktemp("samples"), "--module", "aot_samples")
    assert done.returncode == 1, "samples that spill must fail the command"
    assert "12 with problems" in done.stdout
    return {(row["variant"], row["target"]): row for row in found}


def of(rows: list[Row], kernel: str, target: str) -> list[Row]:
    found = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
    assert found, f"no variant of {kernel} was compiled for {target}"
    return found


def hot_reports(rows: list[Row]) -> dict[str, Row]:
    return {row["variant"]: row["report"] for row in rows if row["report"] and row["report"]["hot"]}


# Vectors whose indices stay below 2³¹ by what they are: the vocabulary, three numbers.
SHORT_VECTORS = {"p_bias", "p_state"}


@pytest.mark.parametrize("target", [FULL_TARGET, *OTHER_TARGETS])
@pytest.mark.parametrize("kernel", KERNELS)
class TestKernels:
    def test_compiles(self, rows: list[Row], kernel: str, target: str) -> None:
        assert {row["variant"]: row["error"] for row in of(rows, kernel, target) if row["error"]} == {}

    def test_hot_variants_do_not_spill(self, rows: list[Row], kernel: str, target: str) -> None:
        reports = hot_reports(of(rows, kernel, target))
        spilling = {name: report for name, report in reports.items() if report["local_bytes"] or report["spill_bytes"]}
        assert spilling == {}

    def test_loops_of_hot_variants_load_16_bytes_at_a_time(self, rows: list[Row], kernel: str, target: str) -> None:
        reports = hot_reports(of(rows, kernel, target))
        widths = {name: report["loop_loads"] for name, report in reports.items()}
        assert {name: loads for name, loads in widths.items() if any(int(width) < 16 for width in loads)} == {}

    def test_fits_the_chip(self, rows: list[Row], kernel: str, target: str) -> None:
        for row in of(rows, kernel, target):
            report = row["report"]
            assert report, row["error"]
            threads = 32 * report["num_warps"]
            if target != "gfx942":  # registers go to warps in units of 8 per thread
                assert -(-report["registers"] // 8) * 8 * threads <= 65536, row["variant"]
            assert report["shared_bytes"] <= TARGETS[target].shared_limit, row["variant"]
            assert row["problems"] == [], row["variant"]

    def test_offsets_have_64_bits(self, rows: list[Row], kernel: str, target: str) -> None:
        for row in of(rows, kernel, target):
            bits = row["report"]["offset_bits"]
            narrow = {name for name, width in bits.items() if width < 64}
            assert narrow <= SHORT_VECTORS, row["variant"]


def test_row_kernels_are_hot_and_loop_over_global_memory(rows: list[Row]) -> None:
    """What the tests above look at is there: otherwise they would pass with nothing to see."""
    hot = [row["report"] for row in rows if row["kernel"].startswith("row_logprob") and row["report"]["hot"]]
    assert hot
    assert any(report["loop_loads"] for report in hot)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(tmp_path: Path, target: str) -> None:
    found, done = kernel_report(tmp_path, "--targets", target)
    assert {row["variant"]: row["problems"] for row in found if row["problems"]} == {}
    assert done.returncode == 0


NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda" and name != "sm_120"]


@pytest.mark.parametrize("target", NVIDIA)
class TestReaderOnNvidia:
    def test_sees_wide_loads_in_a_loop(self, samples: dict[tuple[str, str], Row], target: str) -> None:
        row = samples["wide", target]
        assert row["problems"] == []
        assert row["report"]["loop_loads"] == {"16": 1}  # 1,024 bf16 over 128 threads: 8 each
        assert row["report"]["other_stores"] == {"4": 1}

    def test_sees_scalar_loads_in_a_loop(self, samples: dict[tuple[str, str], Row], target: str) -> None:
        row = samples["scalar", target]
        assert row["report"]["loop_loads"] == {"2": 8}
        assert row["problems"] == ["loads narrower than 16 bytes in a loop: 8 of 2 bytes"]

    def test_asks_only_hot_kernels_for_wide_loads(self, samples: dict[tuple[str, str], Row], target: str) -> None:
        assert samples["scalar, cold", target]["report"]["loop_loads"] == {"2": 8}
        assert samples["scalar, cold", target]["problems"] == []

    def test_tells_loops_from_straight_code(self, samples: dict[tuple[str, str], Row], target: str) -> None:
        report = samples["copy", target]["report"]
        assert (report["loop_loads"], report["other_loads"], report["other_stores"]) == ({}, {"16": 2}, {"16": 2})

    def test_sees_spills(self, samples: dict[tuple[str, str], Row], target: str) -> None:
        row = samples["hoard", target]
        # 2 × 256 values of 4 bytes want to live in 255 registers at most
        assert row["report"]["local_bytes"] >= 4 * (512 - 255)
        assert row["report"]["spill_bytes"] >= row["report"]["local_bytes"]
        assert row["problems"][0].startswith("spills: ")


def test_reader_on_amd(samples: dict[tuple[str, str], Row]) -> None:
    assert samples["wide", "gfx942"]["report"]["loop_loads"] == {"8": 1}  # 1,024 bf16 over 4 × 64 threads: 4 each
    assert samples["scalar", "gfx942"]["report"]["loop_loads"] == {"2": 4}
    assert samples["copy", "gfx942"]["report"]["other_loads"] == {"16": 1}
    hoard = samples["hoard", "gfx942"]["report"]  # 2 × 128 values fit into 512 registers
    assert 256 < hoard["registers"] <= 512
    assert hoard["spill_bytes"] == 0
    assert hoard["scalar_registers"] > 0


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_what_does_not_compile_is_reported_and_stops_nothing(samples: dict[tuple[str, str], Row], target: str) -> None:
    row = samples["broken", target]
    assert row["report"] is None
    assert "CompilationError" in row["error"]
    assert "power of 2" in row["error"]
    assert len(row["problems"]) == 1


def test_reads_the_width_of_offsets(samples: dict[tuple[str, str], Row]) -> None:
    assert samples["wide", "sm_90"]["report"]["offset_bits"] == {"p_x": 64, "p_y": 32}
    assert samples["copy", "sm_90"]["report"]["offset_bits"] == {"p_x": 32, "p_y": 32}


NESTED_LOOPS = """
.visible .entry f(.param .u64 f_param_0)
{
$L__func_begin0:
    ld.param.b64 %rd1, [f_param_0];
    ld.global.L1::evict_last.b32 %r1, [%rd1];      // bra $L__BB0_1; in a comment is no jump
    @%p1 bra $L__BB0_4;
$L__BB0_1:
    @%p2 ld.global.nc.v2.b64 {%rd2, %rd3}, [%rd1];
$L__BB0_2:
    cp.async.cg.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x10, 0x10;
    @%p3 bra $L__BB0_2;
    st.global.v4.b16 [%rd1], {%rs1, %rs2, %rs3, %rs4};
    ld.shared.b8 %rs9, [%r4];
    @!%p4 bra $L__BB0_1; mov.u32 %r1, 0;
    bra.uni $L__BB0_5;
$L__BB0_4: ld.global.u8 %rs5, [%rd1];
$L__BB0_5:
    ld.relaxed.gpu.global.v8.f32 {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8}, [%rd1];
    atom.global.add.f32 %f1, [%rd1], 0f3F800000;
    ret;
}
"""


def test_reads_ptx() -> None:
    assert global_accesses(NESTED_LOOPS, PTX) == [
        Access("load", 4, False),
        Access("load", 16, False),
        Access("load", 16, True),
        Access("store", 8, False),
        Access("load", 1, False),
        Access("load", 32, False),
    ]


@pytest.mark.parametrize(
    ("jumps", "wide"),
    [
        # Two loops in one, of which one shares the label that the outer loop begins with.
        ("a: {a} $p bra b; b: {b} $p bra a; c: {c} $p bra c; $p bra a; ret;", {"a", "b", "c"}),
        ("a: {a} b: {b} $p bra b; c: {c} $p bra a; ret;", {"b"}),
        ("a: {a} b: {b} $p bra b; c: {c} $p bra c; d: {d} $p bra a; ret;", {"b", "c"}),
        ("a: {a} bra c; b: {b} bra a; c: {c} $p bra b; ret;", {"a", "b", "c"}),
    ],
    ids=["shared-header", "nested", "two-inside", "rotated"],
)
def test_loops_that_hold_no_other(jumps: str, wide: set[str]) -> None:
    widths = {"a": 1, "b": 2, "c": 4, "d": 8}
    loads = {name: f"ld.global.b{8 * width} %r1, [%rd1];" for name, width in widths.items()}
    text = re.sub(r"\b([abcd])(?=[:;])", r"$L_\1", jumps.format(**loads)).replace("$p", "@%p1").replace("; ", ";\n")
    in_loops = {access.width for access in global_accesses(text, PTX) if access.in_loop}
    assert in_loops == {widths[name] for name in wide}


def test_reads_amdgcn() -> None:
    text = """
f:                                     ; @f
    buffer_load_dwordx3 v[0:2], v0, s[8:11], 0 offen
    s_branch .LBB0_2
.LBB0_1:                               ; in Loop: global_load_dword in a comment
    global_load_ushort v3, v[2:3], off
    flat_store_byte v[2:3], v1
.LBB0_2:
    global_load_dwordx4 v[2:5], v[2:3], off
    s_load_dwordx2 s[2:3], s[0:1], 0x0
    ds_read_b32 v0, v0
    s_cbranch_scc1 .LBB0_1
    global_store_dword v1, v0, s[0:1]
    s_endpgm
"""
    assert global_accesses(text, AMDGCN) == [
        Access("load", 12, False),
        Access("load", 2, True),
        Access("store", 1, True),
        Access("load", 16, True),
        Access("store", 4, False),
    ]


@pytest.mark.parametrize(
    ("text", "dialect"),
    [
        pytest.param("brx.idx %r1, $L_brx_0;", PTX, id="ptx-table"),
        pytest.param("s_setpc_b64 s[0:1]", AMDGCN, id="amdgcn-address"),
    ],
)
def test_refuses_jumps_that_it_cannot_follow(text: str, dialect: Dialect) -> None:
    with pytest.raises(ValueError, match="loops cannot be told"):
        global_accesses(text, dialect)


GOOD = CompileReport("f_kernel", "f", "sm_80", True, 4, 128, 0, 0, 0, 0, {16: 2}, {4: 1}, {}, {}, {"p_x": 64}, 0.1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param({}, None, id="good"),
        pytest.param({"registers": 255, "num_warps": 8}, None, id="most-registers"),
        pytest.param({"registers": 129, "num_warps": 16}, "129 registers", id="too-many-registers"),
        pytest.param({"registers": 64, "num_warps": 32}, None, id="1024-threads"),
        pytest.param({"registers": 65, "num_warps": 32}, "65 registers", id="1024-threads-too-many-registers"),
        pytest.param({"shared_bytes": 163 * 1024 + 1}, "shared memory", id="shared-memory"),
        pytest.param({"shared_bytes": 227 * 1024, "target": "sm_90"}, None, id="shared-memory-of-a-larger-chip"),
        pytest.param({"local_bytes": 8}, "8 bytes of local memory", id="stack"),
        pytest.param({"local_bytes": 8, "spill_bytes": 16, "hot": False}, None, id="cold-spill"),
        pytest.param({"loop_loads": {8: 3, 16: 1, 32: 1}}, "3 of 8 bytes", id="narrow"),
        pytest.param({"loop_loads": {4: 1}, "hot": False}, None, id="cold-narrow"),
    ],
)
def test_problems(change: dict[str, Any], problem: str | None) -> None:
    problems = dataclasses.replace(GOOD, **change).problems()
    assert problems == [] if problem is None else (len(problems) == 1 and problem in problems[0]), problems


BAD_VARIANTS = [
    pytest.param({"arguments": {"p_x": "*fp32", "n": "i32"}}, "each parameter once", id="parameter-missing"),
    pytest.param({"constants": {"BLOCK": 128, "n": 1}}, "each parameter once", id="parameter-twice"),
    pytest.param({"divisible": frozenset({"BLOCK"})}, "divisible", id="divisible-constant"),
]


@pytest.mark.parametrize(("change", "message"), BAD_VARIANTS)
def test_variants_that_do_not_fit_their_kernel(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("robust_dpo.kernels.triton_aot.JITFunction", type(copy_kernel))  # interpreted in this process
    good = next(variant for variant in aot_variants() if variant.name == "copy")
    with pytest.raises(ValueError, match=message):
        compile_variant(dataclasses.replace(good, **change), TARGETS["sm_90"])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process")
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compile_variant(aot_variants()[0], TARGETS["sm_90"])


def test_kernels_without_a_variant_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without = [variant for variant in aot_variants() if variant.name != "copy"]
    monkeypatch.setattr("aot_samples.aot_variants", lambda: without)
    with pytest.raises(ValueError, match=r"aot_samples\.aot_variants: .*copy_kernel"):
        variants_of("aot_samples")
    monkeypatch.setattr("aot_samples.aot_variants", lambda: [*aot_variants(), *aot_variants()])
    with pytest.raises(ValueError, match="a name of its own"):
        variants_of("aot_samples")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--targets", "sm_90,sm_7"], ["--targets: expected some of sm_80", "got sm_7"]),
        (["--module", "nowhere.kernels"], ["--module: expected a module installed", "got nowhere.kernels"]),
    ],
    ids=["target", "module"],
)
def test_bad_calls_of_the_report(arguments: list[str], messages: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_report.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert [message for message in messages if message not in done.stderr] == []
