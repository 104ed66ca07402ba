"""No tensor of size N×V ever exists: the peak of a real vocabulary, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robust_dpo.kernels.row_logprob_torch import BLOCK_ELEMENTS
from robust_dpo.ops.chunking import CPU_BYTES

V, H, ROWS = 151936, 64, 4096
# 16 responses of 256 tokens. A problem of the same kind but tiny goes first, so that code, thread pools and
# allocator are in memory before the peak is reset.
SCRIPT = f"""
import json, sys
import torch
import robust_dpo

def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

def run(rows, vocab):
    hidden = torch.randn(16, rows // 16, {H}, requires_grad=True)
    weight = (torch.randn(vocab, {H}) / {H} ** 0.5).requires_grad_()
    targets = torch.randint(0, vocab, (16, rows // 16))
    ref_logps = torch.randn(16)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS:")
    output = robust_dpo.linear_preference_loss(
        hidden, weight, targets, ref_logps=ref_logps, robust="kl", backend=sys.argv[1]
    )
    output.loss.backward()
    assert weight.grad.isfinite().all() and hidden.grad.isfinite().all()
    return status("VmHWM:") - before

run(64, 1000)
print(json.dumps(run({ROWS}, {V})))
"""


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_peak_memory_of_a_real_vocabulary(backend: str) -> None:
    # Thousands of small steps in plain PyTorch: a barrier of several threads would take longer than each of them.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, backend]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout)
    weight = 4 * V * H
    hidden = 4 * ROWS * H
    # The chunk of logits, the fp32 dW, which becomes weight.grad, and dx; 10 % of these and of the inputs in slack.
    allowed = CPU_BYTES + weight + hidden + 0.1 * (CPU_BYTES + 2 * (weight + hidden))
    if backend == "torch":
        allowed += 6 * 4 * BLOCK_ELEMENTS["cpu"]  # the temporaries of a block of rows
    logits = 4 * ROWS * V
    message = f"peak {peak / 1e6:.0f} MB over the inputs, allowed {allowed / 1e6:.0f} MB; N×V is {logits / 1e6:.0f} MB"
    assert allowed < logits / 5
    assert peak <= allowed, message
