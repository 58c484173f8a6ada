"""Verification is exact: the joint law of a block, summed over every draft, is the target's.

The toy target and draft are tables over prefixes, so both depend on the whole context.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from spec.random import BlockUniforms, Purpose, block_uniforms, uniforms
from spec.verify import Backend, Drafts, Mode, laws, length_law, sample, verify, verify_greedy

BACKENDS: tuple[Backend, ...] = ("reference", "numba", "torch")
MODES: tuple[Mode, ...] = ("token", "block")
Table = Callable[[tuple[int, ...]], np.ndarray]
Batch = tuple[torch.Tensor, Drafts, BlockUniforms]
Grows = Callable[[tuple[int, ...]], bool]


def table(vocabulary: int, seed: int, kind: str = "dense") -> Table:
    """A next-token law for every prefix, float64 [V]."""
    cache: dict[tuple[int, ...], np.ndarray] = {}

    def law(prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in cache:
            rng = np.random.default_rng([seed, len(prefix), *prefix])
            weights = rng.gamma(0.5, size=vocabulary) + 1e-6
            if kind == "sparse":  # top-k on the target, a reduced vocabulary on the draft
                weights[np.argsort(weights)[: vocabulary // 2]] = 0
            if kind == "one-hot":
                weights = (np.arange(vocabulary) == weights.argmax()).astype(float)
            cache[prefix] = weights / weights.sum()
        return cache[prefix]

    return law


def leaves(draft: Table, grows: Grows, longest: int) -> list[tuple[int, ...]]:
    """Every block the drafter can propose: it stops where ``grows(prefix)`` says so, or at ``longest``."""
    open_: list[tuple[int, ...]] = [()]
    done: list[tuple[int, ...]] = []
    while open_:
        prefix = open_.pop()
        if len(prefix) == longest or not grows(prefix):
            done.append(prefix)
        else:
            open_ += [(*prefix, int(x)) for x in np.flatnonzero(draft(prefix))]
    return done


def batch(target: Table, draft: Table, blocks: list[tuple[int, ...]], one_hot: bool) -> tuple[torch.Tensor, Drafts]:
    rows = [target(block[:i]) for block in blocks for i in range(len(block) + 1)]
    ids = torch.tensor([x for block in blocks for x in block], dtype=torch.long)
    probs = None
    if not one_hot:
        probs = torch.tensor(np.array([draft(block[:i]) for block in blocks for i in range(len(block))]))
        probs = probs.reshape(len(ids), rows[0].size)
    return torch.tensor(np.array(rows)), Drafts(ids, [len(block) for block in blocks], probs)


def block_law(
    target: Table, draft: Table, longest: int, mode: Mode, backend: Backend, one_hot: bool, grows: Grows
) -> np.ndarray:
    """[V^(K+1)]: the law of the first K+1 tokens when one verification step is continued by plain target draws."""
    blocks = leaves(draft, grows, longest)
    rows, drafts = batch(target, draft, blocks, one_hot)
    accept, last = laws(rows, drafts, mode=mode, backend=backend)
    vocabulary, at = rows.shape[1], 0
    mass: dict[tuple[int, ...], np.ndarray] = {}  # prefix committed by the step -> mass of its last token
    for b, block in enumerate(blocks):
        chance = np.prod([draft(block[:i])[x] for i, x in enumerate(block)])
        lengths = length_law(accept[at : at + len(block)], mode).numpy()
        for tau, share in enumerate(lengths):
            here = mass.setdefault(block[:tau], np.zeros(vocabulary))
            here += chance * share * last[at + b + tau].numpy()
        at += len(block)
    law: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(longest + 1):
        law = {
            (*prefix, x): extended
            for prefix, weight in law.items()
            for x, extended in enumerate(weight * target(prefix) + mass.get(prefix, np.zeros(vocabulary)))
        }
    return np.array(list(law.values()))


def target_law(target: Table, vocabulary: int, size: int) -> np.ndarray:
    return np.array(
        [
            np.prod([target(text[:i])[x] for i, x in enumerate(text)])
            for text in itertools.product(range(vocabulary), repeat=size)
        ]
    )


KINDS = [("dense", "dense"), ("dense", "sparse"), ("sparse", "dense"), ("sparse", "sparse"), ("one-hot", "dense"),
         ("dense", "one-hot"), ("one-hot", "one-hot")]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("target_kind", "draft_kind"), KINDS)
def test_the_joint_law_is_the_targets(backend: Backend, mode: Mode, target_kind: str, draft_kind: str) -> None:
    for vocabulary, longest, seed in ((2, 4, 0), (3, 3, 1), (4, 2, 2), (8, 1, 3), (3, 0, 4)):
        target, draft = table(vocabulary, seed, target_kind), table(vocabulary, seed + 100, draft_kind)
        exact = target_law(target, vocabulary, longest + 1)
        for one_hot in {False, draft_kind == "one-hot"}:  # a deterministic draft with and without its rows
            law = block_law(target, draft, longest, mode, backend, one_hot, lambda prefix: True)
            assert np.abs(law - exact).max() < 1e-12


@pytest.mark.parametrize("backend", ("numba", "torch"))
@pytest.mark.parametrize("mode", MODES)
def test_the_largest_case(backend: Backend, mode: Mode) -> None:
    """V=8, K=4, every draft of 4,096 in one batch; reduced draft support, target with zeros."""
    target, draft = table(8, 7, "sparse"), table(8, 8, "dense")
    law = block_law(target, draft, 4, mode, backend, False, lambda prefix: True)
    assert np.abs(law - target_law(target, 8, 5)).max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_draft_length_may_depend_on_the_drafted_prefix(backend: Backend, mode: Mode) -> None:
    target, draft = table(4, 11), table(4, 12)
    law = block_law(target, draft, 3, mode, backend, False, lambda prefix: sum(prefix) % 3 != 2)
    assert np.abs(law - target_law(target, 4, 4)).max() < 1e-12


def test_dropping_a_drawn_token_is_not_exact() -> None:
    """Why a drafter must decide before it draws: dropping a token for its own low q biases the text."""
    target, draft = table(4, 21), table(4, 22)
    p, q = target(()), draft(())
    kept = q >= np.median(q)
    accept = np.minimum(1, p / q)
    residual = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()
    law = np.where(kept, q * accept, 0) + (q * (1 - accept))[kept].sum() * residual + q[~kept].sum() * p
    assert np.abs(law - p).max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_case_of_the_block_verification_paper(backend: Backend) -> None:
    """2403.10444: p=(1/3,2/3), q=(2/3,1/3), two drafts: 10/9 tokens accepted token-wise, 11/9 block-wise."""
    target, draft = (lambda _: np.array([1 / 3, 2 / 3])), (lambda _: np.array([2 / 3, 1 / 3]))
    for mode, expected in zip(MODES, (10 / 9, 11 / 9), strict=True):
        blocks = leaves(draft, lambda prefix: True, 2)
        rows, drafts = batch(target, draft, blocks, False)
        accept = laws(rows, drafts, mode=mode, backend=backend)[0].reshape(-1, 2)
        means = [float(length_law(a, mode) @ torch.arange(3.0, dtype=torch.float64)) for a in accept]
        chance = [np.prod([draft(())[x] for x in block]) for block in blocks]
        assert np.dot(means, chance) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_never_accepts_less(backend: Backend) -> None:
    for seed in range(5):
        target, draft = table(3, seed), table(3, seed + 50)
        blocks = leaves(draft, lambda prefix: True, 3)
        rows, drafts = batch(target, draft, blocks, False)
        chance = np.array([np.prod([draft(block[:i])[x] for i, x in enumerate(block)]) for block in blocks])
        mean = {}
        for mode in MODES:
            accept = laws(rows, drafts, mode=mode, backend=backend)[0].reshape(-1, 3)
            mean[mode] = chance @ [float(length_law(a, mode) @ torch.arange(4.0, dtype=torch.float64)) for a in accept]
        assert mean["block"] >= mean["token"] - 1e-12
        assert mean["block"] > mean["token"] + 1e-4  # and with these tables strictly more


def ragged(seed: int, requests: int = 100, vocabulary: int = 37, dtype: torch.dtype = torch.float64) -> Batch:
    """A batch with draft lengths 0..5, some proposals deterministic, and its noise."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (requests,), generator=g).tolist()
    drafted = sum(lengths)
    target = torch.softmax(torch.randn(drafted + requests, vocabulary, generator=g, dtype=torch.float64), -1)
    probs = torch.softmax(torch.randn(drafted, vocabulary, generator=g, dtype=torch.float64), -1)
    probs = torch.where(torch.rand(probs.shape, generator=g) < 0.3, 0.0, probs)
    at = torch.arange(drafted) + torch.repeat_interleave(torch.arange(requests), torch.tensor(lengths))
    probs = 0.5 * probs + 0.5 * target[at]
    probs /= probs.sum(-1, keepdim=True)
    target, probs = target.to(dtype), probs.to(dtype)
    ids = torch.multinomial(probs, 1, generator=g)[:, 0]
    rows = torch.where(torch.rand(drafted, generator=g) < 0.1, -1, torch.arange(drafted))
    noise = block_uniforms(list(range(requests)), [3] * requests, lengths, [1] * requests)
    return target, Drafts(ids, lengths, probs, rows), noise


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("mode", MODES)
def test_backends_decide_alike(mode: Mode, dtype: torch.dtype) -> None:
    for seed in range(5):
        target, drafts, noise = ragged(seed, dtype=dtype)
        by = {b: verify(target, drafts, noise.accept, noise.last, mode=mode, backend=b) for b in BACKENDS}
        for backend in ("numba", "torch"):
            assert torch.equal(by[backend].accepted, by["reference"].accepted)
            assert torch.equal(by[backend].tokens, by["reference"].tokens)
            torch.testing.assert_close(by[backend].accept_probs, by["reference"].accept_probs, rtol=0, atol=1e-13)
        assert 0 < int(by["numba"].accepted.sum()) < len(drafts.ids)  # the case is not trivial
        exposed = {b: laws(target, drafts, mode=mode, backend=b) for b in BACKENDS}
        for backend in BACKENDS[1:]:
            for mine, reference in zip(exposed[backend], exposed["reference"], strict=True):
                torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_request_is_decided_alike_alone_and_in_a_batch(mode: Mode) -> None:
    target, drafts, noise = ragged(3, vocabulary=700, dtype=torch.float32)
    for backend in BACKENDS:
        together = verify(target, drafts, noise.accept, noise.last, mode=mode, backend=backend)
        for b, (start, size) in enumerate(zip(drafts.token_starts.tolist(), drafts.lengths, strict=True)):
            mine, rows = slice(start, start + size), slice(start + b, start + b + size + 1)
            alone = Drafts(drafts.ids[mine], [size], drafts.probs, drafts.probs_rows[mine])
            own = block_uniforms([b], [3], [size], [1])
            verdict = verify(target[rows], alone, own.accept, own.last, mode=mode, backend=backend)
            assert int(verdict.accepted[0]) == int(together.accepted[b])
            assert int(verdict.tokens[0]) == int(together.tokens[b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_greedy_is_the_one_hot_case(mode: Mode, backend: Backend) -> None:
    target, drafts, noise = ragged(5)
    best = target.argmax(-1)
    at = torch.arange(len(drafts.ids)) + torch.repeat_interleave(
        torch.arange(len(drafts.lengths)), torch.tensor(drafts.lengths)
    )
    right = torch.rand(len(drafts.ids), generator=torch.Generator().manual_seed(0)) < 0.6
    ids = torch.where(right, best[at], drafts.ids)
    one_hot = torch.nn.functional.one_hot(best, target.shape[1]).double()
    stochastic = verify(one_hot, Drafts(ids, drafts.lengths), noise.accept, noise.last, mode=mode, backend=backend)
    accepted, tokens = verify_greedy(best, ids, drafts.lengths)
    assert torch.equal(stochastic.accepted, accepted) and torch.equal(stochastic.tokens, tokens)
    for b, (start, size) in enumerate(zip(drafts.token_starts.tolist(), drafts.lengths, strict=True)):
        expected = best[start + b : start + b + size + 1].tolist()  # the longest common prefix, then the target's own
        tau = next((i for i in range(size) if int(ids[start + i]) != expected[i]), size)
        assert (int(accepted[b]), int(tokens[b])) == (tau, expected[tau])


def drawn_texts(mode: Mode, backend: Backend, round_of: Callable[[int], int], requests: int) -> np.ndarray:
    """[V^3] counts of three tokens drawn by repeated draft-verify steps (K=2) under the real random streams."""
    vocabulary, need = 3, 3
    target, draft = table(vocabulary, 31), table(vocabulary, 32)
    seeds = np.arange(requests)
    texts: list[tuple[int, ...]] = [()] * requests
    p_all = {text: target(text) for n in range(need + 3) for text in itertools.product(range(vocabulary), repeat=n)}
    q_all = {text: draft(text) for text in p_all}
    step = 0
    while open_ := [b for b in range(requests) if len(texts[b]) < need]:
        step += 1
        prefixes, who = [texts[b] for b in open_], seeds[open_]
        starts = np.array([len(text) for text in prefixes])
        blocks: list[tuple[int, ...]] = [()] * len(open_)
        for i in range(2):
            q = torch.tensor(np.array([q_all[text + block] for text, block in zip(prefixes, blocks, strict=True)]))
            noise = uniforms(who, Purpose.DRAFT, starts + i, round_of(step))
            picked = sample(q, noise, backend=backend).tolist()
            blocks = [(*block, x) for block, x in zip(blocks, picked, strict=True)]
        pairs = list(zip(prefixes, blocks, strict=True))
        rows = torch.tensor(np.array([p_all[t + block[:i]] for t, block in pairs for i in range(3)]))
        probs = torch.tensor(np.array([q_all[t + block[:i]] for t, block in pairs for i in range(2)]))
        drafts = Drafts(torch.tensor([x for block in blocks for x in block]), [2] * len(open_), probs)
        noise_ = block_uniforms(who, starts, drafts.lengths, [round_of(step)] * len(open_))
        verdict = verify(rows, drafts, noise_.accept, noise_.last, mode=mode, backend=backend)
        decided = zip(open_, blocks, verdict.accepted.tolist(), verdict.tokens.tolist(), strict=True)
        for b, block, tau, token in decided:
            texts[b] = (*texts[b], *block[:tau], token)
    index = np.array([text[0] * 9 + text[1] * 3 + text[2] for text in texts])
    return np.bincount(index, minlength=27)


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations above its mean, against the toy target's law of three tokens."""
    expected = target_law(table(3, 31), 3, 3) * counts.sum()
    value = ((counts - expected) ** 2 / expected).sum()
    return float((value - 26) / np.sqrt(52))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ("numba", "torch"))
def test_texts_drawn_over_several_steps_follow_the_target(mode: Mode, backend: Backend) -> None:
    assert chi_square(drawn_texts(mode, backend, lambda step: step, 20_000)) < 4


def test_streams_without_the_round_would_bias_block_verification() -> None:
    """Why DRAFT and ACCEPT draws carry the round: block verification has looked at the suffix it discards."""
    assert chi_square(drawn_texts("block", "numba", lambda step: 0, 20_000)) > 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_is_the_inverse_cdf(backend: Backend) -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(7, -1)
    noise = np.array([0.0, 0.249, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-53])
    assert sample(probs, noise, backend=backend).tolist() == [1, 1, 3, 3, 3, 4, 4]


def test_sampling_a_large_vocabulary_follows_its_law() -> None:
    """Against float64 searchsorted in the interior of every token's interval, across chunk borders."""
    g = torch.Generator().manual_seed(0)
    probs = torch.softmax(3 * torch.randn(1, 5000, generator=g), -1)
    cdf = np.concatenate([[0], probs[0].double().cumsum(0).numpy()])
    middle = (cdf[1:] + cdf[:-1]) / 2 / cdf[-1]
    for backend in ("numba", "torch"):
        assert sample(probs.expand(5000, -1), middle, backend=backend).tolist() == list(range(5000))


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    target, drafts, noise = ragged(9, dtype=torch.float32)
    at = torch.arange(len(drafts.ids)) + torch.repeat_interleave(
        torch.arange(len(drafts.lengths)), torch.tensor(drafts.lengths)
    )
    same = Drafts(drafts.ids, drafts.lengths, target[at])
    for mode, backend in itertools.product(MODES, BACKENDS):
        verdict = verify(target, same, noise.accept, noise.last, mode=mode, backend=backend)
        assert verdict.accepted.tolist() == list(drafts.lengths)


def test_mistakes_name_their_remedy() -> None:
    target, ids = torch.full((3, 4), 0.25), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="use 0 for plain decoding"):
        Drafts(ids, [3, -1])
    with pytest.raises(ValueError, match="add up to 3"):
        Drafts(ids, [3])
    with pytest.raises(ValueError, match="one more"):
        laws(target, Drafts(ids, [1, 1]))
    with pytest.raises(ValueError, match="token 9 is outside"):
        laws(target, Drafts(torch.tensor([1, 9]), [2]))
    with pytest.raises(ValueError, match="scatter the draft"):
        laws(target, Drafts(ids, [2], torch.full((2, 3), 1 / 3)))
    with pytest.raises(ValueError, match="unknown verification mode 'tree'"):
        laws(target, Drafts(ids, [2]), mode="tree")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with spec.random"):
        verify(target, Drafts(ids, [2]), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="widens them"):
        laws(target.bfloat16(), Drafts(ids, [2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_decides_as_the_reference(mode: Mode) -> None:
    target, drafts, noise = ragged(2, vocabulary=5000, dtype=torch.float32)
    assert drafts.probs is not None and drafts.rows is not None
    there = Drafts(drafts.ids.cuda(), drafts.lengths, drafts.probs.cuda(), drafts.rows.cuda())
    mine = verify(target.cuda(), there, noise.accept, noise.last, mode=mode)
    reference = verify(target, drafts, noise.accept, noise.last, mode=mode, backend="reference")
    assert torch.equal(mine.accepted.cpu(), reference.accepted)
    assert torch.equal(mine.tokens.cpu(), reference.tokens)
    exposed = laws(target.cuda(), there, mode=mode)[1].cpu()
    torch.testing.assert_close(exposed, laws(target, drafts, mode=mode, backend="reference")[1], rtol=0, atol=1e-12)
