"""Everything that a GPU machine can tell, in one command and without network.

    python benchmarks/gpu_suite.py --out benchmarks/results/h100 --minutes 8

Builds the package if it cannot be imported, runs compute-sanitizer and this checkout's GPU tests on the package that it
measures, checks and times every case in order of importance until the time is up, and writes results.json, results.md
and plots to --out. Called again with the same folder it goes on where it ended. --device cpu --quick runs the same
machinery anywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ensure_package() -> None:
    """Install the checkout in place, with what is here: no network, no dependencies.

    Where that does not work, the checkout itself is used, without native code for the CPU.
    """
    if importlib.util.find_spec("robust_dpo") is not None:
        return
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    if subprocess.run(command, check=False).returncode:
        print("the package could not be installed; going on with the sources as they are", file=sys.stderr)
    # An editable install is a hook that only a new process loads; this one, and its children, take the folder.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    importlib.invalidate_caches()


if __name__ == "__main__":
    ensure_package()
    from robust_dpo.bench.main import main

    sys.exit(main(description=__doc__, checkout=ROOT))
