"""How a causal language model is loaded and called: the same for student and teacher.

The losses never see logits of a whole batch; they take hidden states and the output matrix, so a model is used as
its decoder (tokens -> hidden states after the final norm) and its head (hidden @ head.T = logits).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onpolicy.attention import NAME, register
from onpolicy.teachers.convert import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from onpolicy.batching import Batch


def loading_options(name: str) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``: a local directory is never looked up on a hub."""
    return {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}


def check_model_exists(name: str, option: str) -> None:
    """Raise ValueError, before anything heavy is imported, when ``name`` looks like a path and nothing is there."""
    directory = Path(resolve_model(name))
    if directory.is_dir():
        if not (directory / "config.json").exists():
            raise ValueError(f"{option}: '{directory}' holds no config.json; give a Hugging Face checkpoint directory")
        _check_weights(directory, option)
    elif directory.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ValueError(
            f"{option}: no such model directory '{name}'; give a directory, or a hub id of the form owner/name"
        )


def _check_weights(directory: Path, option: str) -> None:
    """The files of a checkpoint are all there and begin as they should."""
    from safetensors import SafetensorError, safe_open

    found = {path.name for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern)}
    for index in directory.glob("*.index.json"):
        if missing := set(json.loads(index.read_text()).get("weight_map", {}).values()) - found:
            raise ValueError(f"{option}: '{directory}' lacks {', '.join(sorted(missing))}; copy the checkpoint again")
    if not found:
        raise ValueError(
            f"{option}: '{directory}' holds no weights (*.safetensors or *.bin); copy them beside its config.json"
        )
    for name in sorted(found):
        try:
            if name.endswith(".safetensors"):
                safe_open(directory / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{option}: '{directory / name}' cannot be read ({error}); copy the checkpoint again"
            ) from error


def load_tokenizer(name: str, option: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ValueError naming the option where there is none."""
    from transformers import AutoTokenizer

    path = resolve_model(name)
    try:
        return AutoTokenizer.from_pretrained(path, **loading_options(path))
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{option}: cannot load the tokenizer of '{name}' ({why}); copy its tokenizer files beside the weights"
        ) from error


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory, and what its loader had to make up."""

    model: PreTrainedModel
    invented: list[str]  # parameters the checkpoint lacks, or has in another shape: initialised at random


def read_causal_lm(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Loaded:
    """A causal LM as it is, in evaluation mode, attention by SDPA. ValueError where there is none to load."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=register(), output_loading_info=True, **loading_options(path)
        )
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"cannot load the model '{name}': {error}") from error
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    return Loaded(model.to(device).eval(), sorted({*report["missing_keys"], *mismatched}))


def load_causal_lm(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """As :func:`read_causal_lm`, and ValueError when its head is not a plain matrix product."""
    model = read_causal_lm(name, dtype, device).model
    check_linear_head(model)
    return model


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def head_weight(model: nn.Module, used: int | None = None) -> torch.Tensor:
    """The output matrix [V, D] as it acts, a LoRA update on it included (gradients flow to both factors).

    ``used``: ids of the tokenizer; rows beyond them (padding for speed) are left out.
    """
    head = base_model(model).get_output_embeddings()
    lora = getattr(head, "lora_A", None)
    weight = head.get_base_layer().weight if lora else head.weight
    for name in head.active_adapters if lora else ():
        weight = weight + head.scaling[name] * head.lora_B[name].weight @ head.lora_A[name].weight
    return used_rows(weight, used)


def used_rows(head: torch.Tensor, used: int | None) -> torch.Tensor:
    """[V, ...] -> [used, ...], a view; the tensor itself where it has no rows beyond, or ``used`` is None."""
    return head if used is None or used >= len(head) else head[:used]


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Hidden states [N, D] that predict the batch's completion tokens: ``hidden @ head.T`` are their logits."""
    decoder = base_model(model).get_decoder()
    # Another attention would ignore the layout in silence, and completions would see one another.
    assert batch.layout is None or decoder.config._attn_implementation == NAME, "load models with load_causal_lm"
    shared = {} if batch.layout is None else {"shared_prompts": batch.layout}
    # No mask: attention is causal, and padding stands at the end of its row.
    output = decoder(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **shared
    ).last_hidden_state
    return output.flatten(0, 1).index_select(0, batch.predict)


@torch.no_grad()
def check_linear_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not ``hidden @ head.T`` (soft-capped, scaled or biased heads)."""
    probe = torch.arange(min(4, model.config.get_text_config().vocab_size), device=model.device)[None]
    output = model(input_ids=probe, use_cache=False, output_hidden_states=True)
    ours = output.hidden_states[-1] @ head_weight(model).T
    scale = output.logits.abs().amax().clamp_min(1e-6)
    if not torch.allclose(ours / scale, output.logits / scale, atol=2e-2):
        raise ValueError(
            f"{type(model).__name__} does not compute its logits as a plain matrix product of its last hidden states "
            "(a soft-capped, scaled or biased head); the bounded-memory loss would be wrong for it. Use a model with a "
            "plain output layer (Llama, Qwen, SmolLM, Mistral and most others have one)"
        )


@torch.no_grad()
def check_shared_prompts(model: nn.Module) -> None:
    """Refuse a model whose layers do not pass on how completions share a prompt: they would see one another."""
    from onpolicy.batching import pack, text_rollout
    from onpolicy.types import Prompt

    def after(prompt: tuple[int, ...], other: list[int]) -> torch.Tensor:
        """Hidden states of a completion's own tokens, beside another completion of the prompt."""
        batch = pack([text_rollout(Prompt("probe", prompt), ids) for ids in (other, [7, 8, 9])], 100)[0]
        return hidden_states(model, batch.to(next(model.parameters()).device))[len(other) + 1 :]

    # The same shapes are computed in the same order, so what is not seen changes no bit: no tolerance has to tell a
    # leak from rounding.
    states = after((1, 2, 3), [4, 5])
    alone, prompted = torch.equal(states, after((1, 2, 3), [6, 3])), not torch.equal(states, after((5, 2, 3), [4, 5]))
    if not (alone and prompted):
        raise ValueError(
            f"{type(base_model(model)).__name__} cannot compute a prompt once for several completions (its layers do "
            "not pass attention arguments on); set batching.share_prompts: false"
        )
