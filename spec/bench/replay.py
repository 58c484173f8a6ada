"""What was to be expected: the texts again, token by token, with the whole distributions of target and draft at hand.

At every prefix the drafter proposes one token, which gives q, and the target's row gives p; at the steps chosen it
proposes as many as the longest draft of interest, and the target verifies them without committing any. The noise is not
the run's, so what is expected and what was counted share the prefixes and nothing else.

Memory: no more than ``batch * (longest + 1)`` rows of each distribution at a time.

Shape legend: T tokens of a text, B texts that are still going, N rows of the target, M drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spec import stats
from spec.bench.counting import Text, useful_length
from spec.bench.plan import Served, Setting
from spec.drafters.base import Context, Drafter
from spec.models.base import LanguageModel, Step
from spec.sampling import processed_probs
from spec.verify import Drafts, Mode, verify

_PREFILL = 512  # tokens a forward pass
_SEED = 0x5EED << 40  # added to the requests' seeds: other noise than the run's


@dataclass(frozen=True)
class Trial:
    """A draft of K tokens at a step's start, and what verification thinks of it; [K] float64 each."""

    start: int
    limit: int  # longest draft that fits before max_tokens
    useful: int  # drafted tokens up to one that ends the text
    ends: bool  # whether the last of these does
    token: np.ndarray  # token-wise acceptance probabilities a_i
    block: np.ndarray  # block acceptance probabilities h_i, of the whole draft
    weights: np.ndarray  # block weights w_i: h_i where the draft ends with token i

    def survival(self, served: Served, length: int) -> np.ndarray:
        """P(at least i drafted tokens are committed), i = 1.., were the draft cut to ``length`` and the room there is.

        Token-wise it is a product; in a block it depends on where the draft ends, which only its last probability
        knows.
        """
        size = min(length, self.limit, len(self.token))
        if served == "block":
            accept = np.append(self.block[: size - 1], self.weights[size - 1]) if size else self.block[:0]
        else:
            accept = self.token[:size]
        mode: Mode = "block" if served == "block" else "token"
        return stats.survival(torch.from_numpy(accept), mode).numpy()[: self.useful]

    def tokens(self, served: Served, length: int) -> float:
        """Expected tokens of the step: the target's own too, unless an accepted draft ends the text."""
        survival = self.survival(served, length)
        ended = float(survival[-1]) if self.ends and len(survival) == self.useful else 0.0
        return float(survival.sum()) + 1 - ended


@dataclass
class Expected:
    """Of one text. NaN where nothing was proposed."""

    text: Text
    overlap: np.ndarray  # [T] sum min(p, q): acceptance of a drawn token
    argmax: np.ndarray  # [T] p(argmax q): acceptance of the draft's most probable one
    trials: dict[str, list[Trial]] = field(default_factory=dict)  # by drafter


class Replay:
    """Walks along texts with one or more drafters; the first is asked at every prefix, the others at chosen steps."""

    def __init__(
        self,
        target: LanguageModel,
        drafters: Mapping[str, Drafter],
        setting: Setting,
        *,
        longest: int,
        max_tokens: int,
        end_tokens: Collection[int],
        batch: int = 16,
    ):
        self._target, self._drafters, self._setting = target, drafters, setting
        self._longest, self._max_tokens, self._end_tokens = longest, max_tokens, end_tokens
        self._batch = batch

    def run(
        self, texts: Sequence[Text], chosen: Sequence[Collection[int]], advance: Callable[[], None] = lambda: None
    ) -> list[Expected]:
        """Every text, in order. ``chosen``: of each, the output lengths at which drafts are tried in full.

        Raises ValueError where not even one text fits the models' caches.
        """
        done: list[Expected] = []
        while len(done) < len(texts):
            part = slice(len(done), len(done) + self._batch)
            few = [
                _Walker(text, steps, i, self._setting, self._longest, self._max_tokens)
                for i, (text, steps) in enumerate(zip(texts[part], chosen[part], strict=True))
            ]
            opened = self._open(few)
            self._prefill(opened)
            while going := [w for w in opened if w.going]:
                self._step(going)
            for walker in opened:
                self._close(walker)
                done.append(walker.expected(tuple(self._drafters)))
                advance()
        return done

    def _open(self, walkers: list[_Walker]) -> list[_Walker]:
        """As many of the first as there is room for."""
        opened: list[_Walker] = []
        for walker in walkers:
            slot = self._target.open(walker.context.capacity)
            if slot is None:
                break
            walker.slot = slot
            if not self._admit(walker):
                self._target.close(slot)
                break
            opened.append(walker)
        if not opened:
            raise ValueError("the caches of target and draft have no room for one text: lower --max-tokens")
        return opened

    def _admit(self, walker: _Walker) -> bool:
        """Whether every drafter has room; all or none keep it."""
        admitted: list[Drafter] = []
        for drafter in self._drafters.values():
            if not drafter.open(walker.context):
                for other in admitted:
                    other.close(walker.context)
                return False
            admitted.append(drafter)
        return True

    def _close(self, walker: _Walker) -> None:
        self._target.close(walker.slot)
        for drafter in self._drafters.values():
            drafter.close(walker.context)

    def _prefill(self, walkers: list[_Walker]) -> None:
        """All of each prompt but its last token, whose logits are wanted."""
        for walker in walkers:
            ids = walker.context.prompt_ids[:-1]
            for start in range(0, len(ids), _PREFILL):
                part = ids[start : start + _PREFILL]
                self._forward([walker.slot], [start], [list(part)], [[]])

    def _step(self, walkers: list[_Walker]) -> None:
        """One token further: every drafter's proposals first, then the text's own token."""
        for i, (name, drafter) in enumerate(self._drafters.items()):
            lengths = [w.wanted(self._longest, always=i == 0) for w in walkers]
            asked = [w for w, length in zip(walkers, lengths, strict=True) if length]
            if not asked:
                continue
            drafts = drafter.propose([w.context for w in asked], [length for length in lengths if length])
            self._observe(asked, name, drafts, rates=i == 0)
            for walker in asked:
                drafter.commit(walker.context, 0)
        for walker in walkers:
            walker.advance()

    def _observe(self, walkers: list[_Walker], name: str, drafts: Drafts, rates: bool) -> None:
        ids = drafts.ids.tolist()
        parts = [
            ids[at : at + size] for at, size in zip(drafts.token_starts.tolist(), drafts.host_lengths, strict=True)
        ]
        lasts = [len(w.context) - 1 for w in walkers]
        fed = [[*w.context.tokens(last, last + 1), *part] for w, last, part in zip(walkers, lasts, parts, strict=True)]
        logits = self._forward([w.slot for w in walkers], lasts, fed, [range(len(part)) for part in fed])
        setting = self._setting
        p = processed_probs(
            logits, temperature=setting.temperature, top_p=setting.top_p, name=self._target.name
        )  # [N, V]
        drafts = Drafts(drafts.ids.to(p.device), drafts.lengths, drafts.probs, drafts.rows)
        if rates:
            for walker, pair in zip(walkers, first_rates(p, drafts), strict=True):
                walker.rates.append(pair)
        for walker, part, trial in zip(walkers, parts, trials(p, drafts), strict=True):
            if walker.chosen:
                walker.try_out(name, part, trial, self._end_tokens)

    def _forward(
        self, slots: list[int], starts: list[int], fed: list[list[int]], rows: Sequence[Collection[int]]
    ) -> Tensor:
        """Logits of the wanted rows of each sequence's new tokens, [N, V]."""
        sizes = np.array([len(part) for part in fed])
        firsts = np.cumsum(sizes) - sizes
        wanted = [first + row for first, part in zip(firsts.tolist(), rows, strict=True) for row in part]
        ids = torch.tensor([token for part in fed for token in part], device=self._target.device)
        return self._target.forward(
            Step(ids, np.array(slots), np.array(starts), sizes, np.array(wanted, dtype=np.int64))
        )


class _Walker:
    """A text, as far as the walk has come."""

    def __init__(self, text: Text, chosen: Collection[int], id: int, setting: Setting, longest: int, max_tokens: int):
        self.text, self._chosen, self._max_tokens = text, chosen, max_tokens
        prompt = text.prompt.token_ids
        capacity = len(prompt) + max_tokens + longest + 1
        self.context = Context(id, setting.params(_SEED + text.index), prompt, [], capacity=capacity)
        self.slot = -1
        self.rates: list[tuple[float, float]] = []
        self._trials: dict[str, list[Trial]] = {}

    @property
    def at(self) -> int:
        return len(self.context.output_ids)

    @property
    def going(self) -> bool:
        return self.at < len(self.text.output_ids)

    @property
    def chosen(self) -> bool:
        return self.at in self._chosen

    @property
    def limit(self) -> int:
        """What the engine would let a draft be here: a block of K drafts commits up to K + 1 tokens."""
        return self._max_tokens - self.at - 1

    def wanted(self, longest: int, always: bool) -> int:
        drafts = max(min(longest, self.limit), 1) if self.chosen else 1
        return drafts if self.chosen or always else 0

    def try_out(
        self, name: str, drafted: list[int], trial: tuple[np.ndarray, ...], end_tokens: Collection[int]
    ) -> None:
        useful = useful_length(drafted, end_tokens)
        ends = useful > 0 and drafted[useful - 1] in end_tokens
        self._trials.setdefault(name, []).append(Trial(self.at, self.limit, useful, ends, *trial))

    def advance(self) -> None:
        self.context.output_ids.append(self.text.output_ids[self.at])
        self.context.round += 1

    def expected(self, names: Sequence[str]) -> Expected:
        overlap, argmax = np.array(self.rates, dtype=np.float64).reshape(-1, 2).T
        return Expected(self.text, overlap, argmax, {name: self._trials.get(name, []) for name in names})


def first_rates(p: Tensor, drafts: Drafts) -> list[tuple[float, float]]:
    """[B] pairs (sum min(p, q), p(argmax q)) at the first position of each draft; NaN where nothing was drafted.

    Where the proposal is deterministic q is one-hot, and both are p of the token.
    """
    lengths = drafts.host_lengths
    starts = drafts.token_starts
    rows = drafts.probs_rows.tolist()
    pairs: list[tuple[float, float]] = []
    for b, start in enumerate(starts.tolist()):
        own = p[start + b]
        if not lengths[b]:
            pairs.append((float("nan"), float("nan")))
        elif rows[start] < 0 or drafts.probs is None:
            pairs.append((float(own[drafts.ids[start]]),) * 2)
        else:
            q = drafts.probs[rows[start]].to(p.device)
            pairs.append((float(stats.expected_acceptance(p=own, q=q)), float(stats.greedy_draft_acceptance(own, q))))
    return pairs


def trials(p: Tensor, drafts: Drafts) -> list[tuple[np.ndarray, ...]]:
    """[B] triples of [K_b] arrays: a_i, h_i and w_i (:mod:`spec.verify`), by what the engine itself decides by."""
    noise = np.zeros(len(drafts.ids)), np.zeros(len(p))
    token, block = (verify(p, drafts, *noise, mode=mode).accept_probs.cpu().numpy() for mode in ("token", "block"))
    sizes, starts = drafts.host_lengths, drafts.token_starts
    owners = np.repeat(np.arange(len(sizes)), sizes)
    places = torch.from_numpy(np.arange(len(owners)) + owners).to(p.device)
    chosen_p = p[places, drafts.ids].double()
    chosen_q = torch.ones_like(chosen_p)
    if drafts.probs is not None:
        drawn = (drafts.probs_rows >= 0).nonzero().flatten()
        chosen_q[drawn] = drafts.probs[drafts.probs_rows[drawn], drafts.ids[drawn]].double()
    ratios = (chosen_p / chosen_q).cpu().numpy()
    return [
        (token[mine], block[mine], _weights(ratios[mine]))
        for mine in (slice(start, start + size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True))
    ]


def _weights(ratios: np.ndarray) -> np.ndarray:
    """w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)), w_0 = 1."""
    weights = np.empty(len(ratios))
    weight = 1.0
    for i, ratio in enumerate(ratios):
        weight = weights[i] = min(1.0, weight * ratio)
    return weights
