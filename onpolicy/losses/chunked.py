"""Losses straight from hidden states: the tokens x vocabulary matrix of logits never exists.

A chunk of tokens is projected, its divergence and gradient are computed at once in closed form, and the gradient is
folded into those of hidden states and head before the next chunk overwrites the buffers. So the forward pass does
all the work and the backward pass only scales: a chunk is projected once for each model. Peak extra memory is a
fixed budget of buffers, plus a float32 gradient of the head [V, D] where the head is trained; tokens cost only
their own gradient [N, D] and a few numbers each. Masked tokens are never projected.

Inputs may be float64 (everything in float64), float32, bf16, or fp32 weights under autocast; logits, statistics and
sums are float32. As in an ordinary bf16 backward pass, the gradient by the logits is rounded to bf16 where it enters
the two products; the head's gradient is accumulated in float32.

Vocabularies of different size (padding) are cut to the common first rows: rows beyond get no probability, no gradient.

Shape legend: N tokens, n tokens of a chunk, V vocabulary, D and D_T hidden sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from onpolicy.losses import _workspace
from onpolicy.losses._checks import check_mask, check_token_ids, normaliser, required_ids, resolve_options
from onpolicy.losses._chunk_autograd import ChunkedDivergence, ChunkedLogProbs, Job, slices
from onpolicy.losses._chunk_kernels import Divergence
from onpolicy.losses._projection import Projection
from onpolicy.losses.divergences import log_probs
from onpolicy.losses.truncated import Support

BUFFER_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # logits of both models and a 16-bit copy of the gradient
_MIN_CHUNK, _MAX_CHUNK = 16, 1024


def chunked(
    name: str,
    student_hidden: Tensor,  # [N, D]
    student_head: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [N, D_T]
    teacher_head: Tensor,  # [V_T, D_T]
    mask: Tensor | None = None,  # [N] bool, True where a token counts
    *,
    token_ids: Tensor | None = None,  # [N] int64
    weights: Tensor | None = None,  # [N] factor of each token's loss
    temperature: float = 1.0,
    denominator: float | None = None,
    chunk_size: int | None = None,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V_T]
    top_k: int | None = None,
    support: Support = "teacher",
    head_grad: Tensor | None = None,  # [V, D]
    **options: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`onpolicy.losses.divergence` from hidden states, in bounded memory.

    The loss is sum(weights * divergence) over unmasked tokens / ``denominator`` (their number unless given).
    Gradients flow to ``student_hidden``, ``student_head`` (a leaf, a tied embedding, or a computed tensor such as
    W + s B A) and ``student_bias``; never to the teacher, nor twice (no second derivatives).
    Given ``head_grad``, the head's gradient is added there during the call (a matrix of that size is expensive to make
    anew for every batch) and autograd returns none for it: only for a loss that is backpropagated as it is.
    Metrics, detached, float32, [N] and 0 where masked: ``per_token``, ``student_entropy`` and, given ``token_ids``,
    ``student_logprobs`` and ``teacher_logprobs`` of these tokens at ``temperature``; ``tokens`` counts the unmasked.
    Raises ValueError for what :func:`onpolicy.losses.per_token` refuses and for shapes that do not belong together.
    """
    resolved = resolve_options(name, options, temperature)
    what = Divergence(name, resolved, temperature, top_k, support)
    vocab = _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head)
    rows = _kept_rows(mask, student_hidden)
    count = len(student_hidden) if rows is None else len(rows)
    if name == "kd":
        required_ids(token_ids)
    if token_ids is not None:
        check_token_ids(token_ids if rows is None else token_ids[rows], vocab)
    job = Job(
        what=what,
        student=Projection(student_hidden.detach(), student_head.detach(), _detached(student_bias), vocab),
        teacher=Projection(teacher_hidden.detach(), teacher_head.detach(), _detached(teacher_bias), vocab),
        teacher_hidden=teacher_hidden.detach(),
        rows=rows,
        token_ids=token_ids,
        weights=None if weights is None else weights.detach(),
        inverse=1.0 / normaliser(denominator, count),
        chunk_size=_chunk_size(chunk_size, vocab, student_hidden),
        wants_grad=torch.is_grad_enabled(),
        head_grad=_checked_sink(head_grad, student_head),
    )
    loss, per_token, entropy, student_logprobs, teacher_logprobs = ChunkedDivergence.apply(
        student_hidden, student_head, student_bias, job
    )
    metrics = {"per_token": per_token, "student_entropy": entropy, "tokens": loss.new_tensor(float(count)).detach()}
    if token_ids is not None:
        metrics |= {"student_logprobs": student_logprobs, "teacher_logprobs": teacher_logprobs}
    return loss, metrics


def chunked_logprobs(
    hidden: Tensor,  # [N, D]
    head: Tensor,  # [V, D]
    token_ids: Tensor,  # [N] int64
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    bias: Tensor | None = None,  # [V]
    head_grad: Tensor | None = None,  # [V, D]
) -> Tensor:
    """log pi(token) [N] at ``temperature``, float32 (float64), differentiable by hidden, head and bias.

    The weights of a policy gradient are known only after these values, so the backward pass projects again instead
    of keeping logits. Given ``head_grad``, it adds the head's gradient there instead of returning it.
    Raises ValueError for an id outside the vocabulary.
    """
    if token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"token_ids must be [{len(hidden)}], one a row of hidden, got {tuple(token_ids.shape)}")
    check_token_ids(token_ids, len(head))
    size = _chunk_size(chunk_size, len(head), hidden)
    projection = Projection(hidden.detach(), head.detach(), _detached(bias), len(head))
    sink = _checked_sink(head_grad, head)
    return ChunkedLogProbs.apply(hidden, head, bias, token_ids, projection, temperature, size, sink)


def iter_logprobs(
    student_hidden: Tensor,  # [N, D]
    student_head: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [N, D_T]
    teacher_head: Tensor,  # [V_T, D_T]
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk after chunk, in order: student's and teacher's log-probabilities [n, min(V, V_T)], float32, no graph."""
    for p, q in iter_logits(
        student_hidden, student_head, teacher_hidden, teacher_head, chunk_size=chunk_size, student_bias=student_bias,
        teacher_bias=teacher_bias,
    ):  # fmt: skip
        with torch.no_grad():
            p, q = log_probs(p, temperature), log_probs(q, temperature)
        yield p, q


def iter_logits(
    student_hidden: Tensor,  # [N, D]
    student_head: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [N, D_T]
    teacher_head: Tensor,  # [V_T, D_T]
    *,
    chunk_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk after chunk: both models' logits [n, min(V, V_T)], float32, no graph, which the next chunk overwrites."""
    vocab = _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head)
    student_hidden, teacher_hidden = student_hidden.detach(), teacher_hidden.detach()
    student = Projection(student_hidden, student_head.detach(), _detached(student_bias), vocab)
    teacher = Projection(teacher_hidden, teacher_head.detach(), _detached(teacher_bias), vocab)
    size = _chunk_size(chunk_size, vocab, student_hidden)
    for part in slices(len(student_hidden), size):
        with torch.no_grad():
            n = part.stop - part.start
            p, q = (
                side.logits(hidden[part], _workspace.take(name, (n, vocab), side.accumulate, hidden.device))
                for name, side, hidden in (("student", student, student_hidden), ("teacher", teacher, teacher_hidden))
            )
        yield p, q


def chunked_reduce(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    fn: Callable[[Tensor, Tensor], dict[str, Tensor]],
    **options: Any,
) -> dict[str, Tensor]:
    """``fn(student_logprobs [n, V], teacher_logprobs [n, V]) -> {name: [n]}`` on every chunk, joined to {name: [N]}.

    ``options`` are those of :func:`iter_logprobs`. Without any token the result is empty.
    """
    parts = [fn(p, q) for p, q in iter_logprobs(student_hidden, student_head, teacher_hidden, teacher_head, **options)]
    return {key: torch.cat([part[key] for part in parts]) for key in (parts[0] if parts else ())}


def _chunk_size(requested: int | None, vocab: int, hidden: Tensor) -> int:
    if requested is not None:
        if requested < 1:
            raise ValueError(f"chunk_size must be at least 1, got {requested}; leave it out to size it by memory")
        return min(requested, max(len(hidden), 1))
    per_token = vocab * (16 if hidden.dtype == torch.float64 else 10)
    size = BUFFER_BYTES.get(hidden.device.type, BUFFER_BYTES["cpu"]) // per_token
    return min(max(size, _MIN_CHUNK), _MAX_CHUNK, max(len(hidden), 1))


def _checked_sink(head_grad: Tensor | None, head: Tensor) -> Tensor | None:
    if head_grad is not None and (head_grad.shape != head.shape or head_grad.dtype != head.dtype):
        raise ValueError(
            f"head_grad is {head_grad.dtype} {tuple(head_grad.shape)}, the head {head.dtype} {tuple(head.shape)}: "
            "both must be alike"
        )
    return head_grad


def _kept_rows(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    if mask is None:
        return None
    check_mask(mask, hidden.shape[:1])
    return None if bool(mask.all()) else mask.nonzero().squeeze(-1)


def _check_shapes(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> int:
    """The size of the common vocabulary; ValueError where shapes do not belong together."""
    if student_hidden.dim() != 2 or teacher_hidden.dim() != 2 or len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            "hidden states must be [N, D] and [N, D_T] with one row a token, got "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}; flatten batch and positions first"
        )
    for who, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"the {who}'s head must be [V, {hidden.shape[1]}] for its hidden states, got {tuple(head.shape)}"
            )
    return min(len(student_head), len(teacher_head))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
