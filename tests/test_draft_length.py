"""Draft lengths that follow past acceptance leave the law of the text alone, and find the fastest length."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.draft_length import Adaptive, DraftLength, Fixed, best_lengths, best_lengths_alone
from spec.drafters.base import Context
from spec.params import Params
from spec.random import Purpose, block_uniforms, uniforms
from spec.stats import best_draft_length, block_efficiency, predicted_speedup
from spec.step_costs import StepCosts, rounded
from spec.verify import Drafts, Mode, laws, length_law, sample, verify
from tests.test_verify import MODES, Table, chi_square, table, target_law

Tokens = tuple[int, ...]
History = tuple[tuple[int, int], ...]  # (drafted, accepted) of every round
Policy = Callable[[Tokens, History], int]
V = 3


def rounds_law(
    target: Table, draft: Table, policy: Policy, size: int, mode: Mode, kept: Callable[[Tokens], Tokens] = lambda x: x
) -> np.ndarray:
    """[V^size] the law of the first tokens of a text decoded round by round: a sum over every path."""
    law: dict[Tokens, float] = defaultdict(float)
    paths: dict[tuple[Tokens, History], float] = {((), ()): 1.0}  # a path has one parent: its history tells where
    while paths:
        (text, history), mass = paths.popitem()
        if len(text) >= size:
            law[text[:size]] += mass
            continue
        drawn = list(itertools.product(range(V), repeat=policy(text, history)))
        chances = [np.prod([draft(text + block[:i])[x] for i, x in enumerate(block)]) for block in drawn]
        for (block, tau, token), share in step_law(
            target, draft, text, [kept(block) for block in drawn], chances, mode
        ):
            path = (*text, *block[:tau], token), (*history, (len(block), tau))
            paths[path] = paths.get(path, 0.0) + mass * share
    return np.array([law[text] for text in itertools.product(range(V), repeat=size)])


def step_law(
    target: Table, draft: Table, text: Tokens, blocks: list[Tokens], chances: list[float], mode: Mode
) -> list[tuple[tuple[Tokens, int, int], float]]:
    """What a verification step of each block can come to, with its chance: (block, accepted, last token)."""
    rows = torch.tensor(np.array([target(text + block[:i]) for block in blocks for i in range(len(block) + 1)]))
    ids = torch.tensor([x for block in blocks for x in block], dtype=torch.long)
    probs = torch.tensor(np.array([draft(text + block[:i]) for block in blocks for i in range(len(block))]))
    accept, last = laws(rows, Drafts(ids, [len(b) for b in blocks], probs.reshape(len(ids), V)), mode=mode)
    outcomes, at = [], 0
    for b, (block, chance) in enumerate(zip(blocks, chances, strict=True)):
        for tau, share in enumerate(length_law(accept[at : at + len(block)], mode).tolist()):
            weights = last[at + b + tau].tolist()
            outcomes += [((block, tau, token), chance * share * weight) for token, weight in enumerate(weights)]
        at += len(block)
    return outcomes


def adaptive(text: Tokens, history: History) -> int:
    """What :class:`Adaptive` decides after such a history, with a short memory and frequent probes."""
    policy, context = Adaptive(3, (0.3, 1.0), memory=2, probe_every=2), Context(0, Params(), ())
    for drafted, accepted in history:
        policy.lengths([context], [3])
        policy.observe([context], [drafted], [accepted], None, None)
    return policy.lengths([context], [3])[0]


POLICIES: dict[str, Policy] = {
    "far after a rejection, nothing after success": lambda text, past: (
        2 if not past or past[-1][1] < past[-1][0] else 0
    ),
    "quits while ahead": lambda text, past: 0 if sum(tau for _, tau in past) >= 2 else 2,
    "insists after failure": lambda text, past: min(1 + sum(k - tau for k, tau in past), 3),
    "by the text too": lambda text, past: (sum(text) + 2 * sum(tau for _, tau in past) + len(past)) % 4,
    "Adaptive": adaptive,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_the_joint_law_is_the_targets_for_any_use_of_the_past(name: str, mode: Mode) -> None:
    target, draft = table(V, 41), table(V, 42)
    used = set()

    def policy(text: Tokens, history: History) -> int:
        used.add(length := POLICIES[name](text, history))
        return length

    law = rounds_law(target, draft, policy, 4, mode)
    assert np.abs(law - target_law(target, V, 4)).max() < 1e-12
    assert len(used) > 1  # it did adapt


@pytest.mark.parametrize("mode", MODES)
def test_a_length_that_has_seen_the_drawn_tokens_is_not_exact(mode: Mode) -> None:
    """The sum over paths notices: here drafts are cut before their first token 0."""
    target, draft = table(V, 41), table(V, 42)
    law = rounds_law(
        target, draft, lambda text, past: 2, 3, mode, lambda block: block[: block.index(0)] if 0 in block else block
    )
    assert abs(law.sum() - 1) < 1e-12
    assert np.abs(law - target_law(target, V, 3)).max() > 1e-3


def drawn_texts(round_of: Callable[[int], int], requests: int) -> np.ndarray:
    """[27] counts of three tokens drawn under the real random streams, lengths after past acceptance."""
    target, draft = table(V, 31), table(V, 32)
    texts: list[Tokens] = [()] * requests
    missed = [0] * requests
    step = 0
    while open_ := [b for b in range(requests) if len(texts[b]) < 3]:
        step += 1
        starts = [len(texts[b]) for b in open_]
        lengths = [1 + (missed[b] > 0) for b in open_] if step > 1 else [2] * len(open_)
        blocks: list[Tokens] = [()] * len(open_)
        for i in range(2):
            going = [j for j, length in enumerate(lengths) if length > i]
            q = torch.tensor(np.array([draft(texts[open_[j]] + blocks[j]) for j in going]))
            noise = uniforms([open_[j] for j in going], Purpose.DRAFT, [starts[j] + i for j in going], round_of(step))
            for j, x in zip(going, sample(q, noise).tolist(), strict=True):
                blocks[j] = (*blocks[j], x)
        pairs = [(texts[b], block) for b, block in zip(open_, blocks, strict=True)]
        rows = torch.tensor(np.array([target(t + block[:i]) for t, block in pairs for i in range(len(block) + 1)]))
        probs = torch.tensor(np.array([draft(t + block[:i]) for t, block in pairs for i in range(len(block))]))
        drafts = Drafts(torch.tensor([x for block in blocks for x in block]), lengths, probs)
        noise_ = block_uniforms(open_, starts, lengths, [round_of(step)] * len(open_))
        verdict = verify(rows, drafts, noise_.accept, noise_.last, mode="block")
        for b, block, tau, y in zip(open_, blocks, verdict.accepted.tolist(), verdict.tokens.tolist(), strict=True):
            texts[b], missed[b] = (*texts[b], *block[:tau], y), len(block) - tau
    return np.bincount([text[0] * 9 + text[1] * 3 + text[2] for text in texts], minlength=27)


def test_drawn_texts_follow_the_target_because_noise_is_keyed_by_the_round() -> None:
    """With one draw a position and purpose, the second round would reuse noise that the first has looked at."""
    assert chi_square(drawn_texts(lambda step: step, 15_000)) < 4
    assert chi_square(drawn_texts(lambda step: 0, 15_000)) > 8


class Machine:
    """Simulates steps: tokens pass with a chance that may change with time, and seconds are what they are."""

    def __init__(self, policy: DraftLength, draft: float, target: Callable[[int], float], limit: int = 8) -> None:
        self.policy, self.draft, self.target, self.limit = policy, draft, target, limit
        self.rng = np.random.default_rng(0)
        self.context = Context(0, Params(), ())

    def run(self, alpha: float, steps: int) -> list[int]:
        """The lengths chosen."""
        chosen = []
        for step in range(steps):
            length = self.policy.lengths([self.context], [self.limit])[0]
            chosen.append(length)
            accepted = int((self.rng.random(length) < alpha).cumprod().sum())
            hiccup = 20 if step % 23 == 7 else 1
            seconds = hiccup * self.target(length + 1), hiccup * self.draft * length
            self.policy.observe([self.context], [length], [accepted], *seconds)
        return chosen


@pytest.mark.parametrize(("alpha", "ratio"), [(0.9, 0.05), (0.8, 0.1), (0.5, 0.3), (0.3, 0.5), (0.05, 0.2)])
def test_it_settles_on_the_best_length(alpha: float, ratio: float) -> None:
    best = predicted_speedup(alpha, best_draft_length(alpha, ratio, 8), ratio)
    for costs in ((ratio, 1.0), None):
        lengths = Machine(Adaptive(8, costs), ratio, lambda rows: 1.0).run(alpha, 1200)[400:]
        tokens = sum(block_efficiency(alpha, length) for length in lengths)
        seconds = sum(1 + ratio * length for length in lengths)
        assert tokens / seconds > 0.95 * best


def test_it_stops_drafting_where_that_does_not_pay_and_tries_again_now_and_then() -> None:
    lengths = Machine(Adaptive(8, (0.1, 1.0), probe_every=20), 0.1, lambda rows: 1.0).run(0.0, 1000)[200:]
    assert set(lengths) == {0, 1}
    assert sum(lengths) == pytest.approx(len(lengths) / 20, abs=1)


def test_where_drafting_pays_for_nobody_one_probes_for_all() -> None:
    """At saturation: 16 sequences, a target whose time grows with its rows. Then most of them leave."""
    policy, everyone = Adaptive(4, probe_every=20), [Context(i, Params(), ()) for i in range(16)]

    def run(contexts: list[Context], steps: int) -> np.ndarray:
        chosen = []
        for _ in range(steps):
            chosen.append(lengths := policy.lengths(contexts, [4] * len(contexts)))
            drafting, accepted = np.count_nonzero(lengths), [length if len(contexts) == 1 else 0 for length in lengths]
            policy.observe(contexts, lengths, accepted, float(max(8, len(contexts) + sum(lengths))), 0.1 * drafting)
        return np.array(chosen)

    lengths = run(everyone, 600)[200:]
    assert lengths.max() == 1 and lengths.sum() == pytest.approx(2 * len(lengths) / 21, abs=3)  # twice each time
    assert (lengths > 0).any(0).sum() > 8  # not always the same
    assert run(everyone[:1], 300)[200:].mean() > 2


def test_a_full_batch_is_learnt_from_steps_that_all_read_a_prompt() -> None:
    """Requests that come and go, after one that was alone; every step is bound by its rows."""
    policy, few, many = Adaptive(4), [Context(0, Params(), ())], [Context(i, Params(), ()) for i in range(1, 33)]
    drafted = []
    for step in range(60):
        contexts, prompt_rows = (few, 0) if step < 30 else (many, 40)
        lengths = policy.lengths(contexts, [4] * len(contexts))
        rows = len(contexts) + sum(lengths) + prompt_rows
        accepted = [min(length, 1) if (3 * step + b) % 10 < 7 else 0 for b, length in enumerate(lengths)]
        policy.observe(contexts, lengths, accepted, float(max(8, rows)), 0.5 * max(lengths), prompt_rows)
        drafted.append(sum(lengths))
    assert sum(drafted[:30]) > 20 and sum(drafted[40:]) < 20  # of 32 sequences for 20 steps


def test_a_draft_that_was_slow_for_a_while_is_used_again() -> None:
    """Both were, but plain steps are timed at once, and drafts only when they are tried."""
    machine = Machine(Adaptive(8), 0.1, lambda rows: 1.0)
    machine.run(0.6, 200)
    machine.draft = 3.0
    assert np.mean(machine.run(0.6, 100)[50:]) < 0.2
    machine.draft = 0.1
    assert np.mean(machine.run(0.6, 300)[200:]) > 1.5


def closed_loop(policy: Adaptive, prompt: int, clients: int, steps: int) -> tuple[float, float]:
    """Seconds a token and share of sequences drafted for; a client's text of 20 tokens follows the last."""
    rng, ids, read = np.random.default_rng(3), itertools.count(), defaultdict(int)

    def new() -> Context:
        return Context(next(ids), Params(), (0,) * prompt, capacity=prompt + 20)

    running, tokens, seconds, drafting = [new() for _ in range(clients)], 0, 0.0, 0
    for context in running:
        context.output_ids += [0] * int(rng.integers(0, 20))
    for _ in range(steps):
        lengths = policy.lengths(running, [max(c.capacity - len(c) - 1, 0) for c in running])
        accepted = [int((rng.random(k) < 0.6).cumprod().sum()) for k in lengths]
        target, draft = 4 + 0.1 * (len(running) + sum(lengths)), 0.0
        draft += 0.5 * max(lengths)
        draft += sum(0.1 * (len(c) - read[c.id]) for c, k in zip(running, lengths, strict=True) if k)
        policy.observe(running, lengths, accepted, target, draft)
        for context, k, tau in zip(running, lengths, accepted, strict=True):
            context.output_ids += [0] * (tau + 1)
            read[context.id] = len(context) if k else read[context.id]
        tokens, seconds, drafting = (
            tokens + len(running) + sum(accepted), seconds + target + draft, drafting + np.count_nonzero(lengths)
        )  # fmt: skip
        for context in [c for c in running if len(c) >= c.capacity]:
            policy.forget(context)
            running[running.index(context)] = new()
    return seconds / tokens, drafting / steps / clients


def test_one_slow_step_of_a_new_number_of_sequences_does_not_start_drafting() -> None:
    """After a text alone and 32 at a time there are 16, whose first step is slow: its plain step must not look dear."""
    policy, drafted = Adaptive(4), []
    for step in range(150):
        batch = 1 if step < 40 else 32 if step < 80 else 16
        contexts = [Context(batch * 100 + i, Params(), ()) for i in range(batch)]
        lengths = policy.lengths(contexts, [4] * batch)
        seconds = 2.5 * step if step == 80 else 20.0 + 1.6 * (batch + sum(lengths))
        accepted = [min(k, 1) if (3 * step + i) % 10 < 4 else 0 for i, k in enumerate(lengths)]
        policy.observe(contexts, lengths, accepted, seconds, (2 + batch) * max(lengths))
        drafted.append(sum(lengths))
    assert sum(drafted[:40]) > 20 and sum(drafted[80:]) < 8


def test_where_no_step_is_timed_it_drafts_all_the_same() -> None:
    """As beside requests that have a length of their own."""
    policy, contexts = Adaptive(4), [Context(0, Params(), ()), Context(1, Params(), ())]
    drafted = []
    for _ in range(40):
        drafted.append(lengths := policy.lengths(contexts, [4, 4]))
        policy.observe(contexts, lengths, lengths, None, None)
    assert np.mean(drafted[20:]) > 3


def test_what_a_draft_must_read_first_counts() -> None:
    """Long prompts and short texts: drafting pays without the prompts, and not with them."""
    for prompt, clients, drafts in ((0, 8, True), (200, 8, False), (20, 1, True)):
        plain, _ = closed_loop(Adaptive(0), prompt, clients, 600)
        policy = Adaptive(4)
        closed_loop(policy, prompt, clients, 100)
        per_token, share = closed_loop(policy, prompt, clients, 600)
        assert bool(share > 0.5) is drafts
        assert per_token < plain * (0.9 if drafts else 1.04)


@pytest.mark.parametrize("costs", [(0.1, 1.0), None])
def test_it_recovers(costs: tuple[float, float] | None) -> None:
    machine = Machine(Adaptive(8, costs), 0.1, lambda rows: 1.0)
    assert max(machine.run(0.0, 400)[200:]) <= 1
    lengths = machine.run(0.95, 400)
    assert np.mean(lengths[200:]) > 6
    assert max(machine.run(0.0, 300)[100:]) <= 1


def test_probes_that_succeed_follow_each_other() -> None:
    """Or recovery would take a probe's wait for every token of length."""
    machine = Machine(Adaptive(8, (0.5, 1.0), probe_every=100), 0.5, lambda rows: 1.0)
    assert max(machine.run(0.0, 400)[300:]) <= 1
    assert max(machine.run(1.0, 200)) == 8


def test_it_learns_what_rows_cost() -> None:
    """A target whose time grows with its rows, as on a busy machine: drafts must earn them."""
    for per_row in (0.0, 0.1, 0.3, 1.0):
        target = np.arange(10) * per_row + 1 - per_row
        machine = Machine(Adaptive(8), 0.02, target.__getitem__)
        rates = [block_efficiency(0.7, k) / (machine.target(k + 1) + 0.02 * k) for k in range(9)]
        lengths = machine.run(0.7, 1500)[500:]
        tokens = sum(block_efficiency(0.7, length) for length in lengths)
        seconds = sum(machine.target(length + 1) + 0.02 * length for length in lengths)
        assert tokens / seconds > 0.93 * max(rates)


def test_with_fixed_costs_company_makes_no_difference() -> None:
    """Nor do timings, whether the engine has any for the step or not."""

    def run(others: int, seconds: float | None) -> list[int]:
        policy, rng, strangers = Adaptive(6, (0.15, 1.0), probe_every=8), np.random.default_rng(1), range(1, 1 + others)
        mine = Context(0, Params(), ())
        luck, chosen = np.random.default_rng(2), []
        for step in range(300):
            if step == 150:
                for id in strangers:
                    policy.forget(Context(id, Params(), ()))
            contexts = [mine, *(Context(id, Params(), ()) for id in strangers)]
            lengths = policy.lengths(contexts, [6] * len(contexts))
            accepted = [int((luck.random(6)[: lengths[0]] < 0.5 + 0.4 * np.sin(step / 30)).cumprod().sum())]
            accepted += [int(rng.integers(0, length + 1)) for length in lengths[1:]]
            policy.observe(contexts, lengths, accepted, seconds, seconds)
            chosen.append(lengths[0])
        return chosen

    alone = run(0, None)
    assert len(set(alone)) > 3
    assert alone == run(0, 0.5) == run(3, 2.0)


def test_new_sequences_start_from_what_the_others_showed() -> None:
    machine = Machine(Adaptive(8), 0.3, lambda rows: 1.0)
    machine.run(0.02, 300)
    new = Context(1, Params(), ())
    assert sum(machine.policy.lengths([new], [8])[0] for _ in range(4)) <= 1  # a probe that was due
    assert Adaptive(8, (0.3, 1.0)).lengths([new], [8])[0] > 0


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_the_choice_for_a_batch_is_the_best_of_all(batch: int, longest: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    survival = rng.choice([0.0, 0.3, 0.9, 1.0], (batch, longest)).cumprod(1)
    limits = rng.integers(0, longest + 1, batch).tolist()
    costs = 1 + rng.random(20) * rng.choice([0.0, 0.5, 3.0])  # by rows, not even monotone
    draft = rng.choice([0.0, 0.1, 0.5])

    def rate(lengths: tuple[int, ...]) -> float:
        tokens = batch + sum(survival[b, :k].sum() for b, k in enumerate(lengths))
        return tokens / (costs[batch + sum(lengths)] + draft * max(lengths))

    chosen = tuple(best_lengths(survival, limits, draft, lambda rows: costs[rows]).tolist())
    assert all(k <= limit for k, limit in zip(chosen, limits, strict=True))
    every = itertools.product(*(range(limit + 1) for limit in limits))
    assert rate(chosen) == pytest.approx(max(map(rate, every)), rel=1e-12)
    alone = best_lengths_alone(survival, limits, draft, 1.5).tolist()
    for b, limit in enumerate(limits):
        assert [alone[b]] == best_lengths(survival[b : b + 1], [limit], draft, lambda rows: 0 * rows + 1.5).tolist()


def test_limits_hold() -> None:
    contexts = [Context(i, Params(), ()) for i in range(3)]
    assert Fixed(4).lengths(contexts, [0, 2, 9]) == [0, 2, 4]
    for policy in (Adaptive(5, (0.0, 1.0), prior=1.0, probe_every=2), Adaptive(5, prior=1.0, probe_every=2)):
        seen = []
        for _ in range(12):
            seen.append(lengths := policy.lengths(contexts, [0, 2, 9]))
            policy.observe(contexts, lengths, lengths, 1.0, 0.01)
        assert np.max(seen, axis=0).tolist() == [0, 2, 5]
    assert Adaptive(0).lengths(contexts, [3, 3, 3]) == [0, 0, 0]


def test_costs_are_medians_interpolated_and_forgotten() -> None:
    costs = StepCosts()
    assert costs.target(np.array([1, 5])).tolist() == [1, 1] and costs.draft_token(3) == 0.1
    for seconds in (2.0, 50.0, 2.0):
        costs.observe(1, seconds)
        costs.observe_draft(1, 1, 2, 9.0)  # two tokens read, too few to tell
    costs.observe(5, 4.0)
    assert costs.target(np.array([1, 3, 5, 100])).tolist() == [2, 3, 4, 4]
    assert [costs.draft_token(n) for n in (1, 3, 5)] == pytest.approx([0.2, 0.3, 0.4])  # a guess, until one was timed
    costs.observe_draft(1, 4, 0, 1.0)
    assert [costs.draft_token(n) for n in (1, 3, 5)] == [0.25, 0.375, 0.5]  # as the target's step grows
    costs.observe_draft(5, 2, 0, 5.0)
    assert [costs.draft_token(n) for n in (1, 3, 5)] == [0.25, 1.5, 2.5]  # hopeful for fewer
    assert costs.reading() == 0
    costs.observe_draft(5, 2, 50, 5.0 + 50 * 0.1)
    assert costs.reading() == pytest.approx(0.1)
    for _ in range(3):
        costs.observe_draft(1, 1, 50, 1e3)
    assert costs.reading() == 0.25  # a drafted token, at the most
    costs.observe(3, 100.0)
    assert costs.target(np.array([1, 3, 5])).tolist() == [2, 52, 52]  # more rows never take less: the mean of the two
    assert [costs.knows(rows) for rows in (1, 3, 5, 7)] == [True, False, False, False]
    for _ in range(1100):
        costs.observe(5, 4.0)
    assert costs.target(np.array([1])).tolist() == [4]  # as of long ago: to be tried again
    assert [rounded(n) for n in (1, 16, 17, 64, 66)] == [1, 16, 16, 64, 64]


def test_a_prompts_rows_have_a_cost_of_their_own() -> None:
    """Steps of 3 s and 0.5 s an output row and 0.1 s a prompt's; the first of them all read one."""
    costs = StepCosts()

    def observe(rows: int, prompt_rows: int) -> None:
        costs.observe(rows, 3 + 0.5 * rows + 0.1 * prompt_rows, prompt_rows)

    observe(1, 100)  # too much of a prompt to tell what its one row took
    assert costs.target(np.array([1])).tolist() == [1]
    for rows, prompt_rows in ((1, 0), (4, 0), (4, 50)):
        observe(rows, prompt_rows)
    for _ in range(30):
        observe(32, 20)
        observe(32, 0)
        observe(1, 100)
    assert costs.target(np.array([1, 4, 32])) == pytest.approx([3.5, 5, 19])
    assert costs.target(np.array([64]))[0] == pytest.approx(19 + 32 * 0.1)  # beyond: as a prompt's rows


def test_to_begin_to_draft_must_promise_more_than_noise() -> None:
    survival, costs = np.array([[0.5]]), np.array([0.0, 1.0, 1.46])  # drafting gives 1.5 tokens in 1.46
    for worthwhile, best in ((1.0, [1]), (1.05, [0])):
        assert best_lengths(survival, [1], 0.0, lambda rows: costs[rows], worthwhile=worthwhile).tolist() == best


def test_mistakes_name_their_remedy() -> None:
    for build in (lambda: Fixed(-1), lambda: Adaptive(-1)):
        with pytest.raises(ValueError, match="use 0 for plain decoding"):
            build()
    with pytest.raises(ValueError, match="target seconds > 0"):
        Adaptive(4, (0.1, 0.0))
    with pytest.raises(ValueError, match="acceptance rate"):
        Adaptive(4, prior=1.5)
    with pytest.raises(ValueError, match="probe_every"):
        Adaptive(4, probe_every=1)
