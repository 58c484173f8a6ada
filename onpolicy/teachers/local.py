"""A teacher in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from onpolicy.layers.replace import pack_layers
from onpolicy.models import head_weight, hidden_states
from onpolicy.teachers import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onpolicy.batching import Batch


class LocalTeacher:
    """A frozen causal LM; one forward pass a batch, no logits kept.

    ``used``: ids of the tokenizer; rows of its head beyond them say nothing about text and are left out.
    """

    def __init__(self, model: PreTrainedModel, used: int | None = None):
        self.model = model.eval().requires_grad_(False)
        pack_layers(model)
        self.head = head_weight(model, used)

    @torch.no_grad()
    def score(self, batch: Batch) -> Score:
        return Score(hidden_states(self.model, batch.to(self.model.device)), self.head)
