"""transformers' ``generate``: plain, with an assistant model, or with prompt lookup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spec.audit.sample import Sample
from spec.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine:
    """One request at a time, seeded with the request's seed.

    Args:
        model: the target. assistant: a draft model. lookup: tokens to look up instead, 0 for none.
    """

    unsupported = frozenset({"presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids"})

    def __init__(self, model: PreTrainedModel, assistant: PreTrainedModel | None = None, lookup: int = 0):
        if assistant is not None and lookup:
            raise ValueError("give an assistant model or a lookup, not both")
        self.model = model.eval()
        self._options: dict[str, Any] = {}
        if assistant is not None:
            self._options["assistant_model"] = assistant.eval()
        if lookup:
            self._options["prompt_lookup_num_tokens"] = lookup
        self.name = "transformers " + ("assisted" if assistant else "prompt lookup" if lookup else "plain")

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """The text up to the end-of-text token, which is included."""
        return [self._one(request) for request in requests]

    @torch.inference_mode()
    def _one(self, request: Request) -> Sample:
        params = request.params
        prompt = torch.tensor([list(request.prompt_ids)], device=self.model.device)
        how: dict[str, Any] = {"do_sample": False}
        if not params.greedy:
            # every one given: generate() would take the checkpoint's, or its own top_k=50
            how = {
                "do_sample": True,
                "temperature": params.temperature,
                "top_k": max(params.top_k, 0),
                "top_p": params.top_p,
                "min_p": params.min_p or None,
            }
        torch.manual_seed(params.seed % 2**63)
        output = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens,
            repetition_penalty=params.repetition_penalty, **how, **self._options,
        )  # fmt: skip
        tokens = output[0, prompt.shape[1] :][: request.max_tokens].tolist()
        return Sample(tuple(request.prompt_ids), tuple(tokens), params)
