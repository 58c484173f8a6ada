"""The loss's kernel for GPUs: on one, and by Triton's interpreter where Triton is installed without one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from onpolicy.losses import _fused

NAMES = tuple(_fused._CODES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_agrees_with_torch_on_a_gpu(name: str) -> None:
    assert _fused.agree(name, torch.device("cuda"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_agrees_with_torch_in_the_interpreter() -> None:
    code = (
        "import torch; from onpolicy.losses import _fused\n"
        f"print(*(name for name in {NAMES} if not _fused.agree(name, torch.device('cpu'), _fused.triton_rows)))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_holds_for_a_right_kernel_and_finds_a_wrong_one(name: str) -> None:
    """The same comparison decides, once a process and divergence, whether the kernel is used on a GPU at all."""

    def wrong(code, parameter, inverse, grad, student, *rest) -> None:
        _fused.numba_rows(code, parameter, inverse, grad, student, *rest)
        student[2, 4999] *= 1.01

    cpu = torch.device("cpu")
    assert _fused.agree(name, cpu) and not _fused.agree(name, cpu, wrong)


def test_a_kernel_that_fails_is_not_used_and_says_so(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_fused, "agree", fails)
    with pytest.warns(UserWarning, match="reverse_kl takes torch's slower path on cpu.*no compiler"):
        assert not _fused._triton_agrees.__wrapped__("reverse_kl", torch.device("cpu"))
    monkeypatch.setattr(_fused, "agree", lambda *_: False)
    with pytest.warns(UserWarning, match="differs; please report this"):
        assert not _fused._triton_agrees.__wrapped__("reverse_kl", torch.device("cpu"))
