"""Rollouts through a transformers model: the oracle for the vLLM sampler, and for machines without vLLM.

It recomputes nothing cleverly: left-padded batches, a key/value cache, one token a row and step. The draw itself is
the same function as in vLLM (``onpolicy.rollouts.draw``), so that both give the same completion for a seed, up to
the rounding of their logits.

Shape legend: B rows, P padded prompt length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from onpolicy.rollouts.base import ClosingSampler, Progress, check_room, completion_seed, make_rollout
from onpolicy.rollouts.draw import draw_tokens, uniforms
from onpolicy.types import Prompt, Rollout, SamplingParams, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Row = tuple[Prompt, int]  # a prompt and which of its samples


class TransformersSampler(ClosingSampler):
    """The :class:`~onpolicy.rollouts.base.Sampler` on a transformers causal language model.

    Args:
        model: a model in memory, used as it is (``sync`` writes into it), or a directory or hub id to load.
        dtype: of a model loaded here.
        max_model_len: prompt and completion together; None takes the model's own limit.
        max_num_seqs: rows decoded together.
        pad_token_id: fills the masked places; any token does.
        used_ids: of the tokenizer; rows of the output beyond them (padding) are never drawn. None: all rows are.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        pad_token_id: int = 0,
        used_ids: int | None = None,
        source: Source = "student",
        policy_version: int = 0,
    ):
        self.source: Source = source
        self.policy_version = policy_version
        self._model: PreTrainedModel | None = _load(model, dtype) if isinstance(model, (str, Path)) else model
        self.max_model_len = max_model_len or int(self._open_model().config.max_position_embeddings)
        self._max_num_seqs = max_num_seqs
        self._pad, self._used = pad_token_id, used_ids

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Rollout]:
        """See :meth:`onpolicy.rollouts.base.Sampler.generate`; ``progress`` is called once a batch."""
        check_room(prompts, params, self.max_model_len)
        model = self._open_model()
        training = model.training
        model.eval()
        rows: list[_Row] = [(prompt, sample) for prompt in prompts for sample in range(params.n)]
        rollouts: list[Rollout] = []
        try:
            for start in range(0, len(rows), self._max_num_seqs):
                batch = self._decode(model, rows[start : start + self._max_num_seqs], params)
                rollouts += batch
                if progress is not None:
                    progress(sum(map(len, batch)))
        finally:
            model.train(training)
        return rollouts

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """See :meth:`onpolicy.rollouts.base.Sampler.sync`. ValueError where names differ."""
        model = self._open_model()
        given, own = dict(weights), model.state_dict().keys()
        if model.config.tie_word_embeddings:  # the head may come under its own name too, or not
            own = own - {"lm_head.weight"}
            given.pop("lm_head.weight", None)
        if given.keys() != own:
            lost, strange = sorted(own - given.keys())[:3], sorted(given.keys() - own)[:3]
            raise ValueError(f"weight sync: missing {lost}, unexpected {strange}: give the state_dict() of this model")
        model.load_state_dict(given, strict=False)
        self.policy_version = policy_version

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _open_model(self) -> PreTrainedModel:
        if self._model is None:
            raise ValueError("this sampler is closed; make a new TransformersSampler")
        return self._model

    @torch.no_grad()
    def _decode(self, model: PreTrainedModel, rows: Sequence[_Row], params: SamplingParams) -> list[Rollout]:
        from transformers import DynamicCache

        seeds = np.array([completion_seed(params, *row) for row in rows], dtype=np.uint64)
        ids, mask = self._pad_left([prompt.token_ids for prompt, _ in rows], model.device)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        stop = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=model.device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
        cache = DynamicCache(config=model.config)
        tokens, logprobs, running = [], [], []
        for position in range(params.max_tokens):
            logits = model(
                ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1, : self._used]
            token, logprob = draw_tokens(logits, uniforms(seeds, np.full(len(rows), position)), params)
            tokens.append(token)
            logprobs.append(logprob)
            running.append(~finished)
            finished = finished | torch.isin(token, stop)
            if bool(finished.all()):
                break
            ids, places = token[:, None], places[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        lengths = torch.stack(running, 1).sum(1).tolist()
        drawn, scores = torch.stack(tokens, 1).cpu().numpy(), torch.stack(logprobs, 1).float().cpu().numpy()
        return [
            make_rollout(*row, ids[:n], values[:n], params.stop_token_ids, self.policy_version, self.source)
            for row, ids, values, n in zip(rows, drawn, scores, lengths, strict=True)
        ]

    def _pad_left(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, [B, P] int64 each; every prompt ends in the last column."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(device), mask.to(device)


def _load(model: str | Path, dtype: str) -> PreTrainedModel:
    from onpolicy.models import load_causal_lm

    return load_causal_lm(str(model), getattr(torch, dtype))
