"""Any causal LM of transformers as the engine's LanguageModel: slow, one sequence a forward pass, and an oracle.

For tests, and for architectures the fast forward pass does not know.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from spec.models.base import Step


class TransformersModel:
    """See :class:`spec.models.base.LanguageModel`. Every slot is a DynamicCache, cropped to roll back.

    Args:
        model: a causal LM, in evaluation mode from here on.
        slots: sequences at a time; their memory grows as they do.

    Raises ValueError for models whose state cannot be rolled back (Mamba and the like).
    """

    def __init__(self, model: PreTrainedModel, *, name: str | None = None, slots: int = 1024):
        if model._is_stateful:
            raise ValueError(
                f"{type(model).__name__} keeps a recurrent state, which cannot be rolled back to reject drafts"
            )
        self.model = model.eval()
        config = model.config.get_text_config()
        self.name = name or model.config.name_or_path or type(model).__name__
        head = model.get_output_embeddings()
        self.vocab_size = int(config.vocab_size if head is None else head.weight.shape[0])
        self.max_positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self.device = model.device
        self.end_tokens = _ids(model.generation_config.eos_token_id if model.generation_config else config.eos_token_id)
        self.num_parameters = sum(weight.numel() for weight in model.parameters())
        self._slots = slots
        self._caches: dict[int, DynamicCache] = {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> TransformersModel:
        """From a directory, without a look at any hub, or from a hub id."""
        local = Path(path).is_dir()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=local)
        return cls(model.to(device), name=str(path))

    @property
    def cache_usage(self) -> float:
        """See :attr:`spec.models.base.LanguageModel.cache_usage`."""
        return len(self._caches) / self._slots

    def open(self, capacity: int) -> int | None:
        if capacity > self.max_positions:
            raise ValueError(f"{capacity} tokens are more than the {self.max_positions} positions of {self.name}")
        slot = next((i for i in range(self._slots) if i not in self._caches), None)
        if slot is not None:
            self._caches[slot] = DynamicCache()  # of full layers also for sliding windows: the mask does the rest
        return slot

    def close(self, slot: int) -> None:
        del self._caches[slot]

    def fork(self, source: int, target: int, tokens: int) -> None:
        copy = DynamicCache()
        for i, layer in enumerate(self._caches[source].layers if tokens else ()):
            copy.update(layer.keys[..., :tokens, :].clone(), layer.values[..., :tokens, :].clone(), i)
        self._caches[target] = copy

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        logits = []
        first = 0
        for slot, start, length in zip(step.slots.tolist(), step.starts.tolist(), step.lengths.tolist(), strict=True):
            rows = step.logit_rows[(step.logit_rows >= first) & (step.logit_rows < first + length)] - first
            logits.append(self._one(slot, start, step.token_ids[first : first + length], torch.from_numpy(rows)))
            first += length
        return torch.cat(logits)

    def _one(self, slot: int, start: int, ids: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, V] of the wanted rows of one sequence."""
        cache = self._caches[slot]
        beyond = cache.get_seq_length() - start
        assert beyond >= 0, f"slot {slot} holds {start + beyond} tokens, and the step begins at {start}"
        if beyond:
            cache.crop(-beyond)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        keep = {"logits_to_keep": rows.to(self.device)} if self._keeps and len(rows) else {}
        output = self.model(
            input_ids=ids[None], position_ids=positions, past_key_values=cache, use_cache=True, **keep
        )  # fmt: skip
        found = output.logits[0] if keep else output.logits[0, rows]
        return found.float()


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
