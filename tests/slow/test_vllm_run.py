"""Whole runs with vLLM as the sampler."""

from __future__ import annotations

import functools
import json
import signal
import time

import pytest

pytest.importorskip("vllm")

from onpolicy.rollouts.vllm_local import VLLMSampler
from onpolicy.run import StoppedRun
from onpolicy.types import Prompt, SamplingParams
from tests.test_run import complete, lines, losses, options, start, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vllm_settings(tiny_settings) -> dict[str, object]:
    changed = {"rollouts.engine": "vllm", "rollouts.dtype": "bfloat16", "student.precision": "bfloat16"}
    return {**tiny_settings, **changed, "optim.learning_rate": 0.01, "steps": 8}


def test_vllm_has_the_new_weights_in_every_step(vllm_settings, tmp_path) -> None:
    train(vllm_settings, tmp_path)
    steps = [r for r in lines(tmp_path) if r["stage"] == "on_policy"]
    assert len(steps) == 8 and all(r["sync/logprob_abs_diff"] < 0.05 for r in steps)


def test_without_the_tied_head_repair_the_parity_check_stops_the_run(vllm_settings, tmp_path, monkeypatch) -> None:
    broken = functools.partialmethod(VLLMSampler.__init__, repair_tied_head=False)
    monkeypatch.setattr(VLLMSampler, "__init__", broken)
    with pytest.raises(StoppedRun, match="does not have the weights that are being trained"):
        train(vllm_settings, tmp_path)


def test_killed_and_resumed_with_vllm_gives_the_same_losses(vllm_settings, tmp_path) -> None:
    complete(options(vllm_settings, tmp_path, name="whole"))
    arguments = options(vllm_settings, tmp_path, name="killed")
    process = start(arguments)
    deadline = time.time() + 200
    while len(lines(tmp_path, "killed")) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    complete([*arguments, "--resume"])
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")


def test_the_final_student_loads_in_vllm(vllm_settings, tmp_path) -> None:
    train(vllm_settings, tmp_path, student__lora__rank=4)
    with VLLMSampler(tmp_path / "run" / "student", max_model_len=64) as sampler:
        (rollout,) = sampler.generate([Prompt("p", (5, 6, 7))], SamplingParams(max_tokens=4))
    assert len(rollout) == 4
    assert json.loads((tmp_path / "run" / "student" / "config.json").read_text())["num_hidden_layers"] == 2
