"""Language models small enough to know everything about: tables over whole prefixes, and tiny random Llamas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from spec.models.base import Step
from spec.models.transformers_model import TransformersModel

Logits = Callable[[tuple[int, ...]], np.ndarray]


class TableModel:
    """A LanguageModel whose next-token logits are any function of the whole text so far, read from its own cache.

    A slot holds tokens. A step that starts beyond what a slot holds fails, and one that starts before what should stand
    reads the wrong text: faults of roll-back show.
    """

    def __init__(self, logits: Logits, vocab_size: int, *, max_positions: int = 10_000, slots: int = 1000):
        self.name, self.vocab_size, self.max_positions = "table", vocab_size, max_positions
        self.device = torch.device("cpu")
        self.end_tokens: tuple[int, ...] = ()
        self.num_parameters = 1
        self.free = list(range(slots))
        self.held: dict[int, list[int]] = {}
        self.forwards: list[int] = []  # new tokens of each
        self._logits = logits

    @property
    def cache_usage(self) -> float:
        return len(self.held) / (len(self.held) + len(self.free))

    def open(self, capacity: int) -> int | None:
        if capacity > self.max_positions:
            raise ValueError(f"capacity {capacity} can never be given")
        if not self.free:
            return None
        slot = self.free.pop()
        self.held[slot] = []
        return slot

    def close(self, slot: int) -> None:
        del self.held[slot]
        self.free.append(slot)

    def fork(self, source: int, target: int, tokens: int) -> None:
        assert len(self.held[source]) >= tokens
        self.held[target] = self.held[source][:tokens]

    def forward(self, step: Step) -> Tensor:
        ids, rows, first = step.token_ids.tolist(), [], 0
        self.forwards.append(len(ids))
        wanted = set(step.logit_rows.tolist())
        for slot, start, length in zip(step.slots.tolist(), step.starts.tolist(), step.lengths.tolist(), strict=True):
            assert start <= len(self.held[slot]) and length > 0
            text = self.held[slot] = self.held[slot][:start] + ids[first : first + length]
            rows += [self._logits(tuple(text[: start + i + 1])) for i in range(length) if first + i in wanted]
            first += length
        return torch.tensor(np.array(rows).reshape(len(rows), self.vocab_size))


def random_logits(vocabulary: int, seed: int, spread: float = 1.5) -> Logits:
    """Float64 logits, independent for every prefix."""
    cache: dict[tuple[int, ...], np.ndarray] = {}

    def logits(text: tuple[int, ...]) -> np.ndarray:
        if text not in cache:
            cache[text] = spread * np.random.default_rng([seed, len(text), *text]).standard_normal(vocabulary)
        return cache[text]

    return logits


def scripted(script: Sequence[int], vocabulary: int, prompt: int) -> Logits:
    """Says the script, whatever the text: the token after position ``prompt + i - 1`` is ``script[i]``."""

    def logits(text: tuple[int, ...]) -> np.ndarray:
        out = np.zeros(vocabulary, dtype=np.float32)
        at = len(text) - prompt
        out[script[at] if at < len(script) else 0] = 20.0
        return out

    return logits


def tiny_llama(
    seed: int = 0, *, layers: int = 2, vocabulary: int = 48, hidden: int = 32, like: TransformersModel | None = None,
    noise: float = 0.0,
) -> TransformersModel:  # fmt: skip
    """A random Llama in float32; with ``like``, a copy of that one with relative noise on its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(like.model.config if like else config)
        with torch.no_grad():
            if like is not None:
                model.load_state_dict(like.model.state_dict())
            for parameter in model.parameters():
                if parameter.ndim == 2 and like is None:
                    parameter.mul_(6.0)
                if noise:
                    parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return TransformersModel(model, name=f"llama-{seed}")
