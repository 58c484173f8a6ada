"""Scores of tokens: what must hold exactly, prefix by prefix, by summing over every token there could have been."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from spec_models import TableModel, random_logits, tiny_llama

from spec.audit.conditionals import LookupConditionals, ModelConditionals
from spec.audit.engines.ours import offsets
from spec.audit.evidence import _gains
from spec.audit.laws import Laws, Rows, named_ratios, target_law
from spec.audit.sample import UNKNOWN, Sample
from spec.audit.scoring import Scorer, _pit
from spec.audit.sums import (
    EXPONENTS,
    LENIENCE,
    UNLIKELY,
    mass_ahead,
    mass_before,
    mass_outside,
    overlaps,
    power_sums,
    row_sums,
    top_tokens,
)
from spec.params import Params
from spec.sampling import processed_probs

V = 7
EVERYTHING = Params(
    temperature=0.8, top_k=5, top_p=0.9, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.2,
    frequency_penalty=0.1, logit_bias={1: 0.7, 4: -0.4},
)  # fmt: skip
BIAS = 1e-7  # spec.params.row_options holds logit biases in float32
PROMPT, SAID = (3, 1, 2), (1, 4, 4, 0, 1)


def table(seed: int) -> TableModel:
    return TableModel(random_logits(V, seed), V)


def law_by_hand(params: Params, seed: int, said: tuple[int, ...]) -> np.ndarray:
    """[V] float64 after PROMPT and ``said``, without row_options."""
    return processed_probs(
        torch.from_numpy(random_logits(V, seed)((*PROMPT, *said)))[None],
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
        repetition_penalty=params.repetition_penalty, presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty, logit_bias=params.logit_bias,
        prompt_ids=torch.tensor([PROMPT]), output_ids=torch.tensor([list(said) or [-1]]),
    )[0].numpy()  # fmt: skip


def test_scores_are_those_of_the_processed_law_at_every_prefix() -> None:
    for params in (Params(), EVERYTHING):
        scored = Scorer(ModelConditionals(table(0))).score([Sample(PROMPT, SAID, params)])
        for at, token in enumerate(SAID):
            p = law_by_hand(params, 0, SAID[:at])
            kept = p[p > 0]
            with np.errstate(divide="ignore"):
                assert scored.log_p[at] == pytest.approx(np.log(p[token]), abs=BIAS)
            assert scored.entropy[at] == pytest.approx(-(kept * np.log(kept)).sum(), abs=BIAS)
            variance = (kept * np.log(kept) ** 2).sum() - scored.entropy[at] ** 2
            assert scored.spread[at] == pytest.approx(variance, abs=BIAS)
            for hit, expected in scored.directions.values():
                assert hit[at] in (0, 1) and 0 <= expected[at] <= 1


def test_pieces_of_any_size_and_many_samples_give_the_same_scores() -> None:
    """Also where a piece ends within a completion, whose next row needs the law of the row before."""
    samples = [
        Sample(PROMPT, SAID, EVERYTHING),
        Sample((0, 0, 5, 6), SAID[::-1], Params()),
        Sample(PROMPT, (), Params()),
    ]

    def score(**options: int) -> list[np.ndarray]:
        scored = Scorer(ModelConditionals(table(0)), ModelConditionals(table(1)), **options).score(samples)
        return [
            scored.log_p,
            scored.pit,
            scored.draft_pit,
            scored.position,
            *(x for pair in scored.ratios.values() for x in pair),
        ]

    three_rows = score(elements=3 * table(0).vocab_size)
    for a, b in zip(score(), three_rows, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def every_token(params: Params, at: int = 2) -> tuple[Rows, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One prefix, V rows with each token in turn; p, q and the law of the row before."""
    said = SAID[:at]
    logits = torch.from_numpy(random_logits(V, 0)((*PROMPT, *said))).repeat(V, 1)
    rows = Rows(
        logits, [params] * V, [PROMPT] * V, [said] * V, torch.arange(V), torch.full((V,), said[-1]),
        torch.full((V,), 4), torch.tensor([[4, 1, 1, -1]]).repeat(V, 1),
    )  # fmt: skip
    q = torch.from_numpy(law_by_hand(params, 1, said)).repeat(V, 1)
    return rows, target_law(rows), q, torch.from_numpy(law_by_hand(params, 0, said[:-1]))


@pytest.mark.parametrize("params", [Params(), EVERYTHING, Params(temperature=0.5, top_p=0.6)], ids=str)
def test_every_named_law_is_a_law(params: Params) -> None:
    """Summed over all tokens, p(x) times the ratio and the mass outside p's support are 1: bets on it are fair."""
    rows, p, q, _ = every_token(params)
    # the row before is the same for all V copies: given as ``last`` to a batch of one row each
    names = set()
    for x in range(V):
        one = Rows(
            rows.logits[x:][:1], rows.params[:1], rows.prompts[:1], rows.outputs[:1], rows.tokens[x:][:1],
            rows.previous[x:][:1], rows.twins[x:][:1], rows.recent[x:][:1] if rows.recent is not None else None,
        )  # fmt: skip
        names |= {name for name, _ in named_ratios(one, Laws(p[:1], q[:1], p[0]))}
    for name, ratio in named_ratios(rows, Laws(p, q, p[0].clone())):
        inside = (p[0] * ratio.log_ratio.exp())[p[0] > 0].sum()
        assert float(inside + ratio.outside[0]) == pytest.approx(1, abs=1e-9), name
        names.discard(name)
    assert not names
    if params is EVERYTHING:
        found = {name for name, _ in named_ratios(rows, Laws(p, q, p[0]))}
        assert {"top_k dropped", "top_p dropped", "min_p dropped", "logit_bias dropped", "penalties dropped"} <= found


def test_named_laws_are_what_they_are_called() -> None:
    rows, p, q, last = every_token(EVERYTHING)
    found = dict(named_ratios(rows, Laws(p, q, last)))
    possible = p[0] > 0
    for name, law in {
        "draft leak": q[0],
        "penalties dropped": torch.from_numpy(
            law_by_hand(
                Params(temperature=0.8, top_k=5, top_p=0.9, min_p=0.02, logit_bias=EVERYTHING.logit_bias), 0, SAID[:2]
            )
        ),
    }.items():
        m = (p[0] * found[name].log_ratio.exp())[possible]
        torch.testing.assert_close(m, law[possible], atol=BIAS, rtol=0)
    heated = p[0].log()[possible] / 2
    torch.testing.assert_close(
        (p[0] * found["temperature x2"].log_ratio.exp())[possible], heated.softmax(-1), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_gains_are_fair_for_the_whole_null(eta: float) -> None:
    """Mean factor at most 1 for every law with p's proportions on the support and up to eta outside it."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        p, m = draw.dirichlet(np.ones(4)), draw.dirichlet(np.ones(5))  # m's last entry is outside
        share = float(draw.choice([0.003, 0.1, 0.9]))
        inside = np.exp(_gains(share, np.log(m[:4] / p), np.full(4, m[4]), np.zeros(4, bool), eta))
        outside = float(np.exp(_gains(share, np.zeros(1), m[4:], np.ones(1, bool), eta))[0])
        for lost in (0.0, eta / 2, eta):
            mean = (1 - lost) * float(p @ inside) + (lost * outside if lost else 0.0)
            assert mean <= 1 + 1e-9


def test_the_pit_tiles_the_unit_interval_with_ties_sharing() -> None:
    p = torch.tensor([[0.2, 0.2, 0.5, 0.0, 0.1]], dtype=torch.float64).repeat(5, 1)
    ahead, level = mass_ahead(p, p, torch.arange(5))
    low, high = (_pit(p.diagonal(), ahead, level, torch.full((5,), v, dtype=torch.float64)) for v in (0.0, 0.999999))
    np.testing.assert_allclose(low[[0, 1, 2, 4]], [0.5, 0.5, 0.0, 0.9], atol=1e-12)
    np.testing.assert_allclose(high[[0, 1, 2, 4]], [0.9, 0.9, 0.5, 1.0], atol=1e-5)
    assert bool(low[3].isnan())


def test_a_second_answer_to_a_request_is_compared_with_the_first_until_they_part() -> None:
    scorer = Scorer(ModelConditionals(table(0)))
    first, second = (Sample(PROMPT, said, Params(seed=i)) for i, said in enumerate([(1, 2, 3, 4), (1, 2, 5, 4)]))
    assert scorer._twin(first) == [-1] * 4
    assert scorer._twin(second) == [1, 2, 3, -1]
    assert scorer._twin(Sample(PROMPT, (1,), Params(temperature=0.5))) == [-1]  # another setting, another law


@pytest.mark.parametrize("slots", [1, 2, 3, 100])
@pytest.mark.parametrize("most", [1, 4, 7, 100])
def test_answers_share_passes_and_prompts_and_no_slot_is_lost(slots: int, most: int) -> None:
    """In a cramped cache, too: there every answer reads its own prompt."""
    model = TableModel(random_logits(V, 0), V, slots=slots)
    prompts = (PROMPT, (0, 0, 5, 6), (5,))
    samples = [Sample(prompts[i % 3], SAID[: 1 + i % 5], Params()) for i in range(7)]
    rows = torch.cat([piece.clone() for piece in ModelConditionals(model).rows(samples, most)])
    due = [random_logits(V, 0)((*s.prompt_ids, *s.token_ids[:i])) for s in samples for i in range(len(s.token_ids))]
    np.testing.assert_array_equal(rows.numpy(), np.stack(due))
    assert len(model.free) == slots and max(model.forwards) <= most
    if slots == most == 100:
        assert len(model.forwards) == 3  # two prompts of more than one token, and all answers together
    with pytest.raises(ValueError, match="no room for 3 tokens: give it a larger cache"):
        next(ModelConditionals(TableModel(random_logits(V, 0), V, slots=0)).rows(samples, most))


def test_a_forward_pass_that_fails_leaves_no_slot_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a prompt is read, and while an answer is."""
    for passes in (0, 1):
        model = TableModel(random_logits(V, 0), V, slots=5)
        left, forward = iter(range(passes)), model.forward

        def fails(step, left=left, forward=forward):
            next(left)
            return forward(step)

        monkeypatch.setattr(model, "forward", fails)
        with pytest.raises(RuntimeError):
            next(ModelConditionals(model).rows([Sample(PROMPT, SAID, Params())], 100))
        assert len(model.free) == 5


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_rows_are_right_to_rounding(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a chunk, with zeros and infinite orders; the truth from torch in float64."""
    monkeypatch.setattr("spec.audit.sums._on_cpu", lambda p: compiled)
    p, q = ((torch.randn(5, 5000, dtype=torch.float64) * heat).softmax(-1).to(dtype) for heat in (6, 3))
    p[2, 100:] = 0.0
    order, tokens = torch.where(p > 1e-4, p.round(decimals=3), torch.inf), torch.tensor([0, 1, 4999, 7, 8])
    ahead, level = order > (here := order.gather(-1, tokens[:, None])), order == here
    a, b = p.double(), q.double()
    s = -a.clamp_min(torch.finfo(dtype).tiny).log()
    entropy = (a * s).sum(-1)
    sums, both = row_sums(p), overlaps(p, q)
    for found, due in (
        (power_sums(p), torch.stack([a.pow(e).sum(-1) for e in EXPONENTS], -1)),
        (torch.stack(mass_ahead(p, order, tokens)), torch.stack([(a * ahead).sum(-1), (a * level).sum(-1)])),
        (mass_before(p, tokens), (a * (torch.arange(5000) < tokens[:, None])).sum(-1)),
        (mass_outside(q, p), (b * (a == 0)).sum(-1)),
        (sums.entropy, entropy), (sums.squares, (a * s * s).sum(-1)), (sums.typical, (-entropy).exp()),
        (sums.surprising, (a * (s > entropy[:, None])).sum(-1)), (sums.unlikely, (a * (a < UNLIKELY)).sum(-1)),
        (sums.support, (a > 0).sum(-1)),
        (both.liked, (a * (b > a)).sum(-1)), (both.outside, (b * (a == 0)).sum(-1)),
        (both.residual, (a - b).clamp(min=0).sum(-1)),
        (torch.stack(both.accepted), torch.stack([torch.minimum(b, f * a).sum(-1) for f in LENIENCE])),
    ):  # fmt: skip
        np.testing.assert_allclose(found.double(), due.double(), rtol=2e-6 if dtype == torch.float32 else 1e-13)
    assert top_tokens(p).tolist() == p.argmax(-1).tolist() and top_tokens(torch.ones(2, 9)).tolist() == [0, 0]


def test_a_forward_pass_by_a_real_model_scores_as_without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(0)
    sample = Sample((1, 2, 3, 4, 5), (7, 7, 30, 2), Params(temperature=0.7))
    monkeypatch.setattr("spec.audit.scoring._MOST_ROWS", 3)
    scored = Scorer(ModelConditionals(model)).score([sample])
    with torch.inference_mode():
        logits = model.model(torch.tensor([[*sample.prompt_ids, *sample.token_ids]])).logits[0, 4:-1]
    due = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    np.testing.assert_allclose(scored.log_p, due.numpy(), atol=1e-4)


_MEMORY = """
import resource, numpy as np, torch
from spec.allocator import keep_freed_memory
from spec.audit.sample import Sample
from spec.audit.scoring import Scorer
from spec.params import Params

class Noise:
    vocab_size = 16384

    def rows(self, samples, most):
        left = sum(len(sample.token_ids) for sample in samples)
        while left:
            yield torch.randn(min(most, left), self.vocab_size)
            left -= min(most, left)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

keep_freed_memory()
scorer = Scorer(Noise(), Noise(), elements=1_000_000)
samples = [Sample((1,), tuple(range(32)), Params(seed=i)) for i in range(128)]
scorer.score(samples[:4])
before = peak()
scorer.score(samples)
print(peak() - before)
"""


def test_scores_of_many_tokens_take_the_memory_of_few() -> None:
    """They once kept every piece's blocks: gigabytes. In a process of its own, for its highest memory."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 100


def test_another_tokenizer_is_a_users_mistake() -> None:
    with pytest.raises(ValueError, match="the target has 7"):
        Scorer(ModelConditionals(table(0))).score([Sample(PROMPT, (99,), Params())])


def test_lookup_says_what_followed_the_last_two_tokens_before() -> None:
    sample = Sample((1, 2, 3, 1, 2), (3, 5, 1, 2), Params())
    rows = torch.cat(list(LookupConditionals(V).rows([sample], 2)))
    assert rows[0].argmax() == 3 and rows[0].softmax(-1).max() == 1
    assert [bool(row.isfinite().all()) for row in rows] == [False, False, True, True]  # 1,2 and 2,3 were there


def test_positions_are_known_before_the_token_only() -> None:
    drafted = [True, True, False, False, True, False]
    assert offsets(drafted, "token") == (0, 1, 2, 0, 0, 1)
    assert offsets(drafted, "block") == (0, UNKNOWN, UNKNOWN, 0, 0, UNKNOWN)
