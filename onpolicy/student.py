"""Where a student comes from: a pruned teacher, a checkpoint, or a LoRA adapter on either."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from onpolicy.layers.replace import quicken_layers
from onpolicy.models import base_model, head_weight, hidden_states, load_causal_lm, used_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from onpolicy.batching import Batch
    from onpolicy.config import StudentConfig


def evenly_spaced(num_layers: int, of: int) -> list[int]:
    """``num_layers`` indices of ``of``, first and last included: (4, 30) -> [0, 10, 19, 29]."""
    if not 1 <= num_layers <= of:
        raise ValueError(f"student.num_layers must be between 1 and the teacher's {of} layers, got {num_layers}")
    if num_layers == 1:
        return [0]
    return [round(i * (of - 1) / (num_layers - 1)) for i in range(num_layers)]


def check_layers(layers: list[int], of: int) -> list[int]:
    """Layer indices that exist, in order; negative ones count from the end. ValueError names the bad one."""
    for index in layers:
        if not -of <= index < of:
            raise ValueError(f"student.layers: {index} is out of range; the teacher has layers 0 to {of - 1}")
    resolved = [index % of for index in layers]
    if not resolved or resolved != sorted(set(resolved)):
        raise ValueError(f"student.layers must be distinct and ascending, got {layers}")
    return resolved


@torch.no_grad()
def prune_layers(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of the teacher with only ``layers`` left (float32, tied weights kept tied)."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    config.dtype = torch.float32
    student = type(teacher)(config).float()
    source, target = teacher.get_decoder(), student.get_decoder()
    for name, child in source.named_children():
        if name != "layers":
            getattr(target, name).load_state_dict(child.state_dict())
    for new, old in zip(target.layers, (source.layers[i] for i in layers), strict=True):
        new.load_state_dict(old.state_dict())
    if not config.tie_word_embeddings:
        student.get_output_embeddings().load_state_dict(teacher.get_output_embeddings().state_dict())
    student.tie_weights()
    return student.eval()


class Student:
    """The model being trained: what is trainable, what the sampler is given, what is saved.

    ``used``: ids of the tokenizer. Rows of the head beyond them are saved and handed over, and never learnt from: no
    text has these tokens, and the teacher may have no such rows.
    """

    def __init__(
        self,
        model: nn.Module,
        freeze_embeddings: bool = False,
        precision: torch.dtype = torch.bfloat16,
        used: int | None = None,
    ):
        self.model, self.precision, self.used = model, precision, used
        if freeze_embeddings:
            self._freeze_embeddings()
        elif self._head_is_trained() and base_model(model).config.tie_word_embeddings:
            # The embedding's own gradient is a few rows, added to the head's where that already is.
            base_model(model).get_input_embeddings().sparse = True
        if precision == torch.bfloat16:
            quicken_layers(model)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, D] of the batch's completion tokens in the working precision, and the head [V, D] itself.

        V counts the tokenizer's ids where they are known: a view of the first rows where the head has more.
        Weights stay float32; matrix products run in ``precision``, those of the losses too.
        """
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            hidden = hidden_states(self.model, batch)
        return hidden.to(self.precision), head_weight(self.model, self.used)

    def head_grad(self) -> torch.Tensor | None:
        """``.grad`` of the head [V, D], for losses that add to it at once; None where the head is not trained."""
        if not self._head_is_trained():
            return None
        head = head_weight(self.model)
        if head.grad is None:
            head.grad = torch.zeros_like(head)
        return used_rows(head.grad, self.used)

    def _head_is_trained(self) -> bool:
        """Whether the head is a parameter of its own that learns: neither frozen nor under LoRA."""
        head = head_weight(self.model)
        return head.is_leaf and head.requires_grad

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _freeze_embeddings(self) -> None:
        base = base_model(self.model)
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            module.requires_grad_(False).to(self.precision)
        base.tie_weights()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, the same order in every process and after every restart."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the plain model, adapters merged, names as in its checkpoint: what a sampler loads."""
        prefix = "base_model.model." if base_model(self.model) is not self.model else ""
        merged = _merged_lora(self.model)
        for name, tensor in self.model.state_dict().items():
            if "lora_" in name:
                continue
            plain = name.removeprefix(prefix).replace(".base_layer", "")
            if plain == "lm_head.weight" and base_model(self.model).config.tie_word_embeddings:
                continue
            yield plain, merged.get(name, tensor)

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The merged model (bf16) and tokenizer in Hugging Face layout; the adapter beside it when there is one."""
        base = base_model(self.model)
        config = copy.deepcopy(base.config)
        config.dtype = torch.bfloat16
        with torch.device("meta"):
            plain = type(base)(config)
        state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in self.weights()}
        plain.load_state_dict(state, assign=True, strict=False)
        plain.tie_weights()
        plain.generation_config = copy.deepcopy(base.generation_config)
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if base is not self.model:
            self.model.save_pretrained(directory / "adapter")  # type: ignore[operator]


@torch.no_grad()
def _merged_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    """State-dict name of every adapted base weight -> that weight with its LoRA update added."""
    merged = {}
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None) and hasattr(module, "get_delta_weight"):
            weight = module.get_base_layer().weight
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
            merged[f"{name}.base_layer.weight"] = weight
    return merged


def build_student(
    config: StudentConfig,
    teacher: PreTrainedModel | None,
    device: torch.device | str = "cpu",
    used: int | None = None,
) -> Student:
    """The student a config describes. ``teacher`` is needed only when it is pruned from the teacher.

    ``used``: as for :class:`Student`.
    """
    if config.model is not None:
        model: nn.Module = load_causal_lm(config.model, torch.float32)
    else:
        assert teacher is not None
        of = teacher.config.num_hidden_layers
        layers = check_layers(config.layers, of) if config.layers else evenly_spaced(config.num_layers, of)
        model = prune_layers(teacher, layers)
    if config.lora.rank > 0:
        model = _with_lora(model, config)
    frozen = config.freeze_embeddings and config.lora.rank == 0  # under LoRA only adapters train anyway
    return Student(model.to(device), frozen, getattr(torch, config.precision), used)


def _with_lora(model: nn.Module, config: StudentConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = config.lora.target_modules or "all-linear"
    base = base_model(model)
    if "lm_head" in targets and base.config.tie_word_embeddings:
        base.config.tie_word_embeddings = False  # adapted, the head is another matrix than the embedding
    return get_peft_model(
        model,  # type: ignore[arg-type]
        LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=0.0, target_modules=targets),
    )
