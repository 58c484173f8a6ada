"""Autograd of the chunked losses: the loops over chunks of tokens, and what they accumulate.

Shape legend: N tokens, N' unmasked tokens, n tokens of a chunk, V vocabulary, D and D_T hidden sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onpolicy.losses import _workspace
from onpolicy.losses._chunk_kernels import Divergence, at_tokens, evaluate_chunk
from onpolicy.losses._projection import Projection


@dataclass
class Job:
    """Everything of one :func:`chunked` call that no gradient flows to."""

    what: Divergence
    student: Projection
    teacher: Projection
    teacher_hidden: Tensor  # [N, D_T]
    rows: Tensor | None  # [N'] indices of unmasked tokens; None for all
    token_ids: Tensor | None
    weights: Tensor | None
    inverse: float  # 1 / denominator
    chunk_size: int
    wants_grad: bool
    head_grad: Tensor | None = None  # [V, D] where the head's gradient is added at once

    @property
    def dtype(self) -> torch.dtype:
        return self.student.accumulate


class ChunkedDivergence(torch.autograd.Function):
    """Loss, and per token [N] value, student's entropy and both models' log-probabilities; gradients made forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        needs = [job.wants_grad and need for need in ctx.needs_input_grad[:3]]
        grads = _Gradients(job.student, hidden, head, bias, needs, job.head_grad)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        outputs = [torch.zeros(len(hidden), dtype=job.dtype, device=hidden.device) for _ in range(4)]
        buffers = _Buffers(job, hidden, rounded=any(needs) and job.student.low_precision)
        count = len(hidden) if job.rows is None else len(job.rows)
        for part in slices(count, job.chunk_size):
            where = part if job.rows is None else job.rows[part]
            chunk = hidden[where]
            student, teacher, rounded = buffers.take(len(chunk))
            job.student.logits(chunk, student)
            job.teacher.logits(job.teacher_hidden[where], teacher)
            factor = _factors(job, where, len(chunk), student)
            ids = None if job.token_ids is None else job.token_ids[where]
            result = evaluate_chunk(job.what, student, teacher, ids, factor if any(needs) else None, rounded)
            total += (result.value * factor).sum(dtype=torch.float64)
            for output, values in zip(outputs, result[:4], strict=True):
                if values is not None:
                    output[where] = values
            grads.add(where, chunk, student, result.rounded)
        ctx.grads = grads
        ctx.mark_non_differentiable(*outputs)
        return total.to(job.dtype), *outputs  # type: ignore[return-value]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass; compute the loss again")
        if grads.sunk and float(grad_loss) != 1:
            raise RuntimeError(
                f"the head's gradient is in head_grad already, and now the loss is scaled by {float(grad_loss)}: put "
                "the factor into weights or denominator, or leave head_grad out"
            )
        return *grads.scaled(grad_loss), None


class ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities [N] of given tokens; the backward pass projects again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        projection: Projection,
        temperature: float,
        chunk_size: int,
        head_grad: Tensor | None,
    ) -> Tensor:
        values = torch.empty(len(hidden), dtype=projection.accumulate, device=hidden.device)
        buffer = _workspace.take("student", (min(chunk_size, len(hidden)), len(head)), values.dtype, hidden.device)
        normalisers = torch.empty_like(values)
        for part in slices(len(hidden), chunk_size):
            logits = projection.logits(hidden[part], buffer[: part.stop - part.start]).div_(temperature)
            normalisers[part] = logits.logsumexp(-1)
            chosen = at_tokens(logits, token_ids[part])
            assert chosen is not None
            values[part] = chosen - normalisers[part]
        ctx.save_for_backward(hidden, head, bias, token_ids, normalisers)
        ctx.projection, ctx.temperature, ctx.chunk_size, ctx.head_grad = projection, temperature, chunk_size, head_grad
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, token_ids, normalisers = ctx.saved_tensors
        projection, temperature = ctx.projection, ctx.temperature
        grads = _Gradients(projection, hidden, head, bias, list(ctx.needs_input_grad[:3]), ctx.head_grad)
        shape = (min(ctx.chunk_size, len(hidden)), len(head))
        buffer = _workspace.take("student", shape, projection.accumulate, hidden.device)
        low = projection.low_precision
        rounded = _workspace.take("rounded", shape, projection.dtype, hidden.device) if low else None
        for part in slices(len(hidden), ctx.chunk_size):
            n = part.stop - part.start
            # d log pi(y) / d z = (onehot(y) - pi) / T
            grad = projection.logits(hidden[part], buffer[:n])
            grad.div_(temperature).sub_(normalisers[part].unsqueeze(-1)).exp_().neg_()
            ids = token_ids[part].unsqueeze(-1)
            grad.scatter_add_(-1, ids, torch.ones_like(ids, dtype=grad.dtype))
            grad.mul_((grad_values[part] / temperature).unsqueeze(-1))
            copy = None if rounded is None else rounded[:n].copy_(grad)
            grads.add(part, hidden[part], grad, copy)
        return *grads.scaled(None), None, None, None, None, None


class _Gradients:
    """Gradients of hidden states, head and bias, filled chunk by chunk; those not needed are None."""

    def __init__(
        self,
        projection: Projection,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        needs: list[bool],
        head_grad: Tensor | None,
    ) -> None:
        accumulate = projection.accumulate
        self.projection = projection
        self.hidden = torch.zeros_like(hidden) if needs[0] else None
        self.sunk = needs[1] and head_grad is not None  # the head's gradient goes elsewhere, not through autograd
        self.head = None
        if needs[1]:
            new = head_grad is None
            self.head = torch.zeros(head.shape, dtype=accumulate, device=head.device) if new else head_grad
        self.bias = (
            torch.zeros(bias.shape, dtype=accumulate, device=bias.device) if needs[2] and bias is not None else None
        )
        self._head_dtype, self._bias_dtype = head.dtype, None if bias is None else bias.dtype

    def add(self, where: slice | Tensor, hidden: Tensor, grad: Tensor, rounded: Tensor | None) -> None:
        """Fold in one chunk: hidden [n, D], gradient by its logits [n, V]."""
        if self.hidden is not None:
            self.hidden[where] = self.projection.grad_hidden(grad, rounded).to(self.hidden.dtype)
        if self.head is not None:
            self.projection.add_grad_head(self.head[: grad.shape[1]], grad, rounded, hidden)
        if self.bias is not None:
            self.bias[: grad.shape[1]] += grad.sum(0)

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All three times ``factor`` (in place), in the dtypes of the inputs."""
        grads = (self.hidden, None if self.sunk else self.head, self.bias)
        if factor is not None and float(factor) != 1:
            for grad in grads:
                if grad is not None:
                    grad *= factor
        hidden, head, bias = grads
        return (
            hidden,
            None if head is None else head.to(self._head_dtype),
            None if bias is None else bias.to(self._bias_dtype),
        )


class _Buffers:
    """Reused memory for one chunk's logits of both models and the 16-bit copy of the gradient."""

    def __init__(self, job: Job, hidden: Tensor, rounded: bool) -> None:
        shape = (job.chunk_size, len(job.student.head))
        self._student = _workspace.take("student", shape, job.dtype, hidden.device)
        self._teacher = _workspace.take("teacher", shape, job.dtype, hidden.device)
        self._rounded = _workspace.take("rounded", shape, job.student.dtype, hidden.device) if rounded else None

    def take(self, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._student[:n], self._teacher[:n], None if self._rounded is None else self._rounded[:n]


def _factors(job: Job, where: slice | Tensor, n: int, like: Tensor) -> Tensor:
    """What each token's divergence is multiplied with in the loss, [n]."""
    if job.weights is None:
        return like.new_full((n,), job.inverse)
    return job.weights[where].to(like.dtype) * job.inverse


def slices(total: int, size: int) -> Iterator[slice]:
    """Parts of nearly equal length, at most ``size``: a short last chunk would waste its products."""
    parts = -(-total // size)
    for i in range(parts):
        yield slice(i * total // parts, (i + 1) * total // parts)
