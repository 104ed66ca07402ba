"""Forward + backward of DPO over an LM head on this CPU: every implementation against the floor, in one run.

    python benchmarks/head_cpu.py --dtype fp32,bf16 --rounds 5 --threads 4 --out benchmarks/results

Writes head_cpu.json and head_cpu.md to --out; --docs puts the same table between the markers of a Markdown file.
"""

from __future__ import annotations

import sys

from robust_dpo.bench.processes.main import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
