"""Whole training steps on this machine: our trainer, TRL's DPOTrainer and plain PyTorch loops, side by side.

    python benchmarks/train_step.py --out benchmarks/results/mine --data pairs.jsonl --models small --dtype fp32

Everybody starts from the same weights and takes the same steps on the same groups, in turns, each in a process of its
own. Writes results.json and results.md to --out, and adds to them when it is called again with the same folder; --docs
puts the same text between the markers of a Markdown file. --quick runs all of it with a tiny model.
"""

from __future__ import annotations

import sys

from robust_dpo.bench.train_step.main import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
