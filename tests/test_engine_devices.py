"""The engine on the fast forward pass in plain torch: float32 on a CPU, and the same on a GPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from spec.drafters.model import ModelDrafter
from spec.engine import Engine
from spec.models.decoder import Decoder
from spec.models.transformers_model import TransformersModel
from spec.models.weights import read
from spec.params import Params
from spec.request import Request, sample_seed
from tests.spec_models import tiny_llama

HIDDEN_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, HIDDEN_GPU)))
REDUCED = (1, 2, 3, 5, 8, 13, 20, 21, 34, 40)

pytestmark = pytest.mark.parametrize("device", DEVICES)


@cache
def target(device: str) -> tuple[Decoder, TransformersModel]:
    """The same weights in both forward passes."""
    model = tiny_llama(0)
    model.model.to(device)
    return Decoder(read(model.model, "target")), TransformersModel(model.model, name="target")


def drafter(device: str, vocabulary: tuple[int, ...] | None = None) -> ModelDrafter:
    """A noisy copy of the target, with a reduced head where asked for."""
    copy = tiny_llama(1, like=tiny_llama(0), noise=0.1).model.to(device)
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    return ModelDrafter(Decoder(read(copy, "draft"), vocabulary=ids), target(device)[0], vocabulary=ids)


def greedy(count: int) -> list[Request]:
    return [Request([i + 1, 5, i], Params(temperature=0), max_tokens=18) for i in range(count)]


@pytest.mark.parametrize("mode", ("token", "block"))
def test_greedy_speculative_is_greedy_plain_and_transformers(mode, device: str) -> None:
    ours, theirs = target(device)
    plain = Engine(ours).generate(greedy(6))
    quick = Engine(ours, drafter(device), draft_length=3, mode=mode).generate(greedy(6))
    texts = [[result.completions[0].token_ids for result in results] for results in (plain, quick)]
    assert texts[0] == texts[1]
    assert sum(sum(result.completions[0].accepted) for result in quick) > 20
    for request, text in zip(greedy(6), texts[0], strict=True):
        prompt = torch.tensor([request.prompt_ids], device=device)
        expected = theirs.model.generate(prompt, max_new_tokens=18, do_sample=False)
        assert expected[0, 3:].tolist() == text


def test_log_probs_are_those_of_transformers(device: str) -> None:
    """Of sampled tokens, each from the rows of a verification step."""
    ours, theirs = target(device)
    request = Request([1, 2, 3, 4], Params(seed=3), max_tokens=15, logprobs=0)
    completion = Engine(ours, drafter(device), draft_length=3).generate([request])[0].completions[0]
    assert any(completion.from_draft) and not all(completion.from_draft)
    with torch.inference_mode():
        text = torch.tensor([[1, 2, 3, 4, *completion.token_ids]], device=device)
        law = theirs.model(text).logits[0, 3:-1].log_softmax(-1)
    assert completion.logprobs is not None
    for row, entry in zip(law, completion.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)


def test_samples_that_share_a_prompt_are_those_of_requests_of_their_own(device: str) -> None:
    ours, _ = target(device)
    request = Request(list(range(30)), Params(seed=11, top_p=0.95), max_tokens=10, n=2)
    result = Engine(ours, drafter(device), draft_length=2).generate([request])[0]
    texts = [completion.token_ids for completion in result.completions]
    assert texts[0] != texts[1]
    for i, text in enumerate(texts):
        own = Request(list(range(30)), Params(seed=sample_seed(11, i), top_p=0.95), max_tokens=10)
        assert Engine(ours, drafter(device), draft_length=2).generate([own])[0].completions[0].token_ids == text


def test_a_draft_with_a_reduced_vocabulary_drafts_of_it_and_changes_no_greedy_text(device: str) -> None:
    ours, _ = target(device)
    plain = Engine(ours).generate(greedy(6))
    quick = Engine(ours, drafter(device, REDUCED), draft_length=3).generate(greedy(6))
    assert [r.completions[0].token_ids for r in quick] == [r.completions[0].token_ids for r in plain]
    drafted = [
        token
        for result in quick
        for token, from_draft in zip(result.completions[0].token_ids, result.completions[0].from_draft, strict=True)
        if from_draft
    ]
    assert drafted and set(drafted) <= set(REDUCED)
