"""One call for every backend. Shape legend in :mod:`spec.verify.block`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec.verify import reference, torch_kernels
from spec.verify.block import Backend, Drafts, Mode, Verdicts

_MODES = ("token", "block")


def verify(
    target: Tensor,
    drafts: Drafts,
    accept_uniforms: np.ndarray | Tensor,
    last_uniforms: np.ndarray | Tensor,
    *,
    mode: Mode = "block",
    backend: Backend = "auto",
) -> Verdicts:
    """Decides a batch.

    Args:
        target: [N, V] processed target probabilities, float32 or float64, rows in the order of the drafts.
        drafts: the proposals.
        accept_uniforms: [M]; last_uniforms: [N], float64 in [0, 1), from :func:`spec.random.block_uniforms`.
        mode: ``token`` or ``block``. backend: ``numba`` on a CPU, ``torch`` elsewhere, unless named.

    Raises ValueError where shapes, token ids or names do not fit.
    """
    _check(target, drafts, mode)
    if len(accept_uniforms) != len(drafts.ids) or len(last_uniforms) != len(target):
        raise ValueError(
            f"{len(accept_uniforms)} accept and {len(last_uniforms)} last uniforms for {len(drafts.ids)} drafted "
            f"tokens and {len(target)} target rows: draw them with spec.random.block_uniforms"
        )
    chosen = _backend(backend, target)
    if chosen == "numba":
        from spec.verify import numba_kernels

        accept = np.empty(len(drafts.ids))
        accepted, tokens = (np.empty(len(drafts.lengths), dtype=np.int64) for _ in range(2))
        noise = (np.ascontiguousarray(u, dtype=np.float64) for u in (accept_uniforms, last_uniforms))
        numba_kernels.decide(*_arrays(target, drafts), mode == "block", *noise, accept, accepted, tokens)
        return Verdicts(torch.from_numpy(accepted), torch.from_numpy(tokens), torch.from_numpy(accept))
    accept_u, last_u = (torch.as_tensor(u).double().to(target.device) for u in (accept_uniforms, last_uniforms))
    if chosen == "torch":
        return Verdicts(*torch_kernels.decide(target, drafts, mode, accept_u, last_u))
    return _verify_one_by_one(target, drafts, accept_u, last_u, mode)


def laws(target: Tensor, drafts: Drafts, *, mode: Mode = "block", backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """What :func:`verify` decides by, float64: acceptance probabilities [M], and [N, V] the law of the last token.

    Row i of a request is the law of its last token given that exactly i drafted tokens were accepted: the residual
    for i < K_b, the bonus for i = K_b. With :func:`length_law` this is the whole law of the step.
    """
    _check(target, drafts, mode)
    chosen = _backend(backend, target)
    if chosen == "torch":
        return torch_kernels.laws(target, drafts, mode)
    if chosen == "numba":
        from spec.verify import numba_kernels

        accept, last = np.empty(len(drafts.ids)), np.empty(tuple(target.shape))
        numba_kernels.expose(*_arrays(target, drafts), mode == "block", accept, last)
        return torch.from_numpy(accept), torch.from_numpy(last)
    parts = [reference.request_laws(*_request(target, drafts, b), mode) for b in range(len(drafts.lengths))]
    return torch.cat([accept for accept, _ in parts]), torch.cat([last for _, last in parts])


def verify_greedy(target_ids: Tensor, draft_ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Temperature 0 from argmax ids alone: accepted [B] and tokens [B].

    Args: target_ids [N] argmax of every target row, draft_ids [M], lengths [B]. What :func:`verify` decides, in either
    mode, when target rows are one-hot. No vocabulary-sized tensor is read.
    """
    drafts = Drafts(draft_ids, lengths)
    sizes, starts = drafts.host_lengths, drafts.token_starts
    rows = np.arange(len(draft_ids)) + np.repeat(np.arange(len(sizes)), sizes)
    same = target_ids[torch.from_numpy(rows).to(target_ids.device)] == draft_ids
    padded = torch.zeros(len(sizes), int(sizes.max(initial=0)), dtype=torch.long, device=target_ids.device)
    columns = np.arange(len(draft_ids)) - np.repeat(starts, sizes)
    who = np.repeat(np.arange(len(sizes)), sizes)
    padded[torch.from_numpy(who).to(padded.device), torch.from_numpy(columns).to(padded.device)] = same.long()
    accepted = padded.cumprod(1).sum(1)
    last = torch.from_numpy(starts + np.arange(len(sizes))).to(target_ids.device) + accepted
    return accepted, target_ids[last]


def sample(probs: Tensor, uniforms: np.ndarray | Tensor, *, backend: Backend = "auto") -> Tensor:
    """[N] tokens drawn from [N, V] probabilities by inverse CDF, one uniform a row: draft and plain decoding."""
    chosen = _backend(backend, probs)
    if chosen == "numba":
        from spec.verify import numba_kernels

        tokens = np.empty(len(probs), dtype=np.int64)
        noise = np.ascontiguousarray(uniforms, dtype=np.float64)
        numba_kernels.sample_rows(probs.detach().contiguous().numpy(), noise, tokens)
        return torch.from_numpy(tokens)
    noise_t = torch.as_tensor(uniforms).double().to(probs.device)
    if chosen == "torch":
        return torch_kernels.inverse_cdf(probs, noise_t)
    drawn = [reference.inverse_cdf(row, float(u)) for row, u in zip(probs, noise_t, strict=True)]
    return torch.tensor(drawn, dtype=torch.long)


def _verify_one_by_one(target: Tensor, drafts: Drafts, accept_u: Tensor, last_u: Tensor, mode: Mode) -> Verdicts:
    accepted, tokens, accept_probs = [], [], []
    for b, (start, size) in enumerate(zip(drafts.token_starts.tolist(), drafts.host_lengths.tolist(), strict=True)):
        accept, last = reference.request_laws(*_request(target, drafts, b), mode)
        tau = reference.count_accepted(accept, accept_u[start : start + size], mode)
        accepted.append(tau)
        tokens.append(reference.inverse_cdf(last[tau], float(last_u[start + b + tau])))
        accept_probs.append(accept)
    empty = torch.zeros(0, dtype=torch.float64)
    return Verdicts(torch.tensor(accepted), torch.tensor(tokens), torch.cat([empty, *accept_probs]))


def _request(target: Tensor, drafts: Drafts, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target rows [K+1, V], dense draft rows [K, V] and ids [K] of request ``b``, float64."""
    start, size = int(drafts.token_starts[b]), int(drafts.host_lengths[b])
    mine = slice(start, start + size)
    ids = drafts.ids[mine]
    draft = reference.dense_draft(ids, drafts.probs, drafts.probs_rows[mine], target.shape[1])
    return target[start + b : start + b + size + 1].double(), draft, ids


def _arrays(target: Tensor, drafts: Drafts) -> tuple[np.ndarray, ...]:
    probs = target[:0] if drafts.probs is None else drafts.probs
    tensors = (target, probs, drafts.ids, drafts.probs_rows)
    return *(tensor.detach().contiguous().numpy() for tensor in tensors), drafts.host_lengths


def _check(target: Tensor, drafts: Drafts, mode: Mode) -> None:
    if mode not in _MODES:
        raise ValueError(f"unknown verification mode {mode!r}: choose one of {', '.join(_MODES)}")
    if target.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"target probabilities are {target.dtype}: use spec.sampling.processed_probs, which widens them"
        )
    drafts.check(target)


def _backend(backend: Backend, tensor: Tensor) -> Backend:
    if backend == "auto":
        return "numba" if tensor.device.type == "cpu" else "torch"
    if backend not in ("reference", "numba", "torch"):
        raise ValueError(f"unknown backend {backend!r}: choose auto, reference, numba or torch")
    return backend
