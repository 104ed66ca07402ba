"""What the compiler made of the CUDA kernels, read from the extension that ships; needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from setup_module import build_module

from robust_dpo.kernels.cuda_assembly import KernelReport, find_cuobjdump, read_kernel, reports_of
from robust_dpo.probes import BUILD_REPORT


@pytest.fixture(scope="module")
def extension() -> Path:
    """The CUDA extension; where a toolkit is found it must have been built, unless the build was to leave it out."""
    spec = importlib.util.find_spec("robust_dpo._cuda")
    if spec is None:
        why = json.loads(BUILD_REPORT.read_text(encoding="utf-8"))["cuda"] if BUILD_REPORT.exists() else "never built"
        if nvcc() is not None and why.startswith("could not be compiled"):
            pytest.fail(f"there is a CUDA toolkit, but the extension {why}")
        pytest.skip(f"the CUDA extension is not built: {why}")
    assert spec.origin is not None
    return Path(spec.origin)


@pytest.fixture(scope="module")
def reports(extension: Path) -> list[KernelReport]:
    if find_cuobjdump() is None:
        pytest.skip("needs cuobjdump, which comes with Triton and with CUDA toolkits")
    return reports_of(extension)


def nvcc() -> Path | None:
    """The compiler that setup.py finds."""
    toolkits = build_module("toolkit")
    try:
        return Path(toolkits.find_toolkit().nvcc)
    except toolkits.CompileError:
        return None


def architectures() -> tuple[str, ...]:
    from robust_dpo import _cuda

    return tuple(_cuda.ARCHITECTURES.split())


def test_every_chip_has_every_kernel(extension: Path, reports: list[KernelReport]) -> None:
    chips = [name for name in architectures() if name.startswith("sm_")]
    assert chips and {report.chip for report in reports} == set(chips)
    for chip in chips:
        names = [report.kernel for report in reports if report.chip == chip]
        assert len(names) == len(set(names))
        assert sum(name.startswith("row_logprob_kernel<") for name in names) == 12  # 3 dtypes, transformed, entropy
        assert sum(name.startswith("group_epilogue_kernel<") for name in names) == 9
        assert sum(name.startswith("rescale_kernel<") for name in names) == 4
        assert sum(name.startswith("calibration_weights_kernel<") for name in names) == 4
        assert "row_coefficients_kernel" in names


def test_hot_kernels_neither_spill_nor_load_narrowly(reports: list[KernelReport]) -> None:
    hot = [report for report in reports if report.hot]
    assert len(hot) == 10 * len({report.chip for report in reports})
    assert [(report.kernel, report.chip, *report.problems()) for report in hot if report.problems()] == []


def test_two_blocks_of_the_row_kernel_share_a_multiprocessor(reports: list[KernelReport]) -> None:
    # kernels/row_plan_cuda.py counts on that: 2 × 512 threads × 64 registers are all there are.
    for report in reports:
        if report.kernel.startswith("row_logprob_kernel<"):
            assert report.registers <= 64, report
            assert report.local_bytes == 0 and report.spill_instructions == 0, report


def test_ptx_for_later_chips_is_there(extension: Path) -> None:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump")
    newest = architectures()[-1]
    assert newest.startswith("compute_")
    listing = subprocess.run([tool, "-lptx", str(extension)], capture_output=True, text=True, check=True).stdout
    assert newest.replace("compute_", "sm_") in listing


def test_extension_needs_no_driver_and_no_torch(extension: Path) -> None:
    content = extension.read_bytes()
    for library in (b"libcuda.so.1\0libc", b"libcudart.so", b"libtorch", b"libc10", b"at6Tensor"):
        assert library not in content
    assert extension.stat().st_size < 15_000_000
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("robust_dpo._cuda", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.ARCHITECTURES)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(architectures())


SAMPLE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                            /* 0x00 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;                      /* 0x00 */
        /*0020*/                   LDG.E.{load} R4, desc[UR4][R8.64+0x10] ;          /* 0x00 */
        /*0030*/                   {spill} [R1], R4 ;                                /* 0x00 */
        /*0040*/               @P0 BRA 0x20 ;                                        /* 0x00 */
        /*0050*/                   EXIT ;                                            /* 0x00 */
        /*0060*/                   BRA 0x60;                                         /* 0x00 */
"""


@pytest.mark.parametrize(
    ("load", "spill", "local", "problems"),
    [
        ("128", "STG.E", 0, []),
        ("64", "STG.E", 0, ["loads narrower than 16 bytes in a loop: 1 of 8 bytes"]),
        ("128.CONSTANT", "STL", 8, ["spills: 8 bytes of local memory, 1 instructions move it"]),
        ("128", "STG.E", 16, ["spills: 16 bytes of local memory, 0 instructions move it"]),
    ],
    ids=["good", "narrow", "spill", "stack"],
)
def test_reader_notices(load: str, spill: str, local: int, problems: list[str]) -> None:
    report = read_kernel("rescale_kernel<float>", "sm_90", SAMPLE.format(load=load, spill=spill), 32, local)
    assert report.problems() == problems
    assert report.other_loads == {4: 1}


def test_reader_notices_a_spill_of_the_compiler(tmp_path: Path) -> None:
    compiler = nvcc()
    if compiler is None or find_cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    source = tmp_path / "spilling.cu"
    source.write_text("""
        template <class T> __global__ void rescale_kernel(T* x, int n) {
            float values[64];
            for (int i = 0; i < 64; ++i) values[i] = x[i * n];
            for (int step = 0; step < n; ++step)
                for (int i = 0; i < 64; ++i) values[i] = values[i] * values[(i + 1) % 64] + x[step];
            for (int i = 0; i < 64; ++i) x[i * n] = values[i];
        }
        template __global__ void rescale_kernel<float>(float*, int);
    """)
    output = tmp_path / "spilling.o"
    command = [str(compiler), "-arch=sm_90", "-maxrregcount=32", "-c", str(source), "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    (report,) = reports_of(output)
    assert report.hot and report.local_bytes > 0 and report.spill_instructions > 0
    found = " ".join(report.problems())
    assert "spills: " in found and "loads narrower than 16 bytes in a loop" in found
