"""vLLM's server under ours, on tiny models: the target's text, a hard end of its engine, and ``auto``'s trials."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.conftest import make_model
from tests.serve_process import ServerProcess

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    """A target, and a draft near it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    target = make_model(folder / "target", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator()))
    model.save_pretrained(folder / "draft")
    tokenizer.save_pretrained(folder / "draft")
    return target, folder / "draft"


def completion(server: ServerProcess, **body: Any) -> httpx.Response:
    given = {"model": "target", "prompt": "Tom has 3 apples", "max_tokens": 24, "temperature": 0, **body}
    return httpx.post(server.url + "/v1/completions", json=given, timeout=120)


def greedy_text(model_dir: Path, tokenizer, tokens: int) -> str:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([tokenizer("Tom has 3 apples")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def engine_cores(server: ServerProcess) -> list[int]:
    """Processes of vLLM's engine below this server."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(path.parent.name)] = int(rest.split()[1])
        if "VLLM::EngineCor" in name:
            found.append(int(path.parent.name))

    def below(pid: int) -> bool:
        return pid == server.process.pid or (pid in parents and below(parents[pid]))

    return [pid for pid in found if below(pid)]


def test_greedy_text_is_the_targets_and_a_killed_engine_ends_the_server(models, tokenizer) -> None:
    """kill -9 of the engine: the running request fails, the server is not ready, and its status is no success."""
    target, draft = models
    server = ServerProcess(
        "--target", target, "--draft", draft, "--backend", "vllm", "--dtype", "float32", "--max-model-len", 512,
        "--draft-length", 3, "--max-running", 8, "--api-key", "k", env=SMALL, wait_s=400,
    )  # fmt: skip
    assert completion(server).status_code == 401
    headers = {"Authorization": "Bearer k"}
    body = {"model": "target", "prompt": "Tom has 3 apples", "max_tokens": 24, "temperature": 0}
    given = httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=120)
    assert given.json()["choices"][0]["text"] == greedy_text(target, tokenizer, 24)
    assert server.figure("vllm:spec_decode_num_accepted_tokens_total") > 0

    [engine] = engine_cores(server)
    statuses: list[int | str] = []

    def ask() -> None:
        try:
            long = {**body, "max_tokens": 450, "ignore_eos": True, "n": 8, "temperature": 1}
            statuses.append(
                httpx.post(server.url + "/v1/completions", json=long, headers=headers, timeout=120).status_code
            )
        except httpx.TransportError as error:
            statuses.append(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 30
    while server.figure("vllm:num_requests_running") == 0 and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(engine, signal.SIGKILL)
    asking.join(60)
    assert statuses and statuses[0] != 200, statuses
    assert server.process.wait(60) not in (0, None)
    assert server.event("stopped")["reason"] == "vLLM ended"
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url + "/health")


def test_auto_tries_both_once_and_sigterm_ends_what_it_took(models, tmp_path) -> None:
    """The second start says the same without trying."""
    target, draft = models
    arguments = ("--target", target, "--draft", draft, "--dtype", "float32", "--draft-length", 3, "--max-running", 8)
    env = {**SMALL, "ONPOLICY_CACHE": str(tmp_path)}
    lines = []
    for _ in range(2):
        server = ServerProcess(*arguments, env=env, wait_s=400)
        lines.append([line for line in server.raw if line.startswith(("auto:", "backend:"))])
        assert server.stop() == 0
        assert not engine_cores(server)
    assert [line.split()[:3] for line in lines[0][::2]] == [
        ["auto:", "trying", "torch"],
        ["auto:", "trying", "vllm"],
        lines[0][-1].split()[:3],
    ]
    assert "tokens/s" in lines[0][-1] and "times" in lines[0][-1] and "failed" not in lines[0][-1]
    [second] = lines[1]
    assert second.split(";")[0] == lines[0][-1].split(";")[0] and "--retry-backends" in second
