"""vLLM's own speculative decoding under the plugin, end to end: greedy text as without drafts, and the target's law.

Every engine runs in a process of its own, where vLLM finds the plugin by itself. The law is tested by scoring each
token under the target's exact conditional (transformers, float32, the logits processing of :mod:`spec.sampling`):
with the mass F of all likelier tokens and v ~ U(0, 1), u = F + v p(x) is uniform and independent of all before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))
from rollout_models import VOCAB, tiny_llama  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GREEDY = {"temperature": 0.0}
WARM = {"temperature": 0.8}
MIXED = [WARM, {"temperature": 1.0, "top_p": 0.9}, GREEDY, {"temperature": 1.2, "top_k": 20}, {"temperature": 1.0}]
Request = dict[str, Any]  # "prompt": token ids, "max_tokens", and the sampling parameters


def generate(engine: dict[str, Any], requests: list[Request]) -> dict[str, Any]:
    """Runs in the child: the completion of every request, and tokens per engine step of a request."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    from spec.vllm_engine import start_engine, stop_engine

    llm = start_engine(
        0.25, **{"dtype": "float32", "max_model_len": 128, "max_num_seqs": 32, "block_size": 32, **engine}
    )
    for index, request in enumerate(requests):
        options = {name: value for name, value in request.items() if name != "prompt"}
        params = SamplingParams(detokenize=False, ignore_eos=True, **options)
        llm.add_request(str(index), tokens_input(request["prompt"]), params)
    completions, steps = [[] for _ in requests], 0
    while llm.has_unfinished_requests():
        for output in llm.step():
            completions[int(output.request_id)] = list(output.outputs[0].token_ids)
            steps += 1
    stop_engine(llm)
    return {"completions": completions, "tokens_per_step": sum(map(len, completions)) / steps}


def in_a_process(
    tmp_path: Path, engine: dict[str, Any], requests: list[Request], **environment: str
) -> tuple[list[list[int]], float]:
    """:func:`generate` in a fresh process; the completions and the tokens per step."""
    given, found = tmp_path / "given.json", tmp_path / "found.json"
    given.write_text(json.dumps([engine, requests]))
    program = (
        f"import json, sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\nimport test_vllm_speculation as t\n"
        f"found = t.generate(*json.loads(Path({str(given)!r}).read_text()))\n"
        f"Path({str(found)!r}).write_text(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(found.read_text())
    return result["completions"], result["tokens_per_step"]


def drafted_by(model: Path, **options: Any) -> dict[str, Any]:
    return {
        "speculative_config": {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3, **options}
    }


# ------------------------------------------------------------------------------------------------------- scoring a law


def target_probs(model: Any, request: Request, completion: list[int]) -> torch.Tensor:
    """[len(completion), V] in float64: what each token was to be drawn from."""
    from spec.sampling import processed_probs

    options = {name: request[name] for name in ("temperature", "top_k", "top_p") if name in request}
    with torch.inference_mode():
        logits = model(torch.tensor([request["prompt"] + completion])).logits[0]
    return processed_probs(logits[len(request["prompt"]) - 1 : -1].double(), **options)


def law_scores(model_dir: Path, requests: list[Request], completions: list[list[int]]) -> dict[str, float]:
    """Standardised deviations of the stochastic tokens from the target's law; near N(0, 1) if they follow it.

    ``pit``: chi-square of u over 32 cells; ``pairs``: of successive u in one completion over 8 by 8 cells;
    ``surprise``: sum of -log p(x) - H(p), a martingale (its terms are infinite for an impossible token).
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    draw = np.random.default_rng(5)
    uniforms, surprises, variances = [], [], []
    for request, completion in zip(requests, completions, strict=True):
        if request["temperature"] == 0:
            continue
        probs, tokens = target_probs(model, request, completion).double(), torch.tensor(completion)[:, None]
        chosen = probs.gather(1, tokens)
        likelier = torch.where(probs > chosen, probs, 0.0).sum(1) if len(probs) else torch.zeros(0)
        uniforms.append(likelier.numpy() + draw.random(len(completion)) * chosen[:, 0].numpy())
        logs = torch.where(probs > 0, probs, 1.0).log()
        entropy = -(probs * logs).sum(1)
        surprises.extend((-chosen[:, 0].log() - entropy).tolist())
        variances.extend(((probs * logs.square()).sum(1) - entropy.square()).tolist())
    pairs = np.concatenate([np.floor(8 * u[:-1]) * 8 + np.floor(8 * u[1:]) for u in uniforms])
    return {
        "pit": chi_square_score(np.floor(32 * np.concatenate(uniforms)), 32),
        "pairs": chi_square_score(pairs, 64),
        "surprise": float(np.sum(surprises) / np.sqrt(np.sum(variances))),
    }


def chi_square_score(cells: np.ndarray, count: int) -> float:
    """Chi-square of equally likely ``cells`` as a standard normal score (Wilson and Hilferty)."""
    found = np.bincount(cells.astype(int).clip(0, count - 1), minlength=count)
    statistic, freedom = float(((found - len(cells) / count) ** 2).sum() / (len(cells) / count)), count - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def assert_follows(scores: dict[str, float]) -> None:
    # Some twenty scores in this file: 4.5 standard deviations by chance once in ten thousand runs of it
    assert all(abs(score) < 4.5 for score in scores.values()), scores


# ------------------------------------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft near it: about half of what it drafts is accepted."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    target = tiny_llama(root / "target", seed=1, sharpness=3.0)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=draw))
    model.to(torch.bfloat16).save_pretrained(root / "draft")
    return target, root / "draft"


def tiny_requests(settings: list[dict[str, float]], count: int = 1000) -> list[Request]:
    """Repeated prompts; of those with 33 tokens the cache knows the first 32, and vLLM pads what it would draft."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCAB, length).tolist() for length in (7, 33, 20, 33)]
    return [{"prompt": prompts[i % 4], "max_tokens": 8, **settings[i // 4 % len(settings)]} for i in range(count)]


def greedy_completions_are_exact(target: Path, requests: list[Request], completions: list[list[int]]) -> None:
    """Every greedy token is the argmax given what precedes it, or within float32's error of it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    greedy = [(r, c) for r, c in zip(requests, completions, strict=True) if r["temperature"] == 0]
    assert greedy
    for request, completion in {json.dumps(pair): pair for pair in greedy}.values():
        with torch.inference_mode():
            logits = model(torch.tensor([request["prompt"] + completion])).logits[0, len(request["prompt"]) - 1 : -1]
        short = logits.max(-1).values - logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert float(short.max()) < 1e-3, (request, completion, short.tolist())


@pytest.mark.parametrize("drafter", ["probabilistic", "greedy", "ngram"])
def test_every_request_of_a_mixed_batch_follows_its_own_law(
    drafter: str, tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    target, draft = tiny
    if drafter == "ngram":
        options = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}}
    else:
        options = drafted_by(draft, draft_sample_method=drafter)
    requests = tiny_requests(MIXED)
    completions, tokens_per_step = in_a_process(tmp_path, {"model": str(target), **options}, requests)
    scores = law_scores(target, requests, completions)
    print(drafter, scores, "tokens per step", tokens_per_step)
    assert {len(completion) for completion in completions} == {8}
    assert tokens_per_step > (1.01 if drafter == "ngram" else 1.2)  # drafts are accepted: random text repeats little
    greedy_completions_are_exact(target, requests, completions)
    assert_follows(scores)


def test_without_the_plugin_the_text_is_garbage(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    target, draft = tiny
    requests = tiny_requests([WARM], 400)
    options = {"model": str(target), **drafted_by(draft, draft_sample_method="probabilistic")}
    with_plugin, _ = in_a_process(tmp_path, options, requests)
    without, _ = in_a_process(tmp_path, options, requests, VLLM_PLUGINS="")
    scores = law_scores(target, requests, with_plugin), law_scores(target, requests, without)
    print(*scores)
    assert_follows(scores[0])
    assert max(abs(scores[1]["pit"]), abs(scores[1]["surprise"])) > 15


def test_the_target_as_its_own_draft_is_always_accepted(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The kernels that prepare a draft model's inputs cannot bias the text, but would cost acceptance here."""
    requests = [{"prompt": list(range(5 + i, 25 + i)), "max_tokens": 61, **GREEDY} for i in range(4)]
    found, tokens_per_step = in_a_process(tmp_path, {"model": str(tiny[0]), **drafted_by(tiny[0])}, requests)
    greedy_completions_are_exact(tiny[0], requests, found)
    assert tokens_per_step > 3.6  # 61 tokens: one of the prefill, then 15 steps of four; near-ties may cost one


# ------------------------------------------------------------------------------------------- the quickstart's models


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The default teacher, and the quickstart's student; before any quickstart a pruned teacher."""
    from onpolicy.teachers.convert import default_teacher

    student = ROOT / "runs" / "quickstart" / "student"
    if (student / "model.safetensors").exists():
        return default_teacher(), student
    from transformers import AutoModelForCausalLM

    from onpolicy.student import prune_layers

    pruned = tmp_path_factory.mktemp("pruned")
    teacher = AutoModelForCausalLM.from_pretrained(default_teacher(), dtype=torch.float32)
    prune_layers(teacher, [0, 1, 28, 29]).to(torch.bfloat16).save_pretrained(pruned)
    return default_teacher(), pruned


def real_prompts(target: Path, count: int) -> list[list[int]]:
    from itertools import islice

    from transformers import AutoTokenizer

    from onpolicy.prompts import word_problems

    tokenizer = AutoTokenizer.from_pretrained(target)
    questions = [p.question for p in islice(word_problems(1), count)]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in questions
    ]


def test_the_student_drafts_for_its_teacher(real: tuple[Path, Path], tmp_path: Path) -> None:
    target, student = real
    engine = {"model": str(target), "max_model_len": 512}
    prompts = real_prompts(target, 12)
    greedy = [{"prompt": prompt, "max_tokens": 40, **GREEDY} for prompt in prompts]
    warm = [{"prompt": prompts[i % 12], "max_tokens": 12, **(WARM, MIXED[1], MIXED[4])[i % 3]} for i in range(240)]
    plain, _ = in_a_process(tmp_path, engine, greedy)
    speculative = {**engine, **drafted_by(student, draft_sample_method="probabilistic")}
    completions, tokens_per_step = in_a_process(tmp_path, speculative, [*greedy, *warm])
    scores = law_scores(target, warm, completions[len(greedy) :])
    print(scores, "tokens per step", tokens_per_step)
    same = [a == b for a, b in zip(plain, completions[: len(greedy)], strict=True)]
    print("greedy completions equal to plain:", sum(same), "of", len(same))
    # Both are the target's argmax, so that a difference can only begin at a near-tie
    greedy_completions_are_exact(target, greedy, plain)
    greedy_completions_are_exact(target, greedy, completions[: len(greedy)])
    assert_follows(scores)
