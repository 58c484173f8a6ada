"""A whole run in two processes, launched for real: the losses and weights of the run in one."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_run import complete, lines, losses, options, start

pytestmark = pytest.mark.slow
ON_POLICY = {"warm_start__num_prompts": 0, "evaluation__num_prompts": 0, "prompts__heldout_size": 0, "steps": 3}
CASES = {
    "warm start, gkd, evaluation": {"steps": 2, "optim__updates_per_step": 2},
    "policy gradient, uneven shares": ON_POLICY
    | {"algorithm": "policy_gradient", "prompts_per_step": 3, "optim__normalize": "sequence",
       "policy_gradient__whitening": "mean_std"},
    "dataset's completions": ON_POLICY | {"gkd__lmbda": 0.5, "prompts_per_step": 5},
    "truncated completions dropped": ON_POLICY
    | {"health__drop_truncated": True, "sampling__max_tokens": 48, "prompts_per_step": 4, "optim__updates_per_step": 2,
       "steps": 6},
}  # fmt: skip


def two() -> list[str]:
    """The launcher of two processes, on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]


def student(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "run" / "student" / "model.safetensors")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Sums of float32 in another order: small differences of losses, and of bf16 weights."""
    assert lines(theirs)
    for left, right in zip(lines(ours), lines(theirs), strict=True):
        assert left.keys() == right.keys()
        for name in ("loss", "grad_norm", "divergence", "reward", "health/entropy", "health/kept_tokens"):
            if name in right:
                assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6), name
        for name in ("step", "completion_tokens", "policy_version", "health/truncated", "rollouts"):
            assert left[name] == right[name], name
    left, right = student(ours), student(theirs)
    for name in right:
        torch.testing.assert_close(left[name].float(), right[name].float(), rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_two_processes_train_the_student_of_one(tiny_settings, tmp_path, changes) -> None:
    complete(options(tiny_settings, tmp_path / "one", **changes))
    output = complete(options(tiny_settings, tmp_path / "two", **changes), two())
    assert output.strip().splitlines().count(str(tmp_path / "two" / "run" / "summary.json")) == 1
    assert_same_run(tmp_path / "two", tmp_path / "one")
    if "health__drop_truncated" in changes:
        kept = [line["health/kept_tokens"] for line in lines(tmp_path / "one")]
        assert min(kept) < 0.2 < max(kept) < 1  # steps with next to nothing left are among them


def test_a_signal_to_one_process_stops_both_at_the_same_step(tiny_settings, tmp_path) -> None:
    changes = ON_POLICY | {"steps": 12, "checkpoint__every": 100}
    complete(options(tiny_settings, tmp_path / "whole", **changes), two())
    arguments = options(tiny_settings, tmp_path / "stopped", **changes)
    process = start(arguments, two())
    while len(lines(tmp_path / "stopped")) < 2 and process.poll() is None:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0 and 2 <= len(lines(tmp_path / "stopped")) < 12
    complete([*arguments, "--resume"], two())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
