"""What every sampler promises, and the helpers they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from onpolicy.seeds import derive
from onpolicy.types import FinishReason, Prompt, Rollout, SamplingParams, Source

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]


class Sampler(Protocol):
    """Draws completions from a model whose weights can be replaced.

    A completion is a function of weights, prompt, parameters, ``params.seed`` and sample index: its random numbers
    do not depend on which other prompts are in the batch. Its log-probs are those of the *processed* distribution
    (temperature, then top-k, then top-p, renormalised) in nats. Greedy decoding (temperature 0) has a one-point
    distribution whose log-probs say nothing, so there they are the model's own, at temperature 1 and unfiltered.
    """

    policy_version: int  # updates the weights have seen
    source: Source

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Rollout]:
        """``params.n`` rollouts a prompt, prompt-major, then by sample index.

        ``progress`` is called with the number of completion tokens newly finished.
        Raises ValueError, before anything is drawn, for a prompt that leaves no room for ``params.max_tokens``.
        """

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Replace the weights by ``weights`` (names as in ``state_dict()`` of the transformers model)."""

    def close(self) -> None:
        """Free the model; the sampler cannot be used afterwards. Calling it twice does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosingSampler:
    """The context manager of a sampler: leaving the block closes it."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def completion_seed(params: SamplingParams, prompt: Prompt, sample_index: int) -> int:
    """The seed of one completion: of the run's stream, the prompt and the sample index, and of nothing else."""
    return derive(params.seed, "rollout", prompt.id, sample_index)


def check_room(prompts: Sequence[Prompt], params: SamplingParams, max_model_len: int) -> None:
    """Raise ValueError naming the first prompt that is empty or leaves no room for ``params.max_tokens``."""
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"prompt '{prompt.id}' has no tokens; drop empty prompts from the dataset")
        length = len(prompt.token_ids)
        if length > max_model_len - params.max_tokens:
            raise ValueError(
                f"prompt '{prompt.id}' has {length} tokens; with max_tokens={params.max_tokens} it does not fit "
                f"max_model_len={max_model_len}: shorten or drop the prompt, lower max_tokens to at most "
                f"{max(0, max_model_len - length)}, or raise max_model_len"
            )


def make_rollout(
    prompt: Prompt,
    sample_index: int,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    stop_token_ids: Sequence[int],
    policy_version: int,
    source: Source,
) -> Rollout:
    """A rollout from what an engine returned; the finish reason is read off its last token.

    Raises RuntimeError on a log-prob that is not finite: training on it would destroy the student.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    values = np.asarray(logprobs, dtype=np.float32)
    if not np.isfinite(values).all():
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RuntimeError(
            f"the sampler returned log-prob {values[where]} for token {ids[where]} at position {where} of prompt "
            f"'{prompt.id}' (policy version {policy_version}): check the weights for NaN or infinity"
        )
    reason: FinishReason = "stop" if len(ids) and int(ids[-1]) in stop_token_ids else "length"
    return Rollout(prompt, ids, values, reason, policy_version, sample_index, source)
