"""Does vLLM's V1 rejection sampler commit what the definition says? Answered in a fraction of a second on a CPU.

Two questions, since each sees what the other cannot:

- *decisions*: for requests with generators of their own, the noise is drawn a second time from equal generators and
  every committed token compared with :mod:`~spec.vllm_plugin.reference`. Sees a wrong decision in one request.
- *law*: requests without a seed, as most are, share contexts; the joint law of their first two committed tokens
  is compared with the target's by chi-square. Sees noise that is wrong in itself.

Both go through the functions the model runner's sampler calls, so that whatever kernel is behind them is tested.

Shape legend: B requests, N drafted tokens of all requests, V vocabulary, K draft length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from spec.vllm_plugin.reference import committed, one_hot, processed

_SEED = 20221211
_VOCABULARY = 37  # no multiple of any vector width
_PADDING = -1
_OFF = (_VOCABULARY, 1.0)  # top-k and top-p that drop nothing
# (temperature, top-k, top-p), taken in turns by the requests of a batch
_GREEDY = ((0.0, *_OFF),)
_PLAIN = ((0.6, *_OFF), (1.0, *_OFF), (1.4, *_OFF))
_TOP_K = ((0.7, 3, 1.0), (1.0, *_OFF))
_TRUNCATED = ((0.7, 3, 1.0), (1.0, _VOCABULARY, 0.8), (1.3, 5, 0.9), (0.9, *_OFF))
_MIXED = (*_GREEDY, *_TRUNCATED)


@dataclass(frozen=True)
class Batch:
    """Requests as the model runner hands them to the sampler."""

    settings: list[tuple[float, int, float]]  # [B] temperature, top-k, top-p
    counts: list[int]  # [B] drafted tokens of each, 0..K
    logits: Tensor  # [N, V] float32, of the target
    draft_ids: Tensor  # [N] int32; -1: padding
    draft_probs: Tensor | None  # [N, V] float32; None: the drafts are deterministic
    bonus_ids: Tensor  # [B, 1] int32


def faults(sampler: ModuleType, device: torch.device) -> list[str]:
    """What is wrong with ``vllm.v1.sample.rejection_sampler`` on ``device``, one line each; empty if nothing is.

    Settings, decisions and laws are tested in turn, up to the first of them in which there is a fault.

    Deterministic for given versions, and leaves the global generators as it found them. Raises whatever vLLM raises
    where its functions cannot be called as in the versions known here.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        # One after the other: with settings from uninitialised memory vLLM's own look-ups go out of bounds.
        found = list(_expansion(sampler, device)) or list(_decisions(sampler, device))
        return found or [*_no_drafts(sampler, device), *_laws(sampler, device)]


def _expansion(sampler: ModuleType, device: torch.device) -> Iterator[str]:
    """Per-request settings reach the drafted tokens. Two rounds: memory left by the first cannot satisfy the second."""
    counts = torch.tensor([2, 0, 3, 1], device=device)
    sums = counts.cumsum(0).to(torch.int32)
    for dtype, rounds in (
        (torch.float32, ([0.7, 0.4, 0.0, 1.9], [0.3, 0.0, 1.1, 0.0])),
        (torch.int32, ([7, 1, 50, 0], [9, 3, 0, 40])),
    ):
        for values in rounds:
            given = torch.tensor(values, dtype=dtype, device=device)
            found = sampler.expand_batch_to_tokens(given, sums, int(counts.sum()), replace_from=0, replace_to=1)
            want = [
                value or 1 for value, count in zip(given.tolist(), counts.tolist(), strict=True) for _ in range(count)
            ]
            if found.tolist() != want:
                got = ", ".join(f"{value:.3g}" for value in found.tolist())
                yield f"per-request {dtype} settings {values} reach the drafted tokens as [{got}]"


def _decisions(sampler: ModuleType, device: torch.device) -> Iterator[str]:
    for name, settings, deterministic, size in (
        ("greedy requests", _GREEDY, True, 32),
        ("deterministic drafts at T>0", _PLAIN, True, 64),
        ("sampled drafts at T>0", _PLAIN, False, 64),
        ("deterministic drafts, top-k alone", _TOP_K, True, 32),
        ("deterministic drafts, greedy and truncated requests mixed", _MIXED, True, 96),
        ("sampled drafts, greedy and truncated requests mixed", _MIXED, False, 96),
    ):
        batch = random_batch(settings, deterministic, size)
        found, want = run(sampler, batch, device, seeded=True), expected(batch, device)
        wrong = [index for index, (got, due) in enumerate(zip(found, want, strict=True)) if got != due]
        if wrong:
            first = wrong[0]
            yield f"{name}: {len(wrong)} of {size} commit other tokens, the first {found[first]} for {want[first]}"


def _no_drafts(sampler: ModuleType, device: torch.device) -> Iterator[str]:
    """A step in which no request has drafted tokens commits the bonus tokens, for settings with top-k alone too."""
    for settings in _TOP_K:
        batch = Batch(
            [settings] * 2,
            [0, 0],
            torch.empty(0, _VOCABULARY),
            torch.empty(0, dtype=torch.int32),
            None,
            torch.tensor([[5], [3]]),
        )
        try:
            found = run(sampler, batch, device, seeded=False)
        except (RuntimeError, IndexError) as error:
            yield f"a step without drafted tokens raises {error!r}"
        else:
            if found != [[5], [3]]:
                yield f"a step without drafted tokens commits {found} for [[5], [3]]"


def random_batch(settings: tuple[tuple[float, int, float], ...], deterministic: bool, size: int) -> Batch:
    """``size`` requests with 0 to 3 drafts, some of them padding, some outside the target's top-k and top-p."""
    draw = torch.Generator().manual_seed(_SEED)
    counts = [(3, 1, 0, 2)[index % 4] for index in range(size)]
    target, draft = (2 * torch.randn(sum(counts), _VOCABULARY, generator=draw, dtype=torch.float32) for _ in range(2))
    draft_probs = (draft + target).softmax(-1)  # correlated, so that about as many are accepted as are not
    drafted = draft_probs.argmax(-1) if deterministic else draft_probs.multinomial(1, generator=draw).squeeze(1)
    drafted[6::7] = _PADDING
    return Batch(
        settings=[settings[index % len(settings)] for index in range(size)],
        counts=counts,
        logits=target,
        draft_ids=drafted.to(torch.int32),
        draft_probs=None if deterministic else draft_probs,
        bonus_ids=torch.randint(_VOCABULARY, (size, 1), generator=draw, dtype=torch.int32),
    )


def run(sampler: ModuleType, batch: Batch, device: torch.device, *, seeded: bool) -> list[list[int]]:
    """What vLLM commits for each request, [B] of K+1 tokens, -1 after the last."""
    temperature, top_k, top_p = (list(column) for column in zip(*batch.settings, strict=True))
    metadata = SimpleNamespace(
        temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
        # As in vLLM, None where no request of the batch asks for it
        top_k=torch.tensor(top_k, dtype=torch.int32, device=device) if min(top_k) < _VOCABULARY else None,
        top_p=torch.tensor(top_p, dtype=torch.float32, device=device) if min(top_p) < 1 else None,
        all_greedy=max(temperature) == 0,
        all_random=min(temperature) > 0,
        generators={i: _generator(i, device) for i in range(len(batch.counts))} if seeded else {},
    )
    sums = torch.tensor(batch.counts).cumsum(0).to(device, torch.int32)
    logits = sampler.apply_sampling_constraints(batch.logits.to(device, copy=True), sums, metadata)
    draft_probs = None if batch.draft_probs is None else batch.draft_probs.to(device)
    output: Tensor = sampler.rejection_sample(
        batch.draft_ids.to(device), batch.counts, max(batch.counts), sums, draft_probs, logits,
        batch.bonus_ids.to(device), metadata,
    )  # fmt: skip
    rows: list[list[int]] = output.tolist()
    return rows


def expected(batch: Batch, device: torch.device) -> list[list[int]]:
    """What the definition commits for the noise that vLLM draws: first the uniforms, then the exponentials."""
    rows, start, longest = [], 0, max(batch.counts)
    for index, (count, settings) in enumerate(zip(batch.counts, batch.settings, strict=True)):
        here = range(start, start := start + count)
        drafts = batch.draft_ids[here.start : here.stop].tolist()
        p = [processed(batch.logits[row], *settings) for row in here]
        if batch.draft_probs is None or settings[0] == 0:  # a greedy request takes drafts as they are
            q = [one_hot(token, _VOCABULARY) for token in drafts]
        else:
            q = [batch.draft_probs[row].double() for row in here]
        generator = _generator(index, device)
        uniforms = torch.empty(count, dtype=torch.float64, device=device).uniform_(generator=generator).cpu()
        noise = torch.empty(_VOCABULARY, dtype=torch.float32, device=device).exponential_(generator=generator).cpu()
        tokens = committed(p, q, drafts, int(batch.bonus_ids[index]), uniforms, noise.double())
        rows.append(tokens + [_PADDING] * (longest + 1 - len(tokens)))
    return rows


def _generator(request: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_SEED + request)


def _laws(sampler: ModuleType, device: torch.device, size: int = 16_384) -> Iterator[str]:
    """Compares the joint law of the first two tokens of ``size`` requests with two drafts in one and the same context.

    The first is a and accepted with probability min(p_1, q_1)(a), and then the second is b with p_2(b); the first is
    a and recovered with max(p_1 - q_1, 0)(a), and there is no second. (Tokens after the end are written -1.)
    """
    p_logits = torch.tensor([[1.2, 0.3, -0.4, 0.1, -2.0], [-0.5, 0.9, 0.2, -1.0, 0.6]])
    q_probs = torch.tensor([[0.15, 0.35, 0.3, 0.1, 0.1], [0.3, 0.1, 0.1, 0.3, 0.2]])
    settings = (0.7, 4, 0.9)
    draw = torch.Generator().manual_seed(_SEED)
    for name, deterministic in (("deterministic", True), ("sampled", False)):
        q = torch.stack([one_hot(1, 5), one_hot(4, 5)]) if deterministic else q_probs.double()
        drafted = torch.stack([row.multinomial(size, replacement=True, generator=draw) for row in q], dim=1)
        batch = Batch(
            settings=[settings] * size,
            counts=[2] * size,
            logits=p_logits.repeat(size, 1),
            draft_ids=drafted.flatten().to(torch.int32),
            draft_probs=None if deterministic else q_probs.repeat(size, 1),
            bonus_ids=torch.zeros(size, 1, dtype=torch.int32),
        )
        p = [processed(row, *settings) for row in p_logits]
        law = torch.cat([torch.minimum(p[0], q[0])[:, None] * p[1], (p[0] - q[0]).clamp(min=0)[:, None]], dim=1)
        found = torch.tensor(run(sampler, batch, device, seeded=False))[:, :2]
        if _differs(found, law):
            yield f"unseeded requests, {name} drafts: {size} pairs of tokens do not follow the target's law"


def _differs(pairs: Tensor, law: Tensor) -> bool:
    """Chi-square of ``pairs`` [n, 2] against ``law`` [V, V + 1], its last column for 'no second token' (-1)."""
    height, width = law.shape
    first, second = pairs.unbind(1)
    if bool((first < 0).any()):
        return True
    counts = torch.bincount(first * width + second % width, minlength=height * width).double()
    want = law.flatten() * len(pairs)
    possible = want > 0
    if bool((counts[~possible] > 0).any()):
        return True
    freedom = int(possible.sum()) - 1
    statistic = float(((counts - want)[possible].square() / want[possible]).sum())
    # Wilson and Hilferty's normal approximation; five standard deviations, once for each version of vLLM
    score = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return score > 5
