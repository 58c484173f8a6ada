"""Kernels give the same bits in the process that compiles them as in those that load them from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import hashlib, torch
from onpolicy.losses import _fused

torch.manual_seed(0)
student, teacher = torch.randn(3, 5000), torch.randn(3, 5000)
copies = student.clone(), teacher.clone()
outputs = [*_fused.run("reverse_kl", {}, 1.0, *copies, torch.arange(3), torch.ones(3), None)[:4]]
outputs.append(_fused.compare(student, teacher, torch.arange(3), False))
if torch.cpu.get_capabilities().get("avx512_bf16"):
    from onpolicy.layers.causal_attention import causal_attention

    states = [torch.randn(2, 50, heads, 32).bfloat16() for heads in (4, 2, 2)]
    outputs.append(causal_attention(*states, 0.2).float())
    from onpolicy.layers.trained import rms_norm

    x, weight = torch.randn(5, 100, requires_grad=True), torch.randn(100, requires_grad=True)
    rms_norm(x, weight, 1e-5).backward(torch.randn(5, 100).bfloat16())
    outputs += [x.grad, weight.grad]
print(hashlib.md5(b"".join(output.numpy().tobytes() for output in outputs)).hexdigest())
"""


def test_the_first_run_on_a_machine_is_as_every_other(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert len(first.stdout) > 30 and first.stdout == second.stdout
