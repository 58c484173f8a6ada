"""The in-process vLLM sampler: the same completions as the transformers oracle, as itself after a restart, a sync, or
with too little memory; and a process that is left as it was found."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("vllm")

from onpolicy.rollouts.transformers_sampler import TransformersSampler
from onpolicy.rollouts.vllm_local import VLLMSampler
from onpolicy.types import Prompt, Rollout, SamplingParams

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
from rollout_models import VOCAB, tiny_llama, weights  # noqa: E402

pytestmark = pytest.mark.slow
SETTINGS = [
    SamplingParams(max_tokens=16, n=2, seed=9),
    SamplingParams(0.7, max_tokens=16, n=2, seed=9),
    SamplingParams(1.0, top_p=0.8, max_tokens=16, n=2, seed=9),
    SamplingParams(0.9, top_p=0.9, top_k=20, max_tokens=16, n=2, seed=9, stop_token_ids=tuple(range(0, VOCAB, 9))),
    SamplingParams(0.0, max_tokens=16),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return tiny_llama(root / "old", seed=1), tiny_llama(root / "new", seed=2)


def some_prompts(count: int = 8) -> list[Prompt]:
    lengths = [3 + 11 * i for i in range(count)]
    return [
        Prompt(f"p{i}", tuple(np.random.default_rng(i).integers(0, VOCAB, n).tolist())) for i, n in enumerate(lengths)
    ]


def drawn(rollouts: list[Rollout]) -> list[tuple[str, int, list[int], list[float], str]]:
    return [
        (r.prompt.id, r.sample_index, r.completion_ids.tolist(), r.logprobs.tolist(), r.finish_reason) for r in rollouts
    ]


def test_vllm_draws_what_transformers_draws(models: tuple[Path, Path]) -> None:
    oracle = TransformersSampler(models[0], dtype="float32", max_model_len=128)
    with VLLMSampler(models[0], dtype="float32", max_model_len=128) as sampler:
        for params in SETTINGS:
            progress: list[int] = []
            found, want = (
                sampler.generate(some_prompts(), params, progress.append),
                oracle.generate(some_prompts(), params),
            )
            assert [r.completion_ids.tolist() for r in found] == [r.completion_ids.tolist() for r in want]
            for ours, theirs in zip(found, want, strict=True):
                assert (ours.prompt, ours.sample_index, ours.finish_reason) == (
                    theirs.prompt,
                    theirs.sample_index,
                    theirs.finish_reason,
                )
                # float32 in two implementations, on logits of some tens
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-3)
            assert sum(progress) == sum(map(len, found)) and len(progress) == len(found)
            if params.stop_token_ids:
                assert {"stop", "length"} == {r.finish_reason for r in found}


def test_scarce_memory_and_chunked_prefill_change_nothing(models: tuple[Path, Path]) -> None:
    params = SamplingParams(max_tokens=24, n=4, seed=2)
    with VLLMSampler(models[0], dtype="float32", max_model_len=128) as sampler:
        roomy = sampler.generate(some_prompts(), params)
    # 40 blocks of 32 KiB for 32 requests of up to 4 blocks, and prefills cut into pieces of at most 32 tokens
    with VLLMSampler(
        models[0], dtype="float32", max_model_len=128, kv_cache_gib=40 * 2**15 / 2**30, max_num_batched_tokens=32,
        max_num_seqs=32, enable_prefix_caching=False,
    ) as sampler:  # fmt: skip
        scarce = sampler.generate(some_prompts(), params)
        waited = sampler._open_engine().vllm_config.cache_config.num_gpu_blocks
    assert waited is not None and waited <= 40
    assert [r.completion_ids.tolist() for r in scarce] == [r.completion_ids.tolist() for r in roomy]


def test_sync_equals_a_fresh_load_to_the_last_bit(models: tuple[Path, Path]) -> None:
    old, new = models
    with VLLMSampler(new, max_model_len=128) as sampler:
        fresh = [drawn(sampler.generate(some_prompts(), params)) for params in SETTINGS]
    with VLLMSampler(old, max_model_len=128, policy_version=3) as sampler:
        before = [drawn(sampler.generate(some_prompts(), params)) for params in SETTINGS]
        sampler.sync(weights(new).items(), policy_version=4)
        synced = [drawn(sampler.generate(some_prompts(), params)) for params in SETTINGS]
        # A state dict without the tied head's second name, in float32, as a trainer has it
        master = {k: v.float() for k, v in weights(old).items() if k != "lm_head.weight"}
        sampler.sync(master.items(), policy_version=5)
        back = [drawn(sampler.generate(some_prompts(), params)) for params in SETTINGS]
        assert sampler.policy_version == 5
    assert synced == fresh and back == before and before != fresh


def test_a_restarted_process_draws_the_same(models: tuple[Path, Path]) -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'slow')!r}]\n"
        "from pathlib import Path\nimport test_vllm as t\n"
        f"with t.VLLMSampler(Path({str(models[0])!r}), max_model_len=128) as s:\n"
        "    print('DRAWN', [t.drawn(s.generate(t.some_prompts(), p)) for p in t.SETTINGS])\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120).stdout
        for _ in range(2)
    )
    assert first.count("DRAWN") == 1 and first == second


def test_an_interrupted_call_leaves_nothing_behind(models: tuple[Path, Path]) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with VLLMSampler(models[0], max_model_len=128) as sampler:
        want = drawn(sampler.generate(some_prompts(), SETTINGS[3]))
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(some_prompts(), SETTINGS[3], interrupt)
        assert not sampler._open_engine().has_unfinished_requests()
        assert drawn(sampler.generate(some_prompts(), SETTINGS[3])) == want
        with pytest.raises(ValueError, match="'p3' has 36 tokens"):
            sampler.generate(some_prompts(), SamplingParams(max_tokens=100))


def test_the_process_is_left_as_it_was_found(models: tuple[Path, Path]) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    want = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    set_num_threads, threads, cores = torch.set_num_threads, torch.get_num_threads(), os.sched_getaffinity(0)
    with VLLMSampler(models[0], max_model_len=128, kv_cache_gib=0.05) as sampler:
        sampler.generate(some_prompts(2), SETTINGS[0])
    before = psutil.Process().memory_info().rss
    with VLLMSampler(models[0], max_model_len=128, kv_cache_gib=1.0) as sampler:
        sampler.generate(some_prompts(2), SETTINGS[0])
        sampler.sync(weights(models[1]).items(), 1)
        assert psutil.Process().memory_info().rss - before > 0.5 * 2**30
        assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)
    assert psutil.Process().memory_info().rss - before < 0.1 * 2**30
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == want
    assert torch.set_num_threads is set_num_threads and not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="closed"):
        sampler.sync(weights(models[1]).items(), 2)
    sampler.close()
