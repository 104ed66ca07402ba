"""One source, any torch: wheels with both extensions, used under several versions of torch.

ROBUST_DPO_OTHER_PYTHONS holds interpreters with other versions of torch, separated as on the PATH. Where it is not set,
a virtual environment gets one, if the package index has another build of torch for CPUs. A wheel is built once for each
version of Python, and used by all interpreters of that version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cuda_build import nvcc

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "ROBUST_DPO_OTHER_PYTHONS"
COPIED = (
    *("build_support", "csrc", "kernels", "robust_dpo"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"),
)
WHEEL_BYTES = 20_000_000

pytestmark = pytest.mark.slow


def call(python: str, *arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Interpreter -> the unpacked wheel for its version of Python."""
    if nvcc() is None:
        pytest.skip("needs a CUDA toolkit")
    found: dict[str, Path] = {}

    def wheel(python: str) -> Path:
        version = call(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])", cwd=ROOT)
        if version not in found:
            found[version] = build_wheel(python, tmp_path_factory.mktemp("wheel"))
        return found[version]

    return wheel


def build_wheel(python: str, folder: Path) -> Path:
    """Built and unpacked. Chips of one generation: the rest takes minutes and changes nothing here."""
    source = folder / "source"
    source.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    call(python, *build, cwd=folder, ROBUST_DPO_BUILD="cuda", ROBUST_DPO_CUDA_ARCHS="9.0")
    (archive,) = folder.glob("*.whl")
    assert archive.stat().st_size < WHEEL_BYTES
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def other_pythons(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Interpreters with other versions of torch than this one's."""
    named = [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    return named or [make_environment(tmp_path_factory.mktemp("environment"))]


def make_environment(folder: Path) -> str:
    """An interpreter that finds another torch, and all other packages where this one has them."""
    version, _, local = torch.__version__.partition("+")
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip(f"another torch for GPUs would be gigabytes; {VARIABLE} can name an interpreter that has one")
    wanted = f"torch=={'2.13.0' if version.startswith('2.11.') else '2.11.0'}" + (f"+{local}" if local else "")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wanted],
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"pip has no {wanted} ({done.stderr.strip().splitlines()[-1]}); {VARIABLE} can name an interpreter")
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "rest.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return python


USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import torch
import robust_dpo
from robust_dpo import _cuda
from robust_dpo.kernels import row_logprob_cpu, row_logprob_cuda
from robust_dpo.dispatch import choose_backend
assert robust_dpo.__file__.startswith(sys.argv[1]) and _cuda.__file__.startswith(sys.argv[1])
report = robust_dpo.backends()
assert report["cpu"].usable and report["cuda"].built and "sm_90 compute_90" in report["cuda"].detail, report
logits, targets = torch.randn(3, 501), torch.tensor([0, 500, 7])
gradient = torch.empty_like(logits)
logp = row_logprob_cpu.row_logprob(logits, targets, grad_out=gradient).logp
torch.testing.assert_close(logp, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
hidden, weight = torch.randn(6, 16), torch.randn(40, 16, requires_grad=True)
output = robust_dpo.linear_preference_loss(
    hidden, weight, torch.randint(0, 40, (6,)), seq_lens=torch.tensor([3, 3]), ref_logps=torch.zeros(2),
    loss="sigmoid", backend="cpu",
)
output.loss.backward()
assert weight.grad.isfinite().all()
if not torch.cuda.is_available():
    try:
        row_logprob_cuda.row_logprob(logits, targets)
    except ValueError as error:
        assert "logits: expected a tensor on a GPU, got cpu" in str(error)
print(torch.__version__)
"""


def test_one_wheel_runs_under_every_torch(
    wheel_of: Callable[[str], Path], other_pythons: list[str], tmp_path: Path
) -> None:
    versions = []
    for python in (sys.executable, *other_pythons):
        installed = str(wheel_of(python))
        versions.append(call(python, "-c", USE, installed, cwd=tmp_path, PYTHONPATH=installed).strip())
    assert len(set(versions)) == len(versions), f"two interpreters with the same torch prove nothing: {versions}"


def test_native_code_runs_without_any_torch(wheel_of: Callable[[str], Path], tmp_path: Path) -> None:
    """What needs nothing of torch works with every version of it: plain memory in, numbers out."""
    code = """
    import array, importlib.util, math, pathlib, sys
    sys.modules["torch"] = None  # importing it fails

    def load(name):
        (path,) = pathlib.Path(sys.argv[1], "robust_dpo").glob(f"{name}.*.so")
        spec = importlib.util.spec_from_file_location(f"robust_dpo.{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    tile, target, out = array.array("f", range(7)), array.array("q", [3]), array.array("f", [0, 0])
    address = lambda values: values.buffer_info()[0]
    load("_cpu").row_logprob(
        isa="generic", tile=address(tile), tile_dtype=0, tile_stride=7, rows=1, vocab=7, targets=address(target),
        bias=0, softcap=0.0, scale=1.0, logp=address(out), lse=address(out) + 4, entropy=0, grad=0, grad_dtype=0,
        grad_stride=0, row_scale=0, threads=1,
    )
    lse = math.log(sum(map(math.exp, range(7))))
    assert abs(out[1] - lse) < 1e-5 and abs(out[0] - (3 - lse)) < 1e-5, out
    print(load("_cuda").ARCHITECTURES)
    """
    printed = call(sys.executable, "-I", "-c", textwrap.dedent(code), str(wheel_of(sys.executable)), cwd=tmp_path)
    assert printed.split() == ["sm_90", "compute_90"]
