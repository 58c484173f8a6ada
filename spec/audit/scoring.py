"""Every token of an engine's text, scored by the plain target under the same processed distribution.

p(. | h) is the target's law at the prefix the engine itself wrote, with the request's own parameters and, for
penalties, the tokens so far. Under H0 (tokens are drawn from p) and for any prompts:

- randomised PIT u = mass of what comes before x in an order fixed by p alone + v * mass of x, v ~ U(0,1), is uniform
  and independent of everything earlier; one order is by p (likeliest first), one by token id, one by q / p where a
  draft is known;
- -log p(x) - H(p) is a martingale difference;
- 1{x in A} - p(A) is one for every set A that is a function of the prefix;
- m(x) / p(x) has mean 1 at most for every law m (:mod:`spec.audit.laws`).

Shape legend: N tokens of all samples, n rows of one piece, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from spec.audit.conditionals import Conditionals, regrouped
from spec.audit.laws import RECENT, Laws, Rows, at_tokens, draft_law, named_ratios, target_law
from spec.audit.sample import UNKNOWN, Sample
from spec.audit.sums import UNLIKELY, mass_ahead, mass_before
from spec.params import Params

_MOST_ROWS = 8192
_REMEMBERED = 2**18  # tokens of requests and answers: some 10 MB


@dataclass(frozen=True)
class Scored:
    """Arrays [N], tokens in the order of samples. Rows of greedy requests are left out: they have no noise to test."""

    sample: np.ndarray  # int64, index of the sample in the call
    position: np.ndarray  # int64 in the completion
    offset: np.ndarray  # int64 in the block, -1 unknown
    log_p: np.ndarray  # nats; -inf for an impossible token
    entropy: np.ndarray  # nats
    spread: np.ndarray  # variance of -log p(x) under p
    pit: np.ndarray  # in [0, 1), NaN for an impossible token
    draft_pit: np.ndarray  # the same in the order of q / p; NaN where there is no draft
    ratios: dict[str, tuple[np.ndarray, np.ndarray]]  # law -> log ratio, its mass outside p's support
    directions: dict[str, tuple[np.ndarray, np.ndarray]]  # set A -> 1{x in A}, p(A)
    # law (``raw``: of the logits as they are, or ``processed``) -> |reported - due| nats; NaN: not reported
    gaps: dict[str, np.ndarray] = field(default_factory=dict)
    id_pit: np.ndarray | None = None  # the PIT in the order of token ids, in which samplers invert the CDF

    @property
    def impossible(self) -> np.ndarray:
        """[N] bool: tokens the target cannot say."""
        return np.isneginf(self.log_p)


@dataclass
class Scorer:
    """Scores samples; remembers answers, so that a request asked again is compared with its earlier answer."""

    target: Conditionals
    draft: Conditionals | None = None
    seed: int = 0  # of the noise v
    elements: int = 8_000_000  # of one [n, V] piece: 32 MB in float32, of which some ten are alive at a time
    _answers: dict[tuple[tuple[int, ...], Params], tuple[int, ...]] = field(default_factory=dict)
    _remembered: int = 0  # tokens in _answers
    _noise: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._noise = np.random.default_rng([self.seed, 0x5C0])

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Raises ValueError for a token outside the target's vocabulary (another tokenizer), or no room in the model.

        Greedy samples and those without tokens are skipped.
        """
        kept = [(i, s) for i, s in enumerate(samples) if s.token_ids and not s.params.greedy]
        for _, sample in kept:
            if max(sample.token_ids) >= self.target.vocab_size or min(sample.token_ids) < 0:
                raise ValueError(
                    f"the engine said token {max(sample.token_ids)}, the target has {self.target.vocab_size}: audit it "
                    "against the target it runs, with that target's tokenizer"
                )
        twins = [self._twin(sample) for _, sample in kept]
        most = max(1, min(self.elements // self.target.vocab_size, _MOST_ROWS))
        columns, last = _Columns(sum(len(s.token_ids) for _, s in kept)), None
        for rows, draft_logits in self._pieces([s for _, s in kept], twins, most):
            p = target_law(rows)
            q = None if draft_logits is None else draft_law(rows, draft_logits)
            noise = torch.from_numpy(self._noise.random(len(p))).to(p)
            raw = (
                _raw_log_p(rows) if any(s.logprobs is not None for _, s in kept) else torch.full_like(noise, torch.nan)
            )
            columns.add(_score_rows(rows, Laws(p, q, last), noise, raw))
            last = p[-1].clone()
        return _scored(kept, columns)

    def _twin(self, sample: Sample) -> list[int]:
        """What an earlier answer to the same request said at each position, -1 from where the two part."""
        key = (sample.prompt_ids, replace(sample.params, seed=0, logit_bias=_Frozen(sample.params.logit_bias)))
        earlier = self._answers.get(key)
        if earlier is None:
            self._remember(key, sample.token_ids)
            return [-1] * len(sample.token_ids)
        same = 0
        while same < min(len(earlier), len(sample.token_ids)) and earlier[same] == sample.token_ids[same]:
            same += 1
        known = list(earlier[: same + 1])  # the first difference is still a prediction
        return (known + [-1] * len(sample.token_ids))[: len(sample.token_ids)]

    def _remember(self, key: tuple[tuple[int, ...], Params], answer: tuple[int, ...]) -> None:
        """Forgets the oldest: live traffic has no end."""
        self._answers[key] = answer
        self._remembered += len(key[0]) + len(answer)
        while self._remembered > _REMEMBERED and len(self._answers) > 1:
            oldest = next(iter(self._answers))
            self._remembered -= len(oldest[0]) + len(self._answers.pop(oldest))

    def _pieces(
        self, samples: Sequence[Sample], twins: Sequence[list[int]], most: int
    ) -> Iterator[tuple[Rows, Tensor | None]]:
        owners = [(s, i, twin[i]) for s, twin in zip(samples, twins, strict=True) for i in range(len(s.token_ids))]
        chunks = [owners[start : start + most] for start in range(0, len(owners), most)]
        sizes = [len(chunk) for chunk in chunks]
        drafts: Iterator[Tensor | None] = iter([None] * len(chunks))
        if self.draft is not None:
            drafts = regrouped(self.draft.rows(samples, most), iter(sizes))
        logits = regrouped(self.target.rows(samples, most), iter(sizes))
        for chunk, piece, draft in zip(chunks, logits, drafts, strict=True):
            device = piece.device
            yield (
                Rows(
                    logits=piece,
                    params=[s.params for s, _, _ in chunk],
                    prompts=[s.prompt_ids for s, _, _ in chunk],
                    outputs=[s.token_ids[:i] if s.params.penalised else () for s, i, _ in chunk],
                    tokens=torch.tensor([s.token_ids[i] for s, i, _ in chunk], device=device),
                    previous=torch.tensor([s.token_ids[i - 1] if i else -1 for s, i, _ in chunk], device=device),
                    twins=torch.tensor([twin for _, _, twin in chunk], device=device),
                    recent=torch.tensor([_before(s.token_ids, i) for s, i, _ in chunk], device=device),
                ),
                None if draft is None else draft.to(piece),
            )


def _before(tokens: tuple[int, ...], i: int) -> list[int]:
    """[RECENT]"""
    found = list(tokens[max(i - RECENT, 0) : i][::-1])
    return found + [-1] * (RECENT - len(found))


class _Frozen(dict[int, float]):
    """A logit bias that can be part of a key."""

    def __init__(self, items: object):
        super().__init__(items)  # type: ignore[call-overload]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Piece:
    """The columns of :class:`Scored` that come of the laws, for n rows."""

    log_p: np.ndarray
    raw_log_p: np.ndarray  # of the logits as they are
    entropy: np.ndarray
    spread: np.ndarray
    pit: np.ndarray
    draft_pit: np.ndarray
    id_pit: np.ndarray
    ratios: Pairs
    directions: Pairs


def _raw_log_p(rows: Rows) -> Tensor:
    """[n]"""
    logits = rows.logits if rows.logits.dtype == torch.float64 else rows.logits.float()
    return at_tokens(logits, rows.tokens) - logits.logsumexp(-1)


def _score_rows(rows: Rows, laws: Laws, noise: Tensor, raw: Tensor) -> _Piece:
    p, sums = laws.p, laws.sums
    chosen = at_tokens(p, rows.tokens)
    sets = {  # whether it holds the token, and its mass
        "more surprising than expected": ((chosen < sums.typical) & (chosen > 0), sums.surprising),
        "unlikely tokens (p < 1 %)": (chosen < UNLIKELY, sums.unlikely),
    }
    draft_pit = torch.full_like(noise, torch.nan)
    if laws.q is not None and laws.common is not None:
        sets["tokens the draft likes (q > p)"] = (at_tokens(laws.q, rows.tokens) > chosen, laws.common.liked)
        order = laws.q / p.clamp_min(torch.finfo(p.dtype).tiny)  # where p = 0 it is of no matter: there is no mass
        draft_pit = _pit(chosen, *mass_ahead(p, order, rows.tokens), noise)
    return _Piece(
        log_p=_f64(chosen.log()),
        raw_log_p=_f64(raw),
        entropy=_f64(sums.entropy),
        spread=_f64(sums.squares - sums.entropy.square()),
        pit=_f64(_pit(chosen, *mass_ahead(p, p, rows.tokens), noise)),
        draft_pit=_f64(draft_pit),
        id_pit=_f64(_pit(chosen, mass_before(p, rows.tokens), chosen, noise)),
        ratios={name: (_f64(r.log_ratio), _f64(r.outside)) for name, r in named_ratios(rows, laws)},
        directions={name: (_f64(held), _f64(mass)) for name, (held, mass) in sets.items()},
    )


def _pit(chosen: Tensor, ahead: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """[n] mass of tokens ahead of x in some order + v * mass of those level with it; NaN if p(x) = 0."""
    return torch.where(chosen > 0, (ahead + noise * level).clamp(max=1 - 2.0**-24), torch.nan)


class _Columns:
    """Pieces joined as they come, into arrays that are there from the first on.

    To keep the pieces until the end took gigabytes: each of their small arrays was cut from the memory of a large one
    that had just been freed, which was then too short for the next.
    """

    def __init__(self, count: int):
        self._count, self._at = count, 0
        self.flat: dict[str, np.ndarray] = {name: np.zeros(count) for name in _FLAT}
        self.ratios: Pairs = {}
        self.directions: Pairs = {}

    def add(self, piece: _Piece) -> None:
        """A law that is not in use in a piece is the target's there: 0."""
        here = slice(self._at, self._at + len(piece.log_p))
        self._at = here.stop
        for name, column in self.flat.items():
            column[here] = getattr(piece, name)
        for pairs, new in ((self.ratios, piece.ratios), (self.directions, piece.directions)):
            for name, found in new.items():
                whole = pairs.setdefault(name, (np.zeros(self._count), np.zeros(self._count)))
                for column, values in zip(whole, found, strict=True):
                    column[here] = values


_FLAT = ("log_p", "raw_log_p", "entropy", "spread", "pit", "draft_pit", "id_pit")


def _scored(kept: Sequence[tuple[int, Sample]], columns: _Columns) -> Scored:
    index = [
        (i, at, offset)
        for i, s in kept
        for at, offset in enumerate(s.offsets if s.offsets is not None else [UNKNOWN] * len(s.token_ids))
    ]
    sample, position, offset = np.array(index, dtype=np.int64).reshape(-1, 3).T
    reported = np.array([x for _, s in kept for x in s.logprobs or [math.nan] * len(s.token_ids)])
    flat = dict(columns.flat)
    gaps = {"raw": np.abs(reported - flat.pop("raw_log_p")), "processed": np.abs(reported - flat["log_p"])}
    return Scored(sample, position, offset, ratios=columns.ratios, directions=columns.directions, gaps=gaps, **flat)


def _f64(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
