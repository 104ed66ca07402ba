"""`python -m robust_dpo.bench`: the suite from an installed package."""

from __future__ import annotations

import sys

from robust_dpo.bench.main import main

if __name__ == "__main__":
    sys.exit(main(description="Measure this package on this machine."))
